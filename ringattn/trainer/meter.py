"""What a step costs: time, bytes sent, waiting, memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from ringattn.mesh import Mesh


@dataclass(frozen=True)
class Cost:
    """One rank's step.

    Attributes:
        seconds: from its start to its end.
        sent_bytes: sent to the ranks of its sequence.
        waited: the share of the seconds in which it waited for them.
        peak_memory_bytes: most that the process has held so far.
    """

    seconds: float
    sent_bytes: int
    waited: float
    peak_memory_bytes: int


class Meter:
    """Reads the clock and the transport's counters, which only ever grow, and gives the differences."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._counters = mesh.connected().counters
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._start = self._read()

    def lap(self) -> Cost:
        """The cost since the last lap or restart."""
        before, now = self._start, self._read()
        self._start = now
        seconds = now[0] - before[0]
        return Cost(seconds, now[1] - before[1], (now[2] - before[2]) / seconds, peak_memory(self._device))

    def _read(self) -> tuple[float, int, float]:
        return time.perf_counter(), self._counters.sent_bytes, self._counters.waited_seconds


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
