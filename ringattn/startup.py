"""`init`: the mesh of a process, from its launcher's environment."""

from __future__ import annotations

import datetime
import importlib.util
import os
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from ringattn.checking import MAX_RANKS, integer, number, shown
from ringattn.errors import InputError, TransportError
from ringattn.groups import Groups, new_group
from ringattn.meeting import Meeting, agree_over
from ringattn.mesh import Mesh
from ringattn.profile import Profile
from ringattn.rendezvous import Launch
from ringattn.transports.mpi import Mpi
from ringattn.transports.torch_distributed import TorchDistributed

TRANSPORTS = ("auto", "local", "gloo", "nccl", "mpi")
LONGEST = 10**9  # seconds, some thirty years: beyond, torch's own clocks overflow
PATIENCE = 60  # seconds, of a rank that refuses its own timeout


def init(
    ring: int | None = None,
    ulysses: int = 1,
    *,
    transport: Literal["auto", "local", "gloo", "nccl", "mpi"] = "auto",
    timeout: float = 600.0,
    agreement: bool | Literal["auto"] = "auto",
    profile: str | Path | None = None,
    node: int | None = None,
) -> Mesh:
    """The mesh of this process. Every rank calls it; one process needs no launcher.

    Reads the environment of torchrun, deepspeed, mpirun, srun, Kubernetes or SkyPilot, as `ringattn.rendezvous` says;
    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT win where they are set. A default process group that is
    already initialised is adopted, and never destroyed. The ranks that share a sequence get a group of their own, so
    that the exchanges never meet the caller's collectives.

    Args:
        ring: ranks on the ring axis; None for all that ``ulysses`` leaves. ``ring * ulysses`` must divide the world,
            what is left is the data axis.
        ulysses: ranks on the ulysses axis.
        transport: ``auto`` takes NCCL when there is a GPU, else MPI under mpirun and Gloo under other launchers;
            ``local`` is one process. ``mpi`` needs no torch.distributed, and has the whole job end when one rank fails.
        timeout: seconds after which a wait for another rank is an error; at most 10^9.
        agreement: whether the ranks compare every call before its payload moves; on NCCL over a Gloo group of the same
            ranks, while the GPU works. ``auto`` is True.
        profile: a file of ``ringattn doctor --profile``, which rank 0 reads: ``auto`` chooses schedules by its links
            and kernels by its rates, on all ranks alike.
        node: how many neighbouring ranks of the world share a node, whose links are faster; None to go by the names of
            their hosts, where each has as many.

    Raises:
        InputError: an argument is wrong, the axes do not divide the world, the environment is incomplete, or rank 0
            cannot read the profile.
        AgreementError: the ranks start with different arguments, or one of them refuses its own; on all of them.
        TransportError: the ranks do not find each other within the timeout.

    >>> init().axes
    {'data': 1, 'ring': 1, 'ulysses': 1}
    """
    refusal = _refusal(ring, ulysses, transport, timeout, agreement, profile, node)
    if not isinstance(transport, str):
        transport = "auto"  # by which the others, if there are any, hear that this rank refuses
    launch = Launch.found({} if transport == "local" or dist.is_initialized() else os.environ)
    read = None
    if refusal is None and profile is not None and (dist.get_rank() if dist.is_initialized() else launch.rank) == 0:
        try:
            read = Profile.read(Path(profile))
        except InputError as error:  # which all ranks will hear of
            refusal = error
    limit = datetime.timedelta(seconds=PATIENCE if refusal else float(timeout))
    given = {"ring": ring, "ulysses": ulysses, "transport": transport, "agreement": agreement, "profile": profile}
    given["node"] = node
    mesh = _started(launch, given, refusal, limit)
    return mesh if profile is None else _profiled(mesh, read)


def _started(launch: Launch, given: Mapping[str, Any], refusal: InputError | None, limit: datetime.timedelta) -> Mesh:
    """The mesh of these arguments, on a transport that all ranks choose alike."""
    transport, launched = given["transport"], dist.is_initialized() or launch.started
    if refusal is not None and (transport == "local" or not launched):
        raise refusal
    if transport == "mpi" or (transport == "auto" and _takes_mpi(launch)):
        return _over_mpi(launch, given, refusal, limit)
    sizes = given["ring"], given["ulysses"]
    if transport == "local" or (transport == "auto" and not launched):
        _divide(1, *sizes)
        return Mesh.local()
    ranks = Meeting.found(launch, transport, limit).agree(given, refusal, socket.gethostname())
    if dist.is_initialized() and transport not in ("auto", dist.get_backend()):
        raise InputError(
            f"The default process group runs on {dist.get_backend()}; got transport={transport!r}. "
            f"Leave transport='auto' to adopt it."
        )
    node = ranks.node if given["node"] is None else given["node"]
    return _connected(_divide(ranks.world, *sizes), ranks, transport, given["agreement"] is not False, node)


