"""A run of the trainer saved on four ranks in FSDP2, gone on with on other numbers of ranks in other wrappers.

All runs see the same samples and end at the same step; printed is the largest relative difference of their losses from
those of the run that was never interrupted. Exit code 1 where one is larger than it may be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
ALLOWED = 1e-6
RESUMED = {
    "2 ranks, ZeRO-3": ("--ranks", "2", "--wrap", "deepspeed", "--zero", "3"),
    "3 ranks, DDP": ("--ranks", "3", "--wrap", "ddp"),
    "4 ranks, FSDP2": ("--ranks", "4", "--wrap", "fsdp2"),
    "1 rank": ("--ranks", "1"),
}


def train(folder: Path, *options: str) -> dict[int, float]:
    """The loss of every step that the run made."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--folder", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps before the checkpoint, and after it (default 20)")
    parser.add_argument("--length", type=int, default=2048, help="bytes of a sample (default 2048)")
    given = parser.parse_args()

    console, table = Console(), Table("gone on with", "steps", "largest difference of the loss")
    steps, last = given.steps, str(2 * given.steps)
    common = ("--length", str(given.length), "--steps", last, "--eval-every", last, "--eval-packs", "1")
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        with console.status("4 ranks, FSDP2, uninterrupted"):
            expected = train(whole, "--ranks", "4", "--wrap", "fsdp2", "--save-every", str(steps), *common)
        source = whole / "checkpoints" / f"step-{steps:08}"
        for nth, (name, options) in enumerate(RESUMED.items()):
            with console.status(name):
                found = train(Path(temporary) / str(nth), "--resume", str(source), *options, *common)
            difference = max(abs(loss - expected[step]) / expected[step] for step, loss in found.items())
            worst = max(worst, difference)
            table.add_row(name, f"{min(found)} to {max(found)}", f"{difference:.1e}")
    console.print(table)
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
