"""`launch/finetune.py` on two ranks, and the ordinary script that the README's diff makes of it, on one: one loss."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "finetune.py"
TRAIN = ("--steps", "4", "--length", "500")


def losses(*command: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]


def ordinary(text: str) -> str:
    """The script without the lines that the README's diff adds, and with those that it takes away."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    removed = None
    for line in diff.splitlines():
        if line.startswith("-"):
            removed = line[1:] + "\n"
            continue
        assert text.count(line[1:] + "\n") == 1, line
        text = text.replace(line[1:] + "\n", removed or "")
        removed = None
    return text


def test_the_five_lines_of_the_readme_are_all_that_differs(tmp_path: Path) -> None:
    before = tmp_path / "before.py"
    before.write_text(ordinary(SCRIPT.read_text()))
    assert "attach" not in before.read_text().partition('"""\n\nimport')[2]
    folder = tmp_path / "trained"
    after = losses(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), *TRAIN, "--save", str(folder)
    )  # fmt: skip
    expected = losses(str(before), *TRAIN)
    assert len(after) == 4
    assert all(abs(a - b) <= 1e-5 * b for a, b in zip(after, expected, strict=True))
    assert "ringattn" not in (folder / "config.json").read_text()
