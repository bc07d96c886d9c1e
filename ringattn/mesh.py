"""Mesh: the ranks of a run on named axes, and the transport between those that share a sequence."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ringattn.checking import MAX_RANKS, flag, instance, integer, shown
from ringattn.errors import InputError
from ringattn.groups import AXES, Groups, new_group
from ringattn.plans.links import Links
from ringattn.profile import Profile
from ringattn.transports.base import Transport
from ringattn.transports.local import Local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


LIMIT = datetime.timedelta(minutes=30)  # of a wait beside all others: the slowest rank has written its part by then
_APART = {"transport": None, "groups": None}  # what a pickled mesh leaves behind


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Ranks on the axes ``data``, ``ring`` and ``ulysses``, the last one running fastest.

    Ranks that differ only in ``ring`` and ``ulysses`` share a sequence; those along ``data`` hold replicas. A mesh
    is a value: it pickles without its transport, so that a data-loader worker can plan with it.

    Attributes:
        ring: ranks on the ring axis.
        ulysses: ranks on the ulysses axis.
        data: replicas; the world is ``data * ring * ulysses`` ranks.
        rank: this rank, in the world.
        transport: between the ranks of this sequence; None on a mesh made for planning.
        profile: what was measured of the world's ranks, for ``auto``; None where nothing was.
        groups: the process groups of `data_group` and `device_mesh`; None where they follow from the transport.
        node: how many neighbouring ranks of the world share a node, whose links are faster; None where all do, or it
            is not known.
    """

    ring: int
    ulysses: int = 1
    data: int = 1
    rank: int = 0
    transport: Transport | None = dataclasses.field(default=None, compare=False, repr=False)
    groups: Groups | None = dataclasses.field(default=None, compare=False, repr=False)
    node: int | None = None
    profile: Profile | None = dataclasses.field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for axis in ("data", "ring", "ulysses"):
            size = integer(
                getattr(self, axis),
                f"The {axis} axis needs at least one rank; it",
                least=1,
                below=MAX_RANKS + 1,
                needed="a number of ranks",
            )
            object.__setattr__(self, axis, size)
        if self.size > MAX_RANKS:
            raise InputError(f"A mesh has at most {MAX_RANKS} ranks; got {self.size}.")
        if self.node is not None:
            needed = "a number of neighbouring ranks, or None where all share one"
            object.__setattr__(self, "node", integer(self.node, "A node", least=1, below=MAX_RANKS + 1, needed=needed))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 0 <= self.rank < self.size:
            raise InputError(f"A rank of this mesh is 0 to {self.size - 1}; got {shown(self.rank)}.")
        if self.transport is not None:
            self._check_transport(self.transport)

    def _check_transport(self, transport: object) -> None:
        needed = "a ringattn transport, as a mesh of ringattn.init() has one, or None"
        size = instance(transport, Transport, "transport", needed).size
        if size != self.sequence_size:
            raise InputError(f"This transport joins {size} ranks; the mesh has {self.sequence_size} to a sequence.")

    @classmethod
    def virtual(
        cls, ring: int, ulysses: int = 1, rank: int = 0, node: int | None = None, *, transport: Transport | None = None
    ) -> Mesh:
        """A mesh of one sequence for planning or, with a transport, for a virtual rank."""
        return cls(ring=ring, ulysses=ulysses, rank=rank, transport=transport, node=node)

    @classmethod
    def local(cls) -> Mesh:
        """One process, one rank."""
        return cls(ring=1, transport=Local())

    @classmethod
    def from_device_mesh(
        cls,
        device_mesh: DeviceMesh,
        ring: str | None = None,
        ulysses: str | None = None,
        data: str | None = None,
        *,
        agreement: bool = True,
    ) -> Mesh:
        """The mesh of a torch ``DeviceMesh``, given the names of its dimensions. One of one dimension needs none.

        ``Mesh.from_device_mesh(device_mesh, ring="cp", ulysses="sp", data="dp")``; one of ``ring`` and ``ulysses`` is
        enough, and without a name the only dimension is the ring. Every dimension of more than one rank is named: a
        dimension that is left out would leave its ranks' gradients out of a sum over the mesh. To leave one out that
        has no replicas, as of tensor parallel ranks, pass the others, ``device_mesh["dp", "cp"]``, and their names.

        Args:
            ring, ulysses: the dimensions of the ranks that share a sequence.
            data: that of replicas.
            agreement: as in `ringattn.init`.

        Raises:
            InputError: a name is missing, unknown or given twice.

        Warns:
            UserWarning: one dimension of a larger mesh was passed without its name.
        """
        from torch.distributed.device_mesh import DeviceMesh

        from ringattn.transports.torch_distributed import TorchDistributed

        whole = instance(device_mesh, DeviceMesh, "device_mesh", "a torch DeviceMesh, as init_device_mesh makes it")
        names = _dimensions(whole, ring, ulysses, data)
        flag(agreement, "agreement")
        sizes = {axis: 1 if name is None else int(whole.size(_index(whole, name))) for axis, name in names.items()}
        if not any(names.values()):
            sizes["ring"] = int(whole.size())
        replica, replicas = 0, None
        if names["data"] is not None:
            replica = int(whole.get_local_rank(_index(whole, names["data"])))
            replicas = whole.get_group(_index(whole, names["data"]))
        ranks = _ranks(whole, names).reshape(*(sizes[axis] for axis in AXES))
        alone = next((axis for axis in ("ring", "ulysses") if sizes[axis] == ranks[0].numel()), None)
        own = whole.get_group(_index(whole, names[alone])) if alone else new_group(ranks[replica].flatten().tolist())
        transport = TorchDistributed(own, agreement)
        groups = Groups(ranks, transport.group, replicas)
        return cls(**sizes, rank=replica * transport.size + transport.rank, transport=transport, groups=groups)

    def profiled(self, profile: Profile) -> Mesh:
        """The same mesh, on which ``auto`` goes by a profile."""
        other = object.__new__(Mesh)
        other.__dict__.update(self.__dict__, profile=profile)
        return other

    @property
    def links(self) -> Links | None:
        """Those between the ranks of this sequence, where a profile has them."""
        first = self.rank - self.sequence_rank
        ranks = range(first, first + self.sequence_size)
        return None if self.profile is None else self.profile.links(ranks)

    @functools.cached_property
    def along_ring(self) -> Mesh:
        """This rank's ring alone, as a mesh of its own: the ranks of its sequence at its place on the ulysses axis.

        Its transport is a view of this one's, whose ranks have agreed already on what moves over it.
        """
        place = self.coordinates
        ranks = range(place["ulysses"], self.sequence_size, self.ulysses)
        transport = None if self.transport is None else self.transport.along(ranks)
        node = self.sequence_node
        if node is not None:  # of which groups that are in several nodes, or in parts of them, leave nothing together
            node = 1 if node % self.ulysses else node // self.ulysses
        return Mesh(self.ring, rank=place["ring"], transport=transport, node=node)

    @property
    def axes(self) -> dict[str, int]:
        """The size of every axis."""
        return {"data": self.data, "ring": self.ring, "ulysses": self.ulysses}

    @property
    def size(self) -> int:
        """All ranks of the mesh."""
        return self.data * self.sequence_size

    @property
    def sequence_size(self) -> int:
        """The ranks that share a sequence."""
        return self.ring * self.ulysses

    @property
    def sequence_node(self) -> int | None:
        """How many neighbouring ranks of any sequence share a node, where sequences may begin within nodes."""
        return self.node if self.node is None or self.data == 1 else math.gcd(self.node, self.sequence_size)

    @property
    def crosses_nodes(self) -> bool:
        """Whether the ranks that share a sequence are of several nodes, as far as that is known."""
        return self.sequence_node is not None and self.sequence_node < self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """This rank among those that share its sequence."""
        return self.rank % self.sequence_size

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        data, rest = divmod(self.rank, self.sequence_size)
        ring, ulysses = divmod(rest, self.ulysses)
        return {"data": data, "ring": ring, "ulysses": ulysses}

    @functools.cached_property
    def everyone(self) -> Transport:
        """Between all ranks of the mesh, for sums over all of them: gradients, the loss.

        Made when it is first asked for, which all of them do together.

        Raises:
            InputError: the mesh has no transport.
        """
        return self.connected() if self.data == 1 else self.connected().among(self._world.flatten().tolist())

    @functools.cached_property
    def beside(self) -> Transport:
        """Between all ranks too, of CPU tensors, for a thread of its own: its messages never meet those of others.

        Made as `everyone` is.

        Raises:
            TransportError: these ranks have no second way to each other: they are virtual.
        """
        return self.everyone.control.among(self._world.flatten().tolist(), LIMIT)

    @functools.cached_property
    def replicas(self) -> Transport:
        """Between this rank's replicas: the ranks with the same place in other sequences. Made as `everyone` is."""
        own = self.connected()
        if self.data == 1:
            return Local()
        return own.among(self._world.flatten(1)[:, self.sequence_rank].tolist())

    @property
    def _world(self) -> torch.Tensor:
        """``[data, ring, ulysses]``: the ranks of this mesh as the world numbers them."""
        sizes = (self.data, self.ring, self.ulysses)
        return torch.arange(self.size).view(sizes) if self.groups is None else self.groups.ranks

    @property
    def data_group(self) -> ProcessGroup:
        """The torch process group of this rank's replicas: the ranks with the same place in other sequences.

        Made when it is first asked for, which all of them do together. Of this rank alone where there is no data axis.

        Raises:
            InputError: the mesh is not one of torch.distributed: one process, virtual ranks, or made for planning.
        """
        return self._distributed().data

    def device_mesh(self, *, flat: bool = False) -> DeviceMesh:
        """The torch ``DeviceMesh`` of these ranks, of dimensions ``data``, ``ring`` and ``ulysses``.

        FSDP2 needs one that holds the ranks of a sequence: each has gradients of its own tokens. ``fully_shard(model,
        mesh=mesh.device_mesh(flat=True))`` shards over all ranks, ``mesh.device_mesh()["data", "ring"]`` over the ring
        with a copy for each replica (HSDP), where the ulysses axis has one rank.

        Args:
            flat: one dimension, of all ranks.

        Raises:
            InputError: the mesh is not one of torch.distributed: one process, virtual ranks, or made for planning.
        """
        groups = self._distributed()
        return groups.flat_device_mesh if flat else groups.device_mesh

    def _distributed(self) -> Groups:
        from ringattn.transports.torch_distributed import TorchDistributed

        if self.groups is None and self.data == 1 and isinstance(self.transport, TorchDistributed):
            ranks = torch.tensor(torch.distributed.get_process_group_ranks(self.transport.group))
            object.__setattr__(self, "groups", Groups(ranks.view(1, self.ring, self.ulysses), self.transport.group))
        if self.groups is None:
            raise InputError(
                "This mesh has no process groups of torch.distributed: it is one process, simulated, or made for "
                "planning. Use the mesh of ringattn.init() under a launcher, or of Mesh.from_device_mesh."
            )
        return self.groups

    def __deepcopy__(self, _: dict[int, Any]) -> Mesh:
        """Itself: copies of a model still talk over the same transport."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | _APART

    def connected(self) -> Transport:
        """The transport, or an error on a mesh that was made for planning."""
        if self.transport is None:
            raise InputError(
                "This mesh has no transport: it was made for planning, or was unpickled. "
                "Use the mesh of ringattn.init(), ringattn.simulate or Mesh.from_device_mesh."
            )
        return self.transport


def _dimensions(
    device_mesh: DeviceMesh, ring: str | None, ulysses: str | None, data: str | None
) -> dict[str, str | None]:
    """The name of the dimension of each axis, None where it has none; the only one may have no name."""
    known, names = device_mesh.mesh_dim_names or (), {"ring": ring, "ulysses": ulysses, "data": data}
    listed = ", ".join(map(repr, known)) or "none"
    given = [name for name in names.values() if name is not None]
    if not given and device_mesh.ndim == 1:
        _say_what_is_left_out(device_mesh)
        return names
    if not (isinstance(ring, str) or (ring is None and isinstance(ulysses, str))):
        raise InputError(
            f"ring must name the dimension of the ranks that share a sequence, one mesh dimension; got "
            f"{device_mesh.ndim}, {listed}, ring={shown(ring)}, and no ulysses, which may name another or the only one."
        )
    for name in given:
        if name not in known:
            raise InputError(f"The DeviceMesh has no dimension {shown(name)}; it has {listed}.")
        if given.count(name) > 1:
            raise InputError(f"The dimension {name!r} is named twice; each is one axis.")
    for name in known:
        if name not in given and device_mesh[name].size() > 1:
            raise InputError(
                f"The dimension {name!r} of {device_mesh[name].size()} ranks is not named: give it as ring, ulysses or "
                f"data, or pass a mesh without it, as in device_mesh[{', '.join(map(repr, given))}]."
            )
    return names


def _say_what_is_left_out(device_mesh: DeviceMesh) -> None:
    """A warning where this is one dimension of a larger mesh: whether the others hold replicas is not known."""
    known, larger = device_mesh.mesh_dim_names or (), device_mesh._get_root_mesh()
    others = [name for name in larger.mesh_dim_names or () if name not in known and larger[name].size() > 1]
    if others:
        warnings.warn(
            f"This is one dimension of a mesh that has {', '.join(map(repr, others))} too, whose ranks are no replicas "
            f"to ringattn: sums over this mesh leave them out. Pass the whole mesh and the names of its dimensions, as "
            f"in Mesh.from_device_mesh(device_mesh, ring='cp', data='dp'); or say that you mean these ranks alone, by "
            f"ring={known[0]!r}.",
            stacklevel=4,
        )


def _index(device_mesh: DeviceMesh, name: str | None) -> int:
    """The dimension of this name, or the only one."""
    return 0 if name is None else (device_mesh.mesh_dim_names or ()).index(name)


def _ranks(device_mesh: DeviceMesh, names: dict[str, str | None]) -> torch.Tensor:
    """The world's ranks of the named dimensions, in the order of our axes, where this rank is on the others."""
    named = [names[axis] for axis in AXES if names[axis] is not None]
    if not named:
        return device_mesh.mesh
    known = [name for name in device_mesh.mesh_dim_names or () if name in named]
    part = device_mesh[tuple(known)].mesh
    return part.permute([known.index(name) for name in named if name is not None])
