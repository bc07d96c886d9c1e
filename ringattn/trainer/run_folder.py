"""The run folder: what a run was asked, what it measured, its picture and its weights.

    config.json          the options
    metrics.jsonl        a line for each step and each held-out loss, written as it happens
    loss.png             both curves
    model.safetensors    the weights
    checkpoints/         everything that it takes to go on, with --save-every

Files are replaced whole, so that a run that is interrupted leaves the last complete ones.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ringattn.errors import CheckpointError

CONFIG, METRICS, PICTURE, WEIGHTS = FILES = ("config.json", "metrics.jsonl", "loss.png", "model.safetensors")
CHECKPOINTS = "checkpoints"


def holds_a_run(folder: Path) -> bool:
    return (folder / CONFIG).exists()


class RunFolder:
    """Written by one rank."""

    def __init__(self, path: Path | None, config: dict[str, Any], start: int = 0) -> None:
        """Makes the folder.

        Args:
            path: None for a folder named after the time.
            start: the step that the run goes on from. With 0 a run that is there already is replaced; else what it
                measured after this step is.
        """
        self.path = path or Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")
        with _written(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if start == 0:
                for name in FILES:
                    (self.path / name).unlink(missing_ok=True)
                shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
            elif (self.path / METRICS).exists():
                self._forget(start)
            with replacing(self.path / CONFIG) as new:
                new.write_text(json.dumps(config, indent=2, default=str) + "\n")

    def _forget(self, start: int) -> None:
        """Leaves out what was measured after a step, and a line that was being written when the run was killed."""
        lines = (self.path / METRICS).read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        with replacing(self.path / METRICS) as new:
            new.write_text("".join(whole))

    def record(self, **measured: float) -> None:
        """Appends a line of metrics; it is in the file when this returns."""
        with _written(self.path), (self.path / METRICS).open("a") as lines:
            lines.write(json.dumps(measured) + "\n")

    def save(self, weights: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with _written(self.path):
            with replacing(self.path / WEIGHTS) as new:
                save_file({name: weight.detach().cpu() for name, weight in weights.items()}, new)
            draw_losses(self.path)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options and the weights of a run."""
    from safetensors.torch import load_file

    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def draw_losses(folder: Path) -> None:
    """loss.png from metrics.jsonl."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            name = f"{label}, last {points[-1][1]:.3f}"
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.5, markersize=5)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=f"Loss of {folder.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(folder / PICTURE) as new:
        figure.savefig(new, format="png", dpi=144)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What cannot be written is said in one line.

    Raises:
        CheckpointError: a full disk, a folder that is gone or may not be written to.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. Make room, or mend the folder, and go on from the last "
            f"checkpoint with --resume auto."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when the block is done and not before."""
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
