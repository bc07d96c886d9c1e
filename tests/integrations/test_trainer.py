"""The stock Trainer and Accelerate on two ranks against one process without ringattn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
LIMIT = 1e-5
CASES = ["the Trainer", "LoRA, accumulated", "the same sample", "Accelerate", "ZeRO-3, accumulated"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """What is logged on two ranks and on one, of every case."""
    folder = tmp_path_factory.mktemp("trainer")
    launchers = {"two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "one": []}
    found = []
    for name, launcher in launchers.items():
        subprocess.run(
            [sys.executable, *launcher, "-m", "tests.integrations.trainer_script", str(folder / name)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=150,
            check=True,
        )
        found.append(torch.load(folder / name))
    two, one = found
    return {case: (two[case], one[case]) for case in one}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(logs: dict[str, tuple[Any, Any]], case: str) -> None:
    got, expected = logs[case]
    assert len(got) == len(expected) >= 10
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=LIMIT)
