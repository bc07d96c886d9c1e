"""The ranks that make a checkpoint together: what one of them cannot do is an error on all."""

from __future__ import annotations

import datetime
import pickle
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ringattn.checking import instance
from ringattn.errors import CheckpointError
from ringattn.mesh import Mesh
from ringattn.transports.local import Local

T = TypeVar("T")
LIMIT = datetime.timedelta(minutes=30)  # within which the slowest rank has written its part


class Ranks:
    """All ranks of a mesh, or this process alone.

    Attributes:
        rank: this one, among them.
        group: None for one process.
    """

    def __init__(self, mesh: Mesh) -> None:
        instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns")
        alone = mesh.size == 1 and isinstance(mesh.transport, Local)
        self.group: dist.ProcessGroup | None = None if alone else mesh.device_mesh(flat=True).get_group()
        self.rank = 0 if self.group is None else dist.get_rank(self.group)

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

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
        """The same ranks, for a thread of its own: its messages never meet those of training. All ranks ask."""
        return self if self.group is None else _Apart(self)


class _Apart(Ranks):
    """A Gloo group beside torch's list of them, where names are given by how many groups a rank is in."""

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.group is not None
        self.group, self.rank = ranks.group, ranks.rank
        name, size = ranks.gathered(uuid.uuid4().hex)[0], dist.get_world_size(ranks.group)
        store = PrefixStore(f"ringattn/checkpoint/{name}", _get_default_store())
        self._own = dist.ProcessGroupGloo(store, dist.get_rank(ranks.group), size, LIMIT)

    def gathered(self, value: T) -> list[T]:
        raw = bytearray(pickle.dumps(value))
        lengths = [int(length) for length in self._all(torch.tensor([len(raw)]))]
        padded = torch.frombuffer(raw.ljust(max(lengths)), dtype=torch.uint8)
        every = self._all(padded)
        return [pickle.loads(row[:length].numpy().tobytes()) for row, length in zip(every, lengths, strict=True)]

    def _all(self, own: torch.Tensor) -> list[torch.Tensor]:
        every = [torch.empty_like(own) for _ in range(self._own.size())]
        self._own.allgather([every], [own]).wait()  # type: ignore[attr-defined]
        return every
