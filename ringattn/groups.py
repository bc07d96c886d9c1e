"""The process groups of a mesh beside the one its exchanges use: for collectives of the caller and of wrappers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _world

from ringattn.checking import shown
from ringattn.errors import InputError

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
        return self.sequence if self.ranks.shape[0] == 1 else _group(self.ranks.flatten())

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
        return _group(self.ranks[tuple(index)])


def _group(ranks: torch.Tensor) -> dist.ProcessGroup:
    members: list[int] = ranks.tolist()
    if len(members) > 1:
        _compare_names(members)
    group: dist.ProcessGroup = dist.new_group(members, use_local_synchronization=True)
    return group


def _compare_names(members: list[int]) -> None:
    """Raises where torch would wait for ever: it names a group by how many groups a rank is in already.

    Every member leaves its number in the store; the last one to come lets all of them look.
    """
    store, size, held = _get_default_store(), len(members), len(_world.pg_names)
    key = f"ringattn/groups/{hashlib.sha1(repr(members).encode(), usedforsecurity=False).hexdigest()}"
    key = f"{key}/{store.add(f'{key}/calls of {dist.get_rank()}', 1)}"
    store.add(f"{key}/in {held}", 1)
    if store.add(f"{key}/here", 1) == size:
        store.set(f"{key}/all", "")
    store.wait([f"{key}/all"])
    if store.add(f"{key}/in {held}", 0) != size:
        raise InputError(
            f"Ranks {shown(members)} of torch.distributed cannot make a group: they are in different numbers of groups "
            f"already (this one in {held}), by which torch names the next. Ask for mesh.device_mesh() and "
            f"mesh.data_group right after the mesh is made, before groups that only some of its ranks are in."
        )
