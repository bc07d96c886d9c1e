"""How fast a rank computes: every kernel on a few classes of problems, as ``auto`` would measure them."""

from __future__ import annotations

import dataclasses
import itertools
import time

import torch

from ringattn.functional import attention
from ringattn.kernels.base import Kernel
from ringattn.kernels.choice import chosen_kernel, contenders
from ringattn.kernels.machine import Machine
from ringattn.kernels.rates import Rates, Workload
from ringattn.kernels.store import Entry
from ringattn.kernels.trial import measure, pairs_of, problem_of
from ringattn.masks import Causal
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.softmax import Softmax
from ringattn.mesh import Mesh
from ringattn.sharding import Sharding

DTYPES = ("float32", "bfloat16")
SIDES = (256, 1024)  # of a trial's tiles: packed documents, and one long one
HEADS = (64, 128)
HEAD = HEADS[0]
GPU_LENGTH, GPU_HEADS, GPU_ROUNDS = 8192, 16, 3
PASSES = 3.5  # of a forward pass, that forward and backward together take


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a rank's processor can do.

    Attributes:
        kernel: the one that ``auto`` would take, for the first class of problems.
        gigaflops: its rate there, 10^9 floating-point operations a second.
        entries: the rates of all kernels on all classes, on a CPU; ``auto`` measures nowhere else.
    """

    kernel: str
    gigaflops: float
    entries: tuple[Entry, ...] = ()


def workloads() -> list[Workload]:
    """The classes, with a head for each thread."""
    heads = torch.get_num_threads()
    kinds = itertools.product((True, False), HEADS, DTYPES, SIDES)
    return [Workload("Softmax", dtype, dim, dim, heads, heads, side, back) for back, dim, dtype, side in kinds]


def able(workload: Workload) -> list[Kernel]:
    """The kernels that ``auto`` chooses among for this class on a CPU."""
    return contenders(problem_of(Softmax(), workload))


def measured(device: torch.device) -> Trial:
    """This rank's, while the other ranks measure theirs."""
    if device.type != "cpu":
        return _on_gpu(device)
    entries = tuple(Entry(Machine.here(able(x)), measure(able(x), Softmax(), x)) for x in workloads())
    best = entries[0].rates.best
    return Trial(best, gigaflops(entries[0].rates)[best], entries)


def gigaflops(rates: Rates) -> dict[str, float]:
    """Each kernel's rate, in 10^9 floating-point operations a second."""
    workload = rates.workload
    each = 2 * (workload.dim + workload.value_dim) * (PASSES if workload.backward else 1.0)
    return {name: pairs_of(workload) * each / seconds / 1e9 for name, seconds in rates.seconds}


def _on_gpu(device: torch.device) -> Trial:
    """One long causal sequence in bfloat16, forward and backward, by the kernel that ``auto`` takes."""
    sharding = Sharding(GPU_LENGTH, Mesh.local())
    q, k, v = (
        torch.randn(1, GPU_HEADS, GPU_LENGTH, HEAD, dtype=torch.bfloat16, device=device, requires_grad=True)
        for _ in range(3)
    )
    taken, _ = chosen_kernel("auto", Problem(Softmax(), 1, GPU_HEADS, GPU_HEADS, HEAD, HEAD, q.dtype, device))
    fastest = float("inf")
    for _ in range(GPU_ROUNDS + 1):  # the first compiles
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        out = attention(q, k, v, Causal(), sharding=sharding)
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    pairs = GPU_LENGTH * (GPU_LENGTH + 1) // 2 * GPU_HEADS
    return Trial(str(taken), pairs * 4 * HEAD * PASSES / fastest / 1e9)
