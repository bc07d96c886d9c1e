"""A planted subset of the table of faults, and of its judgement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _table(*options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "scripts.benchmarks.faults", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_ranks_that_fail_while_a_checkpoint_is_written_leave_the_one_before() -> None:
    faults = ("--fault", "SIGKILL", "--fault", "exception", "--fault", "wrong shape")
    code, said = _table("--transport", "gloo", "--place", "save", *faults)
    assert code == 0 and "Every cell is as it should be." in said, said
    assert said.count("step-00000001") == 3 and "step-00000002," not in said
    assert "lost rank 1 in" in said and "Rank 1 has ended: its own output says why" in said
    assert "differ in parameters and options of the optimizer" in said


def test_a_rank_that_skips_a_call_or_is_missing_is_named() -> None:
    code, said = _table(
        "--transport", "gloo", "--place", "start", "--place", "forward", "--fault", "skips", "--fault", "missing"
    )
    assert code == 0, said
    assert "they differ in call (rank 0, 2: fwd 2; rank 1: sum_gradients)." in said
    assert "Rank 1 did not start within 4 seconds." in said
