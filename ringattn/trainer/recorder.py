"""What a run shows and writes while it goes on: a progress bar, the run folder."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ringattn.trainer.meter import Cost
from ringattn.trainer.run_folder import RunFolder

QUIET = 10.0  # seconds without a line, where there is no bar


class Recorder:
    """Shows and writes on the rank that has a folder. On the others it does nothing: nobody asks."""

    def __init__(self, folder: RunFolder | None, steps: int) -> None:
        self.folder = folder
        self._console = Console(quiet=folder is None)
        text, left = TextColumn("{task.description}"), TimeRemainingColumn(compact=True)
        columns = (BarColumn(bar_width=6), MofNCompleteColumn(), text, left)
        self._bar = Progress(*columns, console=self._console, disable=folder is None or not self._console.is_terminal)
        self._task = self._bar.add_task("", total=steps)
        self._said = time.monotonic()

    def __enter__(self) -> Recorder:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar, there also when the output is a file."""
        self._console.print(text, highlight=False, soft_wrap=True)
        self._said = time.monotonic()

    def step(self, step: int, tokens: int, cost: Cost, **measured: float) -> None:
        """A step is done: tokens of all ranks, the cost on this one."""
        if self.folder is None:
            return
        speed = tokens / cost.seconds
        self.folder.record(step=step, **measured, tokens_per_second=speed, **vars(cost))
        text = (
            f"loss {measured['loss']:.3f}, {speed:,.0f} tokens/s, {readable(cost.sent_bytes)}/step, "
            f"waits {cost.waited:.0%}, {readable(cost.peak_memory_bytes)}"
        )
        self._bar.update(self._task, completed=step, description=text)
        if self._bar.disable and time.monotonic() > self._said + QUIET:
            self.say(f"step {step:>4}  {text}")

    def held_out(self, step: int, loss: float, weights: dict[str, Tensor]) -> None:
        """A held-out loss; the weights it belongs to are saved with it."""
        if self.folder is None:
            return
        self.folder.record(step=step, held_out_loss=loss)
        self.folder.save(weights)
        description: Any = self._bar.tasks[self._task].description
        self.say(f"step {step:>4}  held-out loss {loss:.3f}  {description}".rstrip())


def readable(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
