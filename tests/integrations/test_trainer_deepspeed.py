"""The demo's trainer with DeepSpeed around its model: the same steps as on one rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"4 ranks and on 1 are equal", done.stdout), done.stdout
