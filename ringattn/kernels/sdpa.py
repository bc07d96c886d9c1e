"""The sdpa kernel: PyTorch's own flash attention, through aten, on CPUs and on CUDA.

What PyTorch's kernels do, as measured: grouped heads natively; any strides but the last; the log-sum-exp of every
query; a backward pass that is exact for a block when it is given the *global* output and log-sum-exp, and computes
``rowsum(dO o O)`` itself. They know full and square causal blocks, which `lowering` makes of any band.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ringattn.bands import INF
from ringattn.kernels.base import Kernel
from ringattn.kernels.lowering import CAUSAL, FLIPPED, FULL, Launch, launches, lower, lowered
from ringattn.mechanisms.base import InputGrads, OutputGrad, Params, Problem, State
from ringattn.mechanisms.softmax import Softmax
from ringattn.plans.tiles import Tiles

COMPUTED = ("scale", "sinks", "seed")
"""Fields of Softmax; sinks come in when all blocks are merged, seeds with dropout."""


@dataclasses.dataclass(frozen=True)
class Sdpa(Kernel):
    """PyTorch's flash kernels."""

    def supports(self, problem: Problem) -> bool:
        return isinstance(problem.mechanism, Softmax)

    def refusal(self, problem: Problem) -> str | None:
        if type(problem.mechanism) is not Softmax:  # what is made of it may change anything
            return f"sdpa computes Softmax itself; got {problem.mechanism}"
        if problem.allows is not None:
            return "sdpa knows bands of pairs; the mask holds a predicate"
        for term in problem.mechanism.beyond(COMPUTED):
            return f"sdpa has no {term}: PyTorch's flash kernels do not take it, or give no gradient for it"
        if _scale(problem) <= 0:
            # the CPU kernel scales after it masks: -inf * 0 is nan, and -inf * -1 is inf
            return f"sdpa needs a scale above 0; got {_scale(problem)}"
        if problem.dim != problem.value_dim:
            return f"sdpa needs value heads as wide as query heads; got D={problem.dim}, Dv={problem.value_dim}"
        if problem.device.type == "cpu":
            return None
        if problem.device.type != "cuda":
            return f"sdpa runs on CPUs and CUDA; got {problem.device}"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return f"sdpa on CUDA takes bfloat16 and float16; got {problem.dtype}"
        if problem.dim % 8 or problem.dim > 256:
            return f"sdpa on CUDA takes heads of a multiple of 8 dims, 256 at most; got D={problem.dim}"
        return None

    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        limits = _forward_limits(problem)
        if state is None:
            first, others = tiles.memo(_first_and_others, *limits, problem.batch, q.shape[2])
            state = _first_state(problem, first, q, k, v) if first else problem.mechanism.empty(problem, q.shape[2])
        else:
            others = tiles.memo(lowered, *limits, problem.batch)
        for launch in others:
            part = _attended(problem, launch, q, k, v)
            problem.mechanism.merge(tuple([launch.queries(x) for x in state]), part)
        return state

    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dparams: Params,
    ) -> None:
        if not problem.wants("q", "k", "v"):
            return
        (out, lse), dlse = output_grad.saved, output_grad.grad_extras[0]
        for launch in tiles.memo(lowered, *_backward_limits(problem), problem.batch):
            queries, keys = launch.queries, launch.keys
            inputs = [queries(q), keys(k), keys(v), queries(out), queries(lse), queries(output_grad.dout)]
            inputs += [] if dlse is None else [queries(dlse)]
            kind = launch.group.kind
            if kind == FLIPPED:
                inputs = [x.flip(2) for x in inputs]
            parts = _launch_grad(problem, *inputs, causal=kind != FULL)
            for total, rows, part in zip(gradients, (queries, keys, keys), parts, strict=True):
                if part is not None:
                    rows(total).add_(part.flip(2) if kind == FLIPPED else part)


