"""Local: one rank, nothing to exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ringattn.errors import TransportError
from ringattn.transports.base import Message, Transport


class Local(Transport):
    """The transport of a single process."""

    def __init__(self) -> None:
        super().__init__("local", rank=0, size=1, agreement=False)

    def refusal(self, device: torch.device) -> str | None:
        return None

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        raise TransportError("A single rank has nobody to exchange with.")
