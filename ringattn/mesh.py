"""Mesh: the ranks of a run on named axes, and the transport between those that share a sequence."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ringattn.errors import InputError, UnsupportedError
from ringattn.transports.base import Transport
from ringattn.transports.local import Local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
        transport: exchanges between the ranks of this sequence; None on a mesh made for planning.
    """

    ring: int
    ulysses: int = 1
    data: int = 1
    rank: int = 0
    transport: Transport | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for axis, size in self.axes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"The {axis} axis needs at least one rank; got {size!r}.")
        if self.ulysses > 1:
            raise UnsupportedError(
                f"This version shards over the ring axis only; got ulysses={self.ulysses}. "
                f"Use ring={self.ring * self.ulysses}, ulysses=1."
            )
        if not 0 <= self.rank < self.size:
            raise InputError(f"A rank of this mesh is 0 to {self.size - 1}; got {self.rank}.")

    @classmethod
    def virtual(cls, ring: int, ulysses: int = 1, rank: int = 0, transport: Transport | None = None) -> Mesh:
        """A mesh of one sequence for planning or, with a transport, for a virtual rank."""
        return cls(ring=ring, ulysses=ulysses, rank=rank, transport=transport)

    @classmethod
    def local(cls) -> Mesh:
        """One process, one rank."""
        return cls(ring=1, transport=Local())

    @classmethod
    def from_device_mesh(cls, device_mesh: DeviceMesh, *, agreement: bool | None = None) -> Mesh:
        """The mesh of a one-dimensional torch ``DeviceMesh``, such as ``device_mesh["cp"]``.

        ``mesh.rank`` is then the rank within that mesh. ``agreement`` as in `ringattn.init`.
        """
        from ringattn.transports.torch_distributed import TorchDistributed

        if device_mesh.ndim != 1:
            raise InputError(
                f"A sequence is sharded over one mesh dimension; got {device_mesh.ndim} dimensions "
                f"{device_mesh.mesh_dim_names}. Pass one of them, as in device_mesh['cp']."
            )
        transport = TorchDistributed(device_mesh.get_group(), agreement)
        return cls(ring=transport.size, rank=transport.rank, transport=transport)

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
    def sequence_rank(self) -> int:
        """This rank among those that share its sequence."""
        return self.rank % self.sequence_size

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        data, rest = divmod(self.rank, self.sequence_size)
        ring, ulysses = divmod(rest, self.ulysses)
        return {"data": data, "ring": ring, "ulysses": ulysses}

    def __deepcopy__(self, _: dict[int, Any]) -> Mesh:
        """Itself: copies of a model still talk over the same transport."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "transport": None}

    def connected(self) -> Transport:
        """The transport, or an error on a mesh that was made for planning."""
        if self.transport is None:
            raise InputError(
                "This mesh has no transport: it was made for planning, or was unpickled. "
                "Use the mesh of ringattn.init(), ringattn.simulate or Mesh.from_device_mesh."
            )
        return self.transport
