"""The ranks that make a checkpoint together: what one of them cannot do is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ringattn.checking import instance
from ringattn.errors import CheckpointError, UnsupportedError
from ringattn.mesh import Mesh
from ringattn.runtime.agreement import gathered
from ringattn.transports.base import Transport

T = TypeVar("T")


class Ranks:
    """All ranks of a mesh, over whatever joins them.

    Args:
        transport: what joins them, if not `Mesh.everyone`.

    Attributes:
        rank: this one, among them.
    """

    def __init__(self, mesh: Mesh, transport: Transport | None = None) -> None:
        self._mesh = instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns")
        self._transport = mesh.everyone if transport is None else transport
        self.rank = self._transport.rank

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, by rank. A plain one, for it is pickled."""
        return [value] if self._transport.size == 1 else gathered(self._transport, value, "a checkpoint")

    def together(self, do: Callable[[], T]) -> T:
        """What this rank makes of it, when all ranks have done it.

        Raises:
            CheckpointError: another rank could not; names it. A rank that could not raises its own error.
        """
        error: Exception | None = None
        try:
            own = do()
        except OSError as caught:
            error = CheckpointError(f"The disk says: {caught}.")
        except Exception as caught:
            error = caught
        failed = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(failed):
            if text is not None:
                raise CheckpointError(f"Rank {rank} says {text}")
        return own

    def apart(self) -> Ranks:
        """The same ranks, for a thread of its own: its messages never meet those of training. All ranks ask.

        Raises:
            UnsupportedError: these ranks have no second way to each other.
        """
        if self._transport.size == 1:
            return self
        if self._transport.name == "simulator":
            raise UnsupportedError(
                "Virtual ranks take turns and save nothing in a thread beside; leave background out."
            )
        return Ranks(self._mesh, self._mesh.beside)