def _first_and_others(
    tiles: Tiles, min_block: int, max_rows: int, sequences: int, rows: int
) -> tuple[list[Launch], list[Launch]]:
    """The launches of one group that takes each of so many queries once, if there is one, and all others.

    What it returns is the state so far: there is nothing to merge it with.
    """
    groups = lower(tiles, min_block, max_rows)
    for at, x in enumerate(groups):
        adjacent = x.count == 1 or x.q_next == x.m
        if x.q == 0 and x.q_step == 1 and adjacent and x.m * x.count == rows:
            return launches([x], sequences), launches(groups[:at] + groups[at + 1 :], sequences)
    return [], launches(groups, sequences)


def _first_state(
    problem: Problem, launched: Sequence[Launch], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> State:
    """The state after one group that takes every query once."""
    parts = [_attended(problem, launch, q, k, v) for launch in launched]
    if launched[0].group.count == 1:
        return tuple([x.to(problem.accumulator).transpose(1, 2).contiguous().transpose(1, 2) for x in parts[0]])
    # rectangles [count, heads, m, ...] lie behind one another in the sequence they are of
    joined = (torch.stack(each).to(problem.accumulator) for each in zip(*parts, strict=True))
    return tuple(x.transpose(2, 3).flatten(1, 2).transpose(1, 2) for x in joined)


def _attended(problem: Problem, launch: Launch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
    """The output and log-sum-exp of one launch."""
    inputs, kind = [launch.queries(q), launch.keys(k), launch.keys(v)], launch.group.kind
    if kind != FLIPPED:
        return _flash(problem, *inputs, causal=kind == CAUSAL)
    # rows in reverse order: j >= i becomes j <= i
    return tuple([x.flip(2) for x in _flash(problem, *[x.flip(2) for x in inputs], causal=True)])


def _flash(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> State:
    scale = _scale(problem)
    if problem.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            q, k, v, 0.0, causal, scale=scale
        )
    results = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return results[0], results[1]


def _launch_grad(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    causal: bool,
) -> InputGrads:
    """The gradients of one launch. PyTorch's kernel computes all three, whatever is wanted."""
    dq, dk, dv = problem.wanted(*_flash_backward(problem, dout, q, k, v, out, lse, causal))
    if dlse is not None and problem.wants("q", "k"):
        # With V = 0, dO = dlse e_1 and O = -e_1, dO V^T - rowsum(dO o O) is dlse, so that dS = P o dlse.
        unit = torch.zeros_like(out)
        unit[..., 0] = 1
        more = _flash_backward(problem, unit * dlse.unsqueeze(-1), q, k, torch.zeros_like(v), -unit, lse, causal)
        dq, dk = (None if x is None else x + y for x, y in zip((dq, dk), more, strict=False))
    return dq, dk, dv


def _flash_backward(
    problem: Problem,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, dout = _scale(problem), dout.to(q.dtype)
    if problem.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    # Without dropout the random state is not read.
    state = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, *state, scale=scale
    )


def _forward_limits(problem: Problem) -> tuple[int, int]:
    """The largest square to leave on a diagonal, and the most rows of one launch.

    The CPU kernels compute blocks of 256 by 512 pairs along a diagonal. Squares of 128 save 2 % of a causal square of
    4,096 rows, merges counted. A launch of 4,096 rows is as fast as a larger one and returns a bounded part of the
    result.
    """
    return (128, 4096) if problem.device.type == "cpu" else (INF, INF)


def _backward_limits(problem: Problem) -> tuple[int, int]:
    """The same backward: in float32 squares of 128 save 4 %; in bfloat16 small launches cost more than they save."""
    if problem.device.type != "cpu":
        return INF, INF
    return 128 if problem.dtype in (torch.float32, torch.float64) else INF, 4096


def _scale(problem: Problem) -> float:
    assert isinstance(problem.mechanism, Softmax)
    return problem.mechanism.scale_for(problem)
