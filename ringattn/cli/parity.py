"""Attention of random inputs on some ranks, compared with the float64 oracle: what `simulate` and `verify` share.

Errors are in units of the arrays A of `ringattn.reference`: the same formula with every factor absolute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

import ringattn
from ringattn import reference
from ringattn.errors import InputError
from ringattn.masks import Mask
from ringattn.mechanisms.base import Mechanism
from ringattn.mechanisms.hard import Hard
from ringattn.mechanisms.linear import Linear
from ringattn.mechanisms.softmax import Softmax
from ringattn.mesh import Mesh

NAMES = ("out", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention call: q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] under a mask."""

    mask: Mask
    length: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    backward: bool
    seed: int
    mechanism: Mechanism = Softmax()  # noqa: RUF009 (an immutable value)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise InputError(
                f"Query heads must be a multiple of key heads; got {self.heads} and {self.kv_heads}. "
                f"Use --kv-heads {self.heads}, or a divisor of it."
            )

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output, the same on every rank for one seed."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.heads, self.dim),
            (self.kv_heads, self.dim),
            (self.kv_heads, self.value_dim),
            (self.heads, self.value_dim),
        )
        # drawn in float32, so that the dtypes see the same numbers up to rounding
        return [
            torch.randn(self.batch, heads, self.length, dim, generator=generator).to(self.dtype)
            for heads, dim in shapes
        ]

    def rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        return self.mask.dense(np.arange(start, stop), np.arange(self.length)).numpy()

    def expected(self, seen: Callable[[int], None] = lambda _: None) -> reference.Evaluation:
        """The oracle's results; `seen` is told each row it has come to."""

        def rows(start: int, stop: int) -> NDArray[np.bool_]:
            seen(start)
            return self.rows(start, stop)

        q, k, v, dout = (x.double().numpy() for x in self.inputs())
        oracles = {Softmax: reference.evaluate, Hard: reference.hard, Linear: reference.linear}
        return oracles[type(self.mechanism)](q, k, v, rows, dout if self.backward else None)


@dataclasses.dataclass(frozen=True)
class Part:
    """One rank's results: out and, with a backward, dq, dk, dv, each [B, H, tokens, dim], and where they belong."""

    positions: torch.Tensor
    tensors: list[torch.Tensor]


def attend(
    mesh: Mesh,
    problem: Problem,
    layout: str,
    schedule: str,
    inputs: Sequence[torch.Tensor],
    device: str = "cpu",
) -> Part:
    """The call on this rank of a mesh, given the full inputs."""
    sharding = ringattn.Sharding(problem.length, mesh, layout=layout, mask=problem.mask)
    q, k, v, dout = (sharding.split(x, 2).to(device) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_(problem.backward)
    out = ringattn.attention(q, k, v, problem.mask, sharding=sharding, schedule=schedule, mechanism=problem.mechanism)
    gradients = torch.autograd.grad(out, (q, k, v), dout) if problem.backward else ()
    return Part(sharding.positions, [x.detach().cpu() for x in (out, *gradients)])


def joined(parts: Sequence[Part]) -> list[torch.Tensor]:
    """The whole results from every rank's part."""
    order = torch.argsort(torch.cat([part.positions for part in parts]))
    return [torch.cat(tensors, 2)[:, :, order] for tensors in zip(*(p.tensors for p in parts), strict=True)]


def errors(results: Sequence[torch.Tensor], expected: reference.Evaluation) -> dict[str, float]:
    """By name; only of what was computed."""
    gradients, sizes = expected.gradients, expected.magnitudes
    exact = (expected.out, gradients.dq, gradients.dk, gradients.dv)
    magnitudes = (sizes.out, sizes.dq, sizes.dk, sizes.dv)
    return {
        name: reference.error(actual.double().numpy(), wanted, size)
        for name, actual, wanted, size in zip(NAMES, results, exact, magnitudes, strict=False)
    }


def limits(problem: Problem, ranks: int, expected: reference.Evaluation) -> dict[str, float]:
    """The largest errors allowed, by name.

    float32: 1e-6, and 3e-6 from 64 ranks on, whose merges add up; float64 in proportion to its precision.
    Half precision: twice the error in one piece on the same inputs, of PyTorch's own kernel where it has one.
    """
    names = NAMES if problem.backward else NAMES[:1]
    if problem.dtype in (torch.float32, torch.float64):
        precision = torch.finfo(problem.dtype).eps / torch.finfo(torch.float32).eps
        # float64 inputs leave the oracle no precision to spare: it rounds as much as what it judges
        limit = (1e-6 if ranks < 64 else 3e-6) * precision * (10 if problem.dtype == torch.float64 else 1)
        return dict.fromkeys(names, limit)
    whole = _in_one_piece(problem) if isinstance(problem.mechanism, Softmax) else _on_one_rank(problem)
    return {name: 2 * error for name, error in errors(whole, expected).items()}


def _on_one_rank(problem: Problem) -> list[torch.Tensor]:
    return joined(ringattn.simulate(attend, problem, "contiguous", "auto", problem.inputs(), ring=1).results)


def _in_one_piece(problem: Problem) -> list[torch.Tensor]:
    """The results of PyTorch's own kernel, with the mask as a matrix."""
    if problem.length > 20_000:
        raise InputError(
            f"Half precision is judged by PyTorch's kernel under a dense mask, up to 20000 tokens; got "
            f"{problem.length}. Use --dtype float32."
        )
    q, k, v, dout = problem.inputs()
    for x in (q, k, v):
        x.requires_grad_(problem.backward)
    allowed = torch.from_numpy(problem.rows(0, problem.length))
    out = scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=problem.heads != problem.kv_heads)
    gradients = torch.autograd.grad(out, (q, k, v), dout) if problem.backward else ()
    return [x.detach() for x in (out, *gradients)]
