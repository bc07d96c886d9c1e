"""The process groups of a mesh beside the one its exchanges use: for collectives of the caller and of wrappers."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("data", "ring", "ulysses")


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Groups are made when they are first asked for, by the ranks that are in them alone.

    Attributes:
        ranks: ``[data, ring, ulysses]``, the ranks of the mesh as the world numbers them.
        sequence: the group of this rank's sequence.
        replicas: the group of the ranks that hold this rank's place in other sequences, where there is one already.
    """

    ranks: torch.Tensor
    sequence: dist.ProcessGroup
    replicas: dist.ProcessGroup | None = None

    @functools.cached_property
    def data(self) -> dist.ProcessGroup:
        """This rank's replicas; itself alone where there are none."""
        return self.replicas or self._along("data")

    @functools.cached_property
    def everyone(self) -> dist.ProcessGroup:
        """All ranks of the mesh."""
        world = dist.group.WORLD
        if world is not None and self.ranks.numel() == dist.get_world_size():
            return world
        return self.sequence if self.ranks.shape[0] == 1 else new_group(self.ranks.flatten().tolist())

    @functools.cached_property
    def device_mesh(self) -> DeviceMesh:
        """Dimensions ``data``, ``ring`` and ``ulysses``."""
        from torch.distributed.device_mesh import DeviceMesh

        within = [
            self.sequence if self.ranks.shape[1 + i] == self.ranks[0].numel() else self._along(axis)
            for i, axis in enumerate(AXES[1:])
        ]
        groups = [self.data, *within]
        return DeviceMesh.from_group(groups, self._device, mesh=self.ranks.contiguous(), mesh_dim_names=AXES)

    @functools.cached_property
    def flat_device_mesh(self) -> DeviceMesh:
        """One dimension of all ranks."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self.everyone, self._device, mesh_dim_names=("_".join(AXES),))

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend(self.sequence) == "nccl" else "cpu"

    def _along(self, axis: str) -> dist.ProcessGroup:
        """The group of the ranks that differ from this one on this axis alone."""
        here = (self.ranks == dist.get_rank()).nonzero()[0]
        index = [slice(None) if name == axis else int(place) for name, place in zip(AXES, here, strict=True)]
        return new_group(self.ranks[tuple(index)].tolist())


def new_group(
    members: Sequence[int], limit: datetime.timedelta | None = None, backend: str | None = None
) -> dist.ProcessGroup:
    """A process group of these ranks of the world, in this order, made by them alone: they wait for no others.

    torch names a group by how many groups a rank is in already, and waits for ever where members differ in that. This
    one is named by its members, and by how many of the same they have made.
    """
    from torch.distributed.distributed_c10d import _get_default_store, _new_process_group_helper, _world

    default, store, me = dist.distributed_c10d._get_default_group(), _get_default_store(), dist.get_rank()
    name = f"ringattn/{hashlib.sha1(repr(list(members)).encode(), usedforsecurity=False).hexdigest()}"
    group, _ = _new_process_group_helper(
        len(members),
        members.index(me),
        list(members),
        dist.Backend(backend or dist.get_backend()),
        store,
        dist.distributed_c10d.GroupName(f"{name}/{store.add(f'{name}/made by {me}', 1)}"),
        timeout=limit or timeout_of(default),
        device_id=default.bound_device_id,
    )
    _world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(members)}
    made: dist.ProcessGroup = group
    return made


def timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    """Within which a wait for another rank of the group ends."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    limit: datetime.timedelta = group._get_backend(device).options._timeout
    return limit
