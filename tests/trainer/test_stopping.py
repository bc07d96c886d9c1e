"""Runs that are stopped or lose a rank: exit codes, what is said, what is left. Two ranks, started as users do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ("--width", "8", "--heads", "2", "--kv-heads", "1", "--layers", "1")


def _line(texts: Path, folder: Path, steps: int) -> list[str]:
    line = [sys.executable, str(ROOT / "launch" / "train.py"), "--ranks", "2", "--data", str(texts), "--length", "40"]
    return [*line, "--steps", str(steps), "--save-every", "1000", "--resume", "auto", *MODEL, "--folder", str(folder)]


def _lines(folder: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        text = (folder / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []


def _ranks(folder: Path) -> list[int]:
    """The processes of ranks: those whose parent has this folder among its arguments too."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (path / "cmdline").read_bytes():
                found[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    launchers = {parent for parent in found.values() if parent in found}
    return sorted(process for process in found if process not in launchers)


@contextlib.contextmanager
def _running(texts: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run that has begun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        _line(texts, folder, 100_000), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        end = time.monotonic() + 60
        while len(_lines(folder)) < 5:
            assert process.poll() is None and time.monotonic() < end, process.stdout and process.stdout.read()
            time.sleep(0.02)
        yield process
        process.kill()


def _ended(folder: Path) -> bool:
    end = time.monotonic() + 20
    while left := _ranks(folder):
        if time.monotonic() > end:
            for process in left:
                os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def test_sigterm_saves_and_ends_with_0(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with _running(texts, folder) as process:
        process.terminate()
        said, _ = process.communicate(timeout=60)
    last = max(line["step"] for line in _lines(folder))
    assert process.returncode == 0 and "saved, and stopped by SIGTERM" in said and "Traceback" not in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{last:08}"]
    assert _ended(folder)


def test_a_killed_rank_ends_the_run_in_one_line_each(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with _running(texts, folder) as process:
        os.kill(_ranks(folder)[-1], signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL and "Traceback" not in said
    assert said.count("error: Rank ") == 1 and "has ended: its own output says why" in said
    assert "ended by SIGKILL" in said and _ended(folder)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at the processes of Linux")
def test_ranks_end_when_their_launcher_is_killed(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with _running(texts, folder) as process:
        assert len(_ranks(folder)) == 2
        process.kill()  # its child, torchrun, ends by itself, and so do torchrun's, the ranks
        process.wait(60)
        assert _ended(folder)
