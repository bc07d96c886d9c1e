"""Gated linear attention with one decay a token and key head (arXiv 2312.06635, 2307.08621, 2405.21060, section 3).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        out_t = scale S_t^T q_t

with g the log decays, at most 0. With their cumulative sums A, taken over the whole sequence, it is a sum over pairs,

    out_i = scale sum_{j <= i} exp(A_i - A_j) (q_i . k_j) v_j

which may be cut and added up in any order, without a denominator. `ringattn.attention` takes A by a cumulative sum
over ranks in float64 and appends it to queries and keys as two dims, which are one number of twice the digits, and
behind them the position.

The summary of keys is their state at the last of them, ``sum_j exp(A_last - A_j) k_j v_j^T``, with that A_last:
D Dv + 2 numbers a head. Whatever A it is written down at, it says the same; so no gradient goes through it.

Backward, with t_ij = dout_i . v_j exp(A_i - A_j) scale (q_i . k_j): dA_i = sum_j t_ij and dA_j = -sum_i t_ij. What a
token gives itself does not decay: t_ii is left out of both sums, where it would cancel but for its rounding error, of
which the gradient of strong decays, from a token on the sum of dA, would be made.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from ringattn.checking import finite, flag, shown
from ringattn.errors import InputError, UnsupportedError
from ringattn.mechanisms.base import InputGrads, Mechanism, OutputGrad, Params, Problem, State, Summarising
from ringattn.mechanisms.blocks import Block

LEAST = -800.0  # the log of a decay of 0: no float64 has so small an exponential
CARRIED = 3
"""The cumulative sum, in two parts, and the position."""


@dataclasses.dataclass(frozen=True, eq=False)
class Gated(Summarising):
    """``scale sum_j exp(A_i - A_j) (q_i . k_j) v_j`` over the allowed keys, none of which may come after the query.

    Half precision is computed in float32, which also travels then.

    Attributes:
        log_decay: ``[B, Hkv, S_local]``, for each of this rank's tokens the logarithm of what it leaves of the state
            before it, at most 0, of any float dtype; below -800 it is as if -800, which leaves nothing. None for no
            decay. It needs queries and keys of one sharding.
        scale: of the products; None for 1 / sqrt(D).
        carried: whether the last three dims of q and k are its cumulative sum and the position, as `with_sums`
            appends them.
    """

    log_decay: torch.Tensor | None = None
    scale: float | None = None
    carried: bool = False
    tensors: ClassVar[tuple[str, ...]] = ("log_decay",)
    sharded: ClassVar[dict[str, int]] = {"log_decay": 2}
    causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", finite(self.scale, "Gated's scale"))
        x = self.log_decay
        if x is not None and not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            raise InputError(f"log_decay must be a tensor of floating point numbers; got {shown(x)}.")
        if flag(self.carried, "carried") and x is not None:
            raise InputError("Gated takes log_decay, or what carries its cumulative sum already; got both.")

    def to_sum(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        x = self.log_decay
        if x is None:
            return None
        if x.shape != k.shape[:3] or x.device != k.device:
            raise InputError(
                f"log_decay must have shape {list(k.shape[:3])}, a number for each of this rank's keys and key heads, "
                f"on {k.device}; got {list(x.shape)} on {x.device}."
            )
        if q.dim() != 4 or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
            raise InputError(f"log_decay needs queries and keys of one sharding; got {q.shape[2]} and {k.shape[2]}.")
        decays = x.double().clamp(min=LEAST)
        return torch.stack([decays, torch.ones_like(decays)], dim=-1)

    def with_sums(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor
    ) -> tuple[Mechanism, torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        total, position = sums.unbind(dim=-1)
        high = total.to(wide)  # through which the gradient goes
        position = position % (1 << 24)  # which float32 tells apart; no token is so far from itself
        carried = torch.stack([high, (total - high).detach().to(wide), position.to(wide)], dim=-1)
        q = torch.cat([q.to(wide), carried.repeat_interleave(q.shape[1] // k.shape[1], dim=1)], dim=-1)
        return self.summed, q, torch.cat([k.to(wide), carried], dim=-1), v.to(wide)

    def summed_shape(self, dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        if self.log_decay is None:
            return dim, dtype
        return dim + CARRIED, torch.promote_types(dtype, torch.float32)

    @property
    def summed(self) -> Gated:
        return self if self.log_decay is None else Gated(None, self.scale, carried=True)

    def check(self, problem: Problem, queries: int, keys: int) -> None:
        if self.log_decay is not None:
            raise UnsupportedError("Gated's log_decay is known to ringattn.attention and attention_rows alone.")
        if self.carried and problem.dim <= CARRIED:
            raise InputError(f"Queries and keys carry the decay in their last three dims; got {problem.dim} dims.")

    def empty(self, problem: Problem, length: int) -> State:
        return (problem.rows(problem.heads, length, problem.value_dim),)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        return ((self._weights(problem, block, q, k) @ v.unsqueeze(2)).flatten(1, 2),)

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        return state[0].to(problem.dtype), ()

    def tile_grad(
        self,
        problem: Problem,
        block: Block,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        dparams: Params,
    ) -> InputGrads:
        groups = (problem.kv_heads, -1)
        dout = output_grad.dout.unflatten(1, groups)
        decays = self._decays(problem, block, q, k)
        dq = dk = dv = None
        if problem.wants("v"):
            weights = self._weights(problem, block, q, k)
            dv = (weights.transpose(-1, -2) @ dout).sum(dim=2)
        if problem.wants("q", "k"):
            (content, _), (keys, _) = self._apart(q.unflatten(1, groups)), self._apart(k.unsqueeze(2))
            dproducts = (dout @ v.unsqueeze(2).transpose(-1, -2)) * decays * self._scale(problem)
            each = dproducts * (content @ keys.transpose(-1, -2))
            if self.carried:
                itself = q.unflatten(1, groups)[..., -1:] == k.unsqueeze(2)[..., -1:].transpose(-1, -2)
                each = each.masked_fill(itself, 0)
            if problem.wants("q"):
                dq = self._joined((dproducts @ keys).flatten(1, 2), each.sum(dim=-1).flatten(1, 2))
            if problem.wants("k"):
                dk = self._joined((dproducts.transpose(-1, -2) @ content).sum(dim=2), -each.sum(dim=(2, 3)))
        return dq, dk, dv

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        return self._weights(problem, block, q, k)

    def summary_size(self, dim: int, value_dim: int) -> int:
        if self.carried:
            return (dim - CARRIED) * value_dim + 2
        return dim * value_dim + (0 if self.log_decay is None else 2)

    def summarise(self, problem: Problem, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, sums = self._apart(k)
        last = _last(sums)
        state: torch.Tensor = (keys * _decay(last - sums)).transpose(-1, -2) @ v
        return torch.cat([state.flatten(2), last.flatten(2)], dim=-1)

    def fold(self, problem: Problem, summaries: torch.Tensor) -> torch.Tensor:
        states, sums = self._opened(summaries)
        folded = (states * _decay(sums[-1] - sums)).sum(dim=0)
        return torch.cat([folded, sums[-1]], dim=-1)

    def fold_grad(self, problem: Problem, summaries: torch.Tensor, dfolded: torch.Tensor) -> torch.Tensor:
        _, sums = self._opened(summaries)
        dstate, none = self._opened(dfolded)
        return torch.cat([dstate * _decay(sums[-1] - sums), none.expand_as(sums)], dim=-1)

    def attend(self, problem: Problem, q: torch.Tensor, summary: torch.Tensor) -> State:
        content, decays, state = self._at(problem, q, summary)
        return ((content * (decays * self._scale(problem)) @ state).flatten(1, 2),)

    def attend_grad(
        self, problem: Problem, q: torch.Tensor, summary: torch.Tensor, output_grad: OutputGrad
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        dout = output_grad.dout.unflatten(1, (problem.kv_heads, -1))
        content, decays, state = self._at(problem, q, summary)
        decays = decays * self._scale(problem)
        dq = dsummary = None
        if problem.wants("q"):
            dcontent = (dout @ state.transpose(-1, -2)) * decays
            dq = self._joined(dcontent.flatten(1, 2), (dcontent * content).sum(dim=-1).flatten(1, 2))
        if problem.wants("k", "v"):
            dstate = ((content * decays).transpose(-1, -2) @ dout).sum(dim=2).flatten(2)
            dsummary = torch.nn.functional.pad(dstate, (0, summary.shape[-1] - dstate.shape[-1]))
        return dq, dsummary

    def summarise_grad(
        self, problem: Problem, k: torch.Tensor, v: torch.Tensor, dsummary: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        keys, sums = self._apart(k)
        decays = _decay(_last(sums) - sums)
        dstate = self._opened(dsummary)[0].unflatten(2, (keys.shape[-1], problem.value_dim))
        dk = None
        if problem.wants("k"):
            dkeys = (v @ dstate.transpose(-1, -2)) * decays
            dk = self._joined(dkeys, -(dkeys * keys).sum(dim=-1))
        return dk, (keys * decays) @ dstate if problem.wants("v") else None

    def _scale(self, problem: Problem) -> float:
        dims = problem.dim - CARRIED if self.carried else problem.dim
        return 1 / math.sqrt(dims) if self.scale is None else self.scale

    def _apart(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries or keys by themselves, and the cumulative sums, ``[..., 2]``; without decay ``[..., 0]``."""
        if not self.carried:
            return x, x[..., :0]
        return x[..., :-CARRIED], x[..., -CARRIED:-1]

    def _joined(self, x: torch.Tensor, dsum: torch.Tensor) -> torch.Tensor:
        """The gradient of queries or keys, and of the first of their last three dims."""
        if not self.carried:
            return x
        return torch.cat([x, torch.nn.functional.pad(dsum.unsqueeze(-1), (0, CARRIED - 1))], dim=-1)

    def _opened(self, summaries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``[..., D Dv]``, and the cumulative sums at which they are."""
        size = summaries.shape[-1] - (2 if self.carried else 0)
        return summaries[..., :size], summaries[..., size:]

    def _at(
        self, problem: Problem, q: torch.Tensor, summary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[B, Hkv, G, M, D]``, what is left of the state at them, and the state ``[B, Hkv, 1, D, Dv]``."""
        content, sums = self._apart(q.unflatten(1, (problem.kv_heads, -1)))
        state, last = self._opened(summary)
        state = state.reshape(*state.shape[:2], 1, content.shape[-1], problem.value_dim)
        return content, _decay(sums - last[:, :, None, None]), state

    def _decays(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """What is left of each key at each query, ``[B, Hkv, Hq / Hkv, M, N]``; 0 where a pair is not allowed."""
        (_, at), (_, since) = self._apart(q.unflatten(1, (problem.kv_heads, -1))), self._apart(k.unsqueeze(2))
        exponents = (at.unsqueeze(-2) - since.unsqueeze(-3)).sum(dim=-1)
        if block.allowed is not None:  # before the exponential, which may be infinite there
            exponents = exponents.masked_fill(~block.allowed, -math.inf)
        return torch.exp(exponents)

    def _weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        (content, _), (keys, _) = self._apart(q.unflatten(1, (problem.kv_heads, -1))), self._apart(k.unsqueeze(2))
        products = content @ keys.transpose(-1, -2)
        return products * self._decays(problem, block, q, k) * self._scale(problem)


def _last(sums: torch.Tensor) -> torch.Tensor:
    """The cumulative sums ``[B, Hkv, 1, 2]`` at the last of keys, of ``[B, Hkv, N, 2]``, where least is left.

    Keys of several ranks lie in a buffer in the order of the ranks, which need not be that of positions.
    """
    if not sums.shape[-1]:
        return sums[:, :, -1:]
    backwards = sums.flip(2)
    at = backwards[..., :1].argmin(dim=2, keepdim=True)  # of equal ones the last, in whose digits the rest is told
    return backwards.gather(2, at.expand(*at.shape[:3], sums.shape[-1]))


def _decay(difference: torch.Tensor) -> torch.Tensor:
    """The exponential ``[..., 1]`` of a difference of cumulative sums ``[..., 2]``, the large part first."""
    return torch.exp(difference.sum(dim=-1, keepdim=True))
