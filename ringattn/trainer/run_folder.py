"""The run folder: what a run was asked, what it measured, its picture and its weights.

    config.json          the options
    metrics.jsonl        a line for each step and each held-out loss, written as it happens
    loss.png             both curves
    model.safetensors    the weights
    checkpoints/         everything that it takes to go on, with --save-every

Files are replaced whole, so that a run that is interrupted leaves the last complete ones.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ringattn.checking import integer
from ringattn.errors import CheckpointError
from ringattn.readable import shortened
from ringattn.trainer.model import Decoder, Shape

CONFIG, METRICS, PICTURE, WEIGHTS = FILES = ("config.json", "metrics.jsonl", "loss.png", "model.safetensors")
CHECKPOINTS = "checkpoints"
SIZES = tuple(field.name for field in dataclasses.fields(Shape))
MOST = 1 << 20  # of each size of a model that is read: a damaged one is refused, and not made


def holds_a_run(folder: Path) -> bool:
    """Whether there is one. Raises OSError where the name is one that no disk takes."""
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
        whole = [line for line in _measured(self.path / METRICS, whole=False) if line["step"] <= start]
        with replacing(self.path / METRICS) as new:
            new.write_text("".join(f"{json.dumps(line)}\n" for line in whole))

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


def load(folder: Path) -> tuple[Decoder, int]:
    """The model of a run, and the length of its context.

    Raises:
        CheckpointError: the run's options or weights are missing, damaged, or do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config, weights = (_regular(folder / name) for name in (CONFIG, WEIGHTS))
        options = json.loads(config.read_text())
        length, *sizes = (integer(options[name], name, least=1, below=MOST) for name in ("length", *SIZES))
        model = Decoder(Shape(*sizes), seed=0)
        model.load_state_dict(load_file(weights))
    except (OSError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        what = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"{folder} holds no run that can be read: {shortened(' '.join(what.split()), 300)}. Name the --folder of a "
            f"run that has {CONFIG} and {WEIGHTS}, or train again."
        ) from error
    return model, length


def _regular(path: Path) -> Path:
    """The path of a file, and of nothing that is only called so: reading a pipe would wait for ever."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    return path


def _measured(path: Path, *, whole: bool = True) -> list[dict[str, float]]:
    """The lines of a file of metrics.

    Args:
        whole: whether the last line is; otherwise it may have been cut off, and is left out then.

    Raises:
        CheckpointError: it is none.
    """
    try:
        *lines, last = _regular(path).read_text().split("\n")
        found = [json.loads(line) for line in ([*lines, last] if whole and last else lines)]
        if not all({"step"} <= line.keys() and all(map(_is_number, line.values())) for line in found):
            raise ValueError("a line has no step, or what is no number")
    except (OSError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no file of metrics ({error}). Remove it to go on without it, or begin anew with --overwrite."
        ) from error
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def draw_losses(folder: Path) -> None:
    """loss.png from metrics.jsonl."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    lines = _measured(folder / METRICS)
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