def _profiled(mesh: Mesh, read: Profile | None) -> Mesh:
    """The mesh with what rank 0 has read, on all ranks, as far as it is of this world."""
    found, transport = Profile.shared(read, mesh.everyone), mesh.connected().name
    if mesh.size > 1 and (found.size, found.transport) != (mesh.size, transport):
        if mesh.rank == 0:
            warnings.warn(
                f"The profile is of {found.size} ranks over {found.transport}; these are {mesh.size} over {transport}: "
                f"auto goes by its kernels, and not by its links. Measure these by ringattn doctor --profile.",
                stacklevel=3,
            )
        found = found.without_links
    return mesh.profiled(found)


def _over_mpi(launch: Launch, given: Mapping[str, Any], refusal: InputError | None, limit: datetime.timedelta) -> Mesh:
    """The mesh of an MPI job. All ranks ask for the same, or learn in what they differ."""
    everyone = Mpi.start(limit)
    if launch.started and everyone.size != launch.world:
        raise InputError(
            f"{launch.launcher} started {launch.world} ranks, and MPI knows of {everyone.size}. Start with the mpirun "
            f"of the MPI library that mpi4py uses; MPI4PY_LIBMPI=PATH names another library than {Mpi.library()}."
        )
    found = agree_over(everyone, given, refusal, socket.gethostname())
    node = found if given["node"] is None else given["node"]
    sizes = _divide(everyone.size, given["ring"], given["ulysses"])
    everyone.agreement = given["agreement"] is not False
    own = everyone.among(_together(everyone.rank, sizes))
    everyone.close()
    return Mesh(sizes["ring"], sizes["ulysses"], sizes["data"], everyone.rank, own, node=node)


def _together(rank: int, sizes: Mapping[str, int]) -> list[int]:
    """The ranks that share a sequence with this one."""
    size = sizes["ring"] * sizes["ulysses"]
    return list(range(rank // size * size, (rank // size + 1) * size))


def _connected(sizes: dict[str, int], ranks: Meeting, transport: str, agreement: bool, node: int | None) -> Mesh:
    """The mesh of these axes, with a group for the ranks of this sequence. All ranks ask for the same."""
    try:
        if not dist.is_initialized():
            _start_default_group(transport, ranks)
        own = new_group(_together(ranks.rank, sizes), ranks.limit)
        news = ranks.news()
    except (RuntimeError, OSError) as error:  # of torch's groups and their stores, and of the connection to one
        raise TransportError(f"Rank {ranks.rank} could not be connected to the others: {error}") from error
    world = torch.arange(ranks.world).view(sizes["data"], sizes["ring"], sizes["ulysses"])
    between = TorchDistributed(own, agreement, news)
    return Mesh(**sizes, rank=ranks.rank, transport=between, groups=Groups(world, own), node=node)


def _start_default_group(transport: str, ranks: Meeting) -> None:
    backend = ("nccl" if torch.cuda.is_available() else "gloo") if transport == "auto" else transport
    if backend == "nccl":
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())  # srun may show each rank its own alone
    dist.init_process_group(backend, store=ranks.store, rank=ranks.rank, world_size=ranks.world, timeout=ranks.limit)


def _refusal(
    ring: Any, ulysses: Any, transport: Any, timeout: Any, agreement: Any, profile: Any, node: Any
) -> InputError | None:
    """What is wrong with the arguments, whatever the world."""
    try:
        if not isinstance(transport, str) or transport not in TRANSPORTS:
            raise InputError(f"transport must be 'auto', 'local', 'gloo', 'nccl' or 'mpi'; got {shown(transport)}.")
        if not isinstance(agreement, bool) and not (isinstance(agreement, str) and agreement == "auto"):
            raise InputError(f"agreement must be 'auto', True or False; got {shown(agreement)}.")
        if profile is not None and not isinstance(profile, (str, Path)):
            raise InputError(f"profile must be the path of a file, or None; got {shown(profile)}.")
        number(timeout, "timeout, a number of seconds,", above=0, most=LONGEST)
        for axis, size in (("ring", 1 if ring is None else ring), ("ulysses", ulysses)):
            integer(size, axis, least=1, below=MAX_RANKS + 1, needed="a number of ranks, at least one rank each")
        if node is not None:
            integer(node, "node", least=1, below=MAX_RANKS + 1, needed="a number of neighbouring ranks, or None")
    except InputError as error:
        return error
    return None


def _takes_mpi(launch: Launch) -> bool:
    """Whether MPI is what there is to talk with: its launcher, mpi4py, and no GPUs."""
    if launch.launcher != "mpirun" or torch.cuda.is_available():
        return False
    return importlib.util.find_spec("mpi4py") is not None


def _divide(world: int, ring: int | None, ulysses: int) -> dict[str, int]:
    """The axes' sizes in a world of this many ranks."""
    each = ulysses if ring is None else ring * ulysses
    if world % each:
        raise InputError(
            f"ring * ulysses must divide the world of {world} ranks; got ring={ring}, ulysses={ulysses}. "
            f"Start a multiple of {each} ranks, or change the axes."
        )
    return {
        "ring": world // ulysses if ring is None else ring,
        "ulysses": ulysses,
        "data": world // each if ring else 1,
    }
