"""Who takes part: functions that prepare a case on a rank, to be sent to a `Team`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from ringattn.advice.comparison import schedules_for
from ringattn.kernels import MEMBERS
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.softmax import Softmax
from ringattn.naming import by_name
from ringattn.schedules import MEMBERS as SCHEDULES
from scripts.benchmarks.cases import Case
from scripts.benchmarks.teams import Team, Worker

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Results = list[NDArray[np.float32]]
"""out and, with a backward, dq, dk, dv: this rank's tokens in the order of `positions`, [1, heads, tokens, dim]."""


@dataclass(frozen=True)
class Contestant:
    name: str
    ranks: int
    threads: int
    prepare: Callable[[Worker, Case], NDArray[np.int64]]
    """Sets worker.prepared to one measured call and returns the positions of this rank's tokens."""
    token_dim: int = 2
    kernel: str | None = None
    """Of ringattn; None for the others, its peers."""
    transport: str = "gloo"
    schedule: str = "auto"

    @property
    def home(self) -> tuple[object, ...]:
        """What contestants that live in the same processes have in common."""
        return self.ranks, self.threads, self.transport, self.kernel is not None or self.name

    def team(self) -> Team:
        return Team(self.ranks, self.threads, transport=self.transport)


def keep(worker: Worker, name: str) -> None:
    """Keeps the call that was prepared last, for `choose`."""
    worker.kept[name] = worker.prepared


def choose(worker: Worker, name: str) -> None:
    """Has a call that was kept measured next."""
    worker.prepared = worker.kept[name]


def measured(attend: Attend, inputs: list[torch.Tensor], case: Case) -> Callable[[], list[torch.Tensor]]:
    """The call that is timed: forward, or forward and the gradients of q, k and v."""
    q, k, v, dout = inputs
    for x in (q, k, v):
        x.requires_grad_(case.backward)

    def call() -> list[torch.Tensor]:
        if not case.backward:
            with torch.no_grad():
                return [attend(q, k, v)]
        out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    return call


def collect(worker: Worker, token_dim: int) -> Results:
    """Runs what is prepared once and returns the results with tokens in dim 2, float32."""
    return [x.transpose(token_dim, 2).float().contiguous().numpy() for x in worker.prepared()]


def dense_bias(case: Case) -> torch.Tensor | None:
    """The mask as PyTorch's flash kernel takes it fastest, added to the scores; None where is_causal will do."""
    if case.mask_name == "causal":
        return None
    bias = torch.empty(case.length, case.length, dtype=case.dtype)
    for start in range(0, case.length, 1024):
        rows = torch.from_numpy(case.rows(start, min(start + 1024, case.length)))
        bias[start : start + 1024] = torch.where(rows, 0.0, -torch.inf)
    return bias


def prepare_sdpa(worker: Worker, case: Case) -> NDArray[np.int64]:
    """PyTorch's own attention on the whole sequence in one process."""
    bias = dense_bias(case)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)

    worker.prepared = measured(attend, case.inputs(), case)
    return np.arange(case.length)


def prepare_ulysses(worker: Worker, case: Case) -> NDArray[np.int64]:
    """DeepSpeed's Ulysses around the same kernel: heads for sequence and back, [1, tokens, heads, dim]."""
    logging.disable(logging.WARNING)  # its log goes to stdout
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    bias = dense_bias(case)

    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return out.transpose(1, 2)

    ulysses = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ulysses(q, k, v, 0)
        return out

    size = case.length // worker.size
    positions = np.arange(worker.rank * size, (worker.rank + 1) * size)
    inputs = [x[:, :, positions].transpose(1, 2).contiguous() for x in case.inputs()]
    worker.prepared = measured(attend, inputs, case)
    return positions


def prepare_ringattn(
    worker: Worker, case: Case, kernel: str = "auto", schedule: str = "auto", ulysses: int = 1
) -> NDArray[np.int64]:
    import ringattn

    mesh = worker.kept.get(f"mesh {ulysses}") or ringattn.init(ulysses=ulysses)
    worker.kept[f"mesh {ulysses}"] = mesh
    sharding = ringattn.Sharding(case.length, mesh, mask=case.mask)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ringattn.attention(q, k, v, case.mask, sharding=sharding, schedule=schedule, kernel=kernel)

    inputs = [sharding.split(x, 2).contiguous() for x in case.inputs()]
    worker.prepared = measured(attend, inputs, case)
    positions: NDArray[np.int64] = sharding.positions.numpy()
    return positions


def contestants(ranks: int) -> tuple[Contestant, ...]:
    """Everybody, on so many ranks of one thread each; PyTorch alone has one or two threads.

    ringattn comes last: every fast kernel by its name, every schedule by its name, and then what it chooses by itself,
    over MPI and over Gloo.
    """
    prepare = prepare_ringattn
    return (
        Contestant("SDPA, 1 thread", 1, 1, prepare_sdpa),
        Contestant("SDPA, 2 threads", 1, 2, prepare_sdpa),
        Contestant(f"DeepSpeed Ulysses, {ranks} ranks", ranks, 1, prepare_ulysses, token_dim=1),
        *(
            Contestant(f"ringattn {kernel}, {ranks} ranks", ranks, 1, partial(prepare, kernel=kernel), 2, kernel)
            for kernel in fast_kernels()
        ),
        *(_of_schedule(ranks, schedule, ulysses) for schedule, ulysses in schedules(ranks)),
        Contestant(f"ringattn over MPI, {ranks} ranks", ranks, 1, prepare, 2, "auto", "mpi"),
        Contestant(f"ringattn, {ranks} ranks", ranks, 1, prepare, 2, "auto"),
    )


def _of_schedule(ranks: int, schedule: str, ulysses: int) -> Contestant:
    axes = f" on {ranks // ulysses} x {ulysses}" * (ulysses > 1)
    prepare = partial(prepare_ringattn, schedule=schedule, ulysses=ulysses)
    return Contestant(f"ringattn {schedule}{axes}, {ranks} ranks", ranks, 1, prepare, 2, "auto", schedule=schedule)


def schedules(ranks: int) -> list[tuple[str, int]]:
    """The schedules that serve softmax, and on how many ulysses ranks: Ulysses on each number that divides them."""
    flat = [(name, 1) for name in schedules_for(Softmax())]
    if "ulysses" not in by_name(SCHEDULES):
        return flat
    return [*flat, *(("ulysses", size) for size in range(2, ranks + 1) if ranks % size == 0)]


def fast_kernels() -> list[str]:
    """The names of the kernels that compute softmax here, but for the one that does everything."""
    problem = Problem(Softmax(), 1, 1, 1, 64, 64, torch.float32, torch.device("cpu"))
    members = (member() for member in MEMBERS[:-1])
    return [str(kernel) for kernel in members if kernel.refusal(problem) is None]
