"""The sdpa kernel: PyTorch's own flash attention, through aten, on CPUs and on CUDA.

What PyTorch's kernels do, as measured: grouped heads natively; any strides but the last; the log-sum-exp of every
query; a backward pass that is exact for a block when it is given the *global* output and log-sum-exp, and computes
``rowsum(dO o O)`` itself. They know full and square causal blocks, which `lowering` makes of any band.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ringattn.bands import INF
from ringattn.kernels.base import Kernel
from ringattn.kernels.lowering import CAUSAL, FLIPPED, FULL, Batch, TileView, flipped, lower, tile_views
from ringattn.mechanisms.base import Gradients, OutputGrad, Params, Problem, State
from ringattn.mechanisms.softmax import Softmax
from ringattn.plans.tiles import Tiles

KNOWN = ("scale", "sinks", "seed")  # fields of Softmax: sinks come in when all blocks are merged, seeds with dropout
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
        for term in problem.mechanism.beyond(KNOWN):
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
        if state is not None:
            batches = tiles.memo(lower, *_forward_limits(problem))
        else:
            covering, batches = tiles.memo(_led, *_forward_limits(problem), q.shape[2])
            # what covers every query once is the state so far: nothing to merge it with
            state = _begun(problem, covering, q, k, v) if covering else problem.mechanism.empty(problem, q.shape[2])
        for batch in batches:
            for queries, part in _parts(problem, batch, q, k, v):
                problem.mechanism.merge(tuple(queries(x) for x in state), part)
        return state

    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        gradients: Triple,
        dparams: Params,
    ) -> None:
        if not problem.wants("q", "k", "v"):
            return
        dlse = output_grad.grad_extras[0]
        for batch in tiles.memo(lower, *_backward_limits(problem)):
            for queries, keys in tile_views(batch, problem.batch):
                inputs = [queries(q), keys(k), keys(v), *(queries(x) for x in (*output_grad.saved, output_grad.dout))]
                inputs += [] if dlse is None else [queries(dlse)]
                if batch.kind == FLIPPED:
                    inputs = list(flipped(inputs))
                parts = _backward(problem, *inputs, causal=batch.kind != FULL)
                for total, place, part in zip(gradients, (queries, keys, keys), parts, strict=True):
                    if part is not None:
                        place(total).add_(part.flip(2) if batch.kind == FLIPPED else part)

    def __str__(self) -> str:
        return "sdpa"


def _led(tiles: Tiles, leaf: int, most: int, rows: int) -> tuple[Batch | None, list[Batch]]:
    """A batch whose pieces take each of so many queries once, if there is one, and the others."""
    batches = lower(tiles, leaf, most)
    for at, batch in enumerate(batches):
        behind = batch.count == 1 or batch.q_next == batch.m
        if batch.q == 0 and batch.q_step == 1 and behind and batch.m * batch.count == rows:
            return batch, batches[:at] + batches[at + 1 :]
    return None, batches


def _begun(problem: Problem, batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
    """The state after one batch that takes every query once."""
    parts = [part for _, part in _parts(problem, batch, q, k, v)]
    if batch.count == 1:
        return tuple(x.to(problem.accumulator).transpose(1, 2).contiguous().transpose(1, 2) for x in parts[0])
    # pieces [count, heads, m, ...] lie behind one another in the sequence they are of
    joined = (torch.stack(pieces).to(problem.accumulator) for pieces in zip(*parts, strict=True))
    return tuple(x.transpose(2, 3).flatten(1, 2).transpose(1, 2) for x in joined)


def _parts(
    problem: Problem, batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[TileView, State]]:
    """The launches of a batch: where their queries lie, the output and the log-sum-exp."""
    for queries, keys in tile_views(batch, problem.batch):
        inputs = queries(q), keys(k), keys(v)
        if batch.kind == FLIPPED:
            yield queries, flipped(_forward(problem, *flipped(inputs), causal=True))
        else:
            yield queries, _forward(problem, *inputs, causal=batch.kind == CAUSAL)


def _forward(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> State:
    """The output and log-sum-exp of one launch."""
    scale = _scale(problem)
    if problem.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            q, k, v, 0.0, causal, scale=scale
        )
    results = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return results[0], results[1]


def _backward(
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
) -> Gradients:
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
) -> Triple:
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
