"""What a rank measures with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from ringattn.diagnosis.computing import Trial, measured


def _nothing() -> None:
    """Where nobody looks on."""


@dataclasses.dataclass(frozen=True)
class Instruments:
    """A rank's clocks and its trial.

    Attributes:
        clock: seconds that pass, of this rank.
        wall: seconds of the day, which hosts should agree on.
        trial: how fast this rank computes on a device.
        advance: called after each of the steps that `examination.steps` counts.
    """

    clock: Callable[[], float] = time.perf_counter
    wall: Callable[[], float] = time.time
    trial: Callable[[torch.device], Trial] = measured
    advance: Callable[[], object] = _nothing
