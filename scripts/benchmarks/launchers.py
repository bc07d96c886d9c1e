"""The trainer under torchrun, DeepSpeed's launcher and mpirun, 2 and 4 ranks each: the same losses.

Model, seed and data are the same, and nothing is around the model (--wrap none). Printed is the largest relative
difference of any step's loss from that of torchrun with two ranks; exit code 1 where one is larger than 1e-6.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
ALLOWED = 1e-6
LAUNCHERS = ("torchrun", "deepspeed", "mpirun")
RANKS = (2, 4)
MODEL = ("--layers", "2", "--width", "64", "--heads", "4", "--kv-heads", "2")


def train(launcher: str, ranks: int, folder: Path, options: list[str]) -> list[float]:
    """The loss of every step of a run."""
    scripts = sysconfig.get_path("scripts")
    environment = {"RANKS": str(ranks), "PYTHON": sys.executable, "PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(ROOT / "launch" / f"{launcher}.sh"), "--folder", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="scripts/bench launchers", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a sample (default 1024)")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="default adamw")
    given = parser.parse_args()
    options = ["--length", str(given.length), "--steps", str(given.steps), "--optimizer", given.optimizer]
    options += [*MODEL, "--eval-every", str(given.steps), "--eval-packs", "1", "--warmup", "5"]
    console, worst = Console(), 0.0
    table = Table("launcher", "ranks", "first loss", "last loss", "largest difference", title=f"{given.steps} steps")
    with tempfile.TemporaryDirectory() as temporary:
        expected: list[float] = []
        for launcher, ranks in itertools.product(LAUNCHERS, RANKS):
            with console.status(f"{launcher}, {ranks} ranks"):
                found = train(launcher, ranks, Path(temporary) / f"{launcher} {ranks}", options)
            expected = expected or found
            difference = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
            worst = max(worst, difference)
            table.add_row(launcher, str(ranks), f"{found[0]:.6f}", f"{found[-1]:.6f}", f"{difference:.1e}")
    console.print(table)
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
