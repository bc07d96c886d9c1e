"""`init`: the mesh of a process, from its launcher's environment."""

from __future__ import annotations

import datetime
import os
from typing import Literal

import torch
import torch.distributed as dist

from ringattn.errors import InputError
from ringattn.mesh import Mesh
from ringattn.transports.torch_distributed import TorchDistributed


def init(
    ring: int | None = None,
    ulysses: int = 1,
    *,
    transport: Literal["auto", "local", "gloo", "nccl"] = "auto",
    timeout: float = 600.0,
    agreement: bool | Literal["auto"] = "auto",
) -> Mesh:
    """The mesh of this process. Every rank calls it; one process needs no launcher.

    Reads torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). A default process group that is
    already initialised is adopted, and never destroyed. The ranks that share a sequence get a group of their own, so
    that the exchanges never meet the caller's collectives.

    Args:
        ring: ranks on the ring axis; None for all that ``ulysses`` leaves. ``ring * ulysses`` must divide the world,
            what is left is the data axis.
        ulysses: ranks on the ulysses axis.
        transport: ``auto`` takes NCCL when there is a GPU, else Gloo; ``local`` is one process.
        timeout: seconds after which a wait for another rank is an error.
        agreement: whether the ranks compare a digest of every call before its payload. ``auto``: on for Gloo, off for
            NCCL.

    Raises:
        InputError: the axes do not divide the world, or the environment is incomplete.

    >>> init().axes
    {'data': 1, 'ring': 1, 'ulysses': 1}
    """
    if transport not in ("auto", "local", "gloo", "nccl"):
        raise InputError(f"transport must be 'auto', 'local', 'gloo' or 'nccl'; got {transport!r}.")
    if timeout <= 0:
        raise InputError(f"timeout is a number of seconds above 0; got {timeout}.")
    launched = dist.is_initialized() or "WORLD_SIZE" in os.environ
    if transport == "local" or (transport == "auto" and not launched):
        _divide(1, ring, ulysses)
        return Mesh.local()
    limit = datetime.timedelta(seconds=timeout)
    if not dist.is_initialized():
        _start_default_group(transport, limit)
    elif transport not in ("auto", dist.get_backend()):
        raise InputError(
            f"The default process group runs on {dist.get_backend()}; got transport={transport!r}. "
            f"Leave transport='auto' to adopt it."
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = _divide(world, ring, ulysses)
    together = sizes["ring"] * sizes["ulysses"]
    groups = [
        dist.new_group(list(range(first, first + together)), timeout=limit) for first in range(0, world, together)
    ]
    on = None if agreement == "auto" else agreement
    return Mesh(**sizes, rank=rank, transport=TorchDistributed(groups[rank // together], on))


def _divide(world: int, ring: int | None, ulysses: int) -> dict[str, int]:
    """The axes' sizes in a world of this many ranks."""
    if ulysses < 1 or (ring is not None and ring < 1):
        raise InputError(f"ring and ulysses need at least one rank each; got ring={ring}, ulysses={ulysses}.")
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


def _start_default_group(transport: str, limit: datetime.timedelta) -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"transport={transport!r} needs a launcher's environment; {', '.join(missing)} is not set. "
            f"Start with torchrun --nproc-per-node N, or use transport='local'."
        )
    backend = ("nccl" if torch.cuda.is_available() else "gloo") if transport == "auto" else transport
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=limit)
