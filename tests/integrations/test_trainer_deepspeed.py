"""The demo's trainer with DeepSpeed around its model: the same steps as on one rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ("--layers", "1", "--width", "16", "--heads", "2", "--kv-heads", "1")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_trainer_checks_itself_with_zero(tmp_path: Path, stage: int) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(200)))
    options = ("--data", str(tmp_path), "--length", "100", "--steps", "0", "--check", "2", "--ranks", "4")
    more = ("--replicas", "2", "--batch", "4", "--wrap", "deepspeed", "--zero", str(stage))
    done = subprocess.run(
        [sys.executable, "launch/train.py", *options, *more, *MODEL],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"4 ranks and on 1 are equal", done.stdout), done.stdout


@pytest.mark.parametrize("hosts", ["", "localhost slots=2\n"], ids=["one machine", "a hostfile"])
def test_the_launcher_of_deepspeed(tmp_path: Path, hosts: str) -> None:
    """With a hostfile DeepSpeed asks the first host for its address, over ssh: here that is this machine."""
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(200)))
    (tmp_path / "hosts").write_text(hosts)
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/usr/bin/env bash\nwhile [ "$1" != localhost ]; do shift; done\nshift\nexec "$@"\n')
    ssh.chmod(0o755)
    path = f"{tmp_path}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    settings = {
        "RANKS": "2",
        "HOSTFILE": str(tmp_path / "hosts") if hosts else "",
        "PATH": path,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [
            *("launch/deepspeed.sh", "--data", str(tmp_path / "text.txt"), "--length", "100", "--steps", "0"),
            *("--check", "2", *MODEL),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"2 ranks and on 1 are equal", done.stdout), done.stdout
