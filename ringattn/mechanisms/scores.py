"""Scores of pairs, and their gradients: what softmax, entmax and sampling have in common.

    S = cap tanh(scale Q K^T / cap) - alibi_h |i - j| + relative_h[i - j] + bias_h[i, j]

where additive scores, ``sum_d additive_hd tanh(q_id + k_jd)``, may stand for Q K^T (soft cap: Gemma 2, arXiv
2408.00118, section 2; ALiBi: arXiv 2108.12409, section 3, mirrored for keys that follow). Position terms may be a
hundred times larger than what they decide, where a mask allows distant keys only: float32 would round them in the
fifth digit of a weight. Scores that have any are float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

from ringattn.checking import finite, shown
from ringattn.errors import InputError
from ringattn.mechanisms import additive
from ringattn.mechanisms.base import Mechanism, Params, Problem
from ringattn.mechanisms.blocks import Block

TABLES = ("alibi", "relative", "bias")
"""Tensors that add to the scores."""

_PIECE = 1 << 10  # numbers, a multiple of those that any processor computes at once

LEARNED = (*TABLES, "additive")
"""All tensors that scores are made with."""

WORDS: Mapping[str, str] = {
    "softcap": "soft cap",
    "alibi": "ALiBi",
    "relative": "relative position bias",
    "bias": "additive bias",
    "additive": "additive scores",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scored(Mechanism):
    """A mechanism of scores. Its `tensors` may be any of `LEARNED`, and others of its own.

    Attributes:
        scale: of the scores; None for 1 / sqrt(D), and for 1 of additive scores.
        softcap: the scores' limit, above 0; None for none.
        numbers: those of the `tensors` that may be numbers too.
    """

    scale: float | None = None
    softcap: float | None = None

    numbers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("scale", "softcap"):
            value = getattr(self, field)
            if value is not None:  # one text for one number, whatever its type: ranks compare it
                object.__setattr__(self, field, finite(value, f"{name}'s {field}"))
        if self.softcap is not None and self.softcap <= 0:
            raise InputError(f"{name}'s softcap must be above 0, or None for none; got {shown(self.softcap)}.")
        for field in self.tensors:
            if field in self.numbers and not isinstance(getattr(self, field), torch.Tensor):
                continue
            value = getattr(self, field)
            if value is not None and not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                raise InputError(f"{name}'s {field} must be a tensor of floating point numbers; got {shown(value)}.")

    def check(self, problem: Problem, queries: int, keys: int) -> None:
        heads, params = problem.heads, self.params
        # the middle entry of a relative table is that of distance 0: an odd number of them
        relative = params.get("relative")
        distances = 0 if relative is None or relative.dim() != 2 else relative.shape[1] | 1
        shapes = {
            "alibi": ((heads,), f"[{heads}], one for each query head"),
            "relative": ((heads, distances), f"[{heads}, 2 R + 1], query heads and an odd number of distances"),
            "bias": (
                (heads, queries, keys),
                f"[{heads}, {queries}, {keys}]: query heads, this rank's queries (sharding.split(bias, 1)), all keys",
            ),
            "additive": ((heads, problem.dim), f"[{heads}, {problem.dim}], query heads and dims"),
        }
        for name, x in params.items():
            shape, words = shapes.get(name, (tuple(x.shape), ""))
            if tuple(x.shape) != shape:
                raise InputError(f"{name} must have shape {words}; got {list(x.shape)}.")
            if x.device != problem.device:
                raise InputError(f"{name} must be where q, k and v are, on {problem.device}; got {x.device}.")

    def scale_for(self, problem: Problem) -> float:
        """The factor of the scores."""
        if self.scale is not None:
            return self.scale
        return 1.0 if "additive" in self.params else 1 / math.sqrt(problem.dim)

    def scores(
        self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[B, Hkv, Hq / Hkv, M, N]``, -inf where a pair is not allowed, and the soft cap's derivative there."""
        scores, slope = self._products(problem, q.unflatten(1, (problem.kv_heads, -1)), k), None
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * capped, 1 - capped * capped
        for name, table in problem.params.items():
            if name in TABLES:
                added = _added(name, table.double() if name != "bias" else table, block)
                scores = scores + added.unflatten(0, (problem.kv_heads, -1)).double()
        return (scores if block.allowed is None else scores.masked_fill(~block.allowed, -math.inf)), slope

    def _products(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The scores of queries ``[B, Hkv, G, M, D]`` before anything is added."""
        scale = self.scale_for(problem)
        if "additive" in problem.params:
            return additive.scores(q, k, _additive(problem)) * scale
        return torch.matmul(q * scale, k.unsqueeze(2).transpose(-1, -2))

    def pairs(
        self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, at: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The scores ``[P]`` of some pairs of a block, term by term: to the bit the same in any block.

        A matrix product's last bits change with the shape of the block, and so do those of a function of many numbers,
        which computes the last few of them in another way.

        Args:
            q, k: in float64, ``[B, Hq, M, D]`` and ``[B, Hkv, N, D]``.
            at: batch, query head, row and column of each pair, ``[P]`` each.
        """
        batch, head, row, column = at
        query, key = q[batch, head, row], k[batch, head // (problem.heads // problem.kv_heads), column]
        scale, weights = self.scale_for(problem), problem.params.get("additive")
        terms = query * key if weights is None else alike(torch.tanh, query + key) * weights[head].double()
        total = terms[:, 0]
        for d in range(1, terms.shape[1]):
            total = total + terms[:, d]
        total = total * scale
        if self.softcap is not None:
            total = self.softcap * alike(torch.tanh, total / self.softcap)
        distance = block.q_positions(q.device)[row] - block.k_positions(q.device)[column]
        for name, table in problem.params.items():
            if name == "alibi":
                total = total - table[head].double() * distance.abs()
            elif name == "relative":
                total = total + table[head, _entry(distance, table)].double()
            elif name == "bias":
                total = total + table[:, block.queries, block.k_at][head, row, column].double()
        return total

    def wanted_tables(self, problem: Problem, dparams: Params) -> dict[str, torch.Tensor]:
        """The accumulators of those tables whose gradients somebody asked for."""
        return {name: total for name, total in dparams.items() if name in LEARNED and problem.wants(name)}

    def score_grads(
        self,
        problem: Problem,
        block: Block,
        q: torch.Tensor,
        k: torch.Tensor,
        slope: torch.Tensor | None,
        dscores: torch.Tensor,
        tables: Params,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of queries and keys, where they are wanted; those of the tables are added to ``tables``.

        Args:
            slope: as `scores` gave it.
            dscores: of the scores, 0 where a pair is not allowed; it is written over.
        """
        _add_table_grads(block, dscores, tables)
        if slope is not None:
            dscores *= slope
        scale, dq, dk = self.scale_for(problem), None, None
        if "additive" in problem.params:
            return _add_additive_grads(problem, q, k, dscores.mul_(scale), tables)
        if problem.wants("q"):
            dq = (dscores @ k.unsqueeze(2)).flatten(1, 2) * scale
        if problem.wants("k"):
            dk = (dscores.transpose(-1, -2) @ q.unflatten(1, (problem.kv_heads, -1))).sum(dim=2) * scale
        return dq, dk


def alike(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A function of single numbers, computed in pieces of one size: to the bit the same whatever else is computed."""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % _PIECE))
    return torch.cat([function(piece) for piece in flat.split(_PIECE)])[: x.numel()].view_as(x) if x.numel() else x


def _added(name: str, table: torch.Tensor, block: Block) -> torch.Tensor:
    """What a table adds to the scores of a block, ``[Hq, M, N]``."""
    if name == "alibi":
        return -table[:, None, None] * _distances(block, table.device).abs()
    if name == "relative":
        return table[:, _entries(block, table)]
    return table[:, block.queries, block.k_at]


def _additive(problem: Problem) -> torch.Tensor:
    """The weights of additive scores, ``[Hkv, Hq / Hkv, D]``."""
    weights: torch.Tensor = problem.params["additive"].to(problem.accumulator).unflatten(0, (problem.kv_heads, -1))
    return weights


def _add_additive_grads(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, dscores: torch.Tensor, tables: Params
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of queries and keys by additive scores, adding that of their weights to its table."""
    grouped = q.unflatten(1, (problem.kv_heads, -1))
    dq, dk, dweights = additive.gradients(grouped, k, _additive(problem), dscores.to(q.dtype))
    if "additive" in tables:
        tables["additive"].add_(dweights.flatten(0, 1))
    return dq.flatten(1, 2) if problem.wants("q") else None, dk if problem.wants("k") else None


def _add_table_grads(block: Block, dscores: torch.Tensor, tables: Params) -> None:
    """Adds the gradients of the tables, which are those of the scores, summed over what shares an entry."""
    for name, total in tables.items():
        if name not in TABLES:
            continue
        each = dscores.sum(dim=0).flatten(0, 1)
        if name == "alibi":
            total -= (each * _distances(block, total.device).abs()).sum(dim=(1, 2))
        elif name == "relative":
            total.index_add_(1, _entries(block, total).flatten(), each.flatten(1))
        else:
            total[:, block.queries, block.k_at] += each


def _distances(block: Block, device: torch.device) -> torch.Tensor:
    """``i - j`` of global positions, ``[M, N]``."""
    return block.q_positions(device)[:, None] - block.k_positions(device)


def _entries(block: Block, table: torch.Tensor) -> torch.Tensor:
    """The entry of a relative table for each pair, ``[M, N]``."""
    return _entry(_distances(block, table.device), table)


def _entry(distance: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of a relative table for each distance."""
    reach = table.shape[1] // 2
    return distance.clamp(-reach, reach) + reach
