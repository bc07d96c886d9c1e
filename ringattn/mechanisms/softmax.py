"""Softmax attention, blockwise and exact.

The state is normalised: the output over the keys seen so far and the log of the sum of their exponentials,
``out [B, Hq, M, Dv]`` and ``lse [B, Hq, M]``. Two blocks merge as (Online softmax, arXiv 1805.02867; in this form
FlashAttention-2, arXiv 2307.08691, section 3.1)

    out = out_a - sigmoid(lse_b - lse_a) (out_a - out_b)        lse = logaddexp(lse_a, lse_b)

which never exponentiates a positive number. A query that no key may reach keeps out 0 and lse -inf, and gives zero
gradients. With the final lse and output known, blocks of the backward pass are independent (FlashAttention-2,
section 3.2.2): P = exp(S - lse), dV = P^T dO, dS = P o (dO V^T - rowsum(dO o O) + dlse), dQ = scale dS K,
dK = scale dS^T Q.

What changes the scores is a function of the score or of global positions, and leaves all this as it is:

    S = cap tanh(scale Q K^T / cap) - alibi_h |i - j| + relative_h[i - j] + bias_h[i, j]

(soft cap: Gemma 2, arXiv 2408.00118, section 2; ALiBi: arXiv 2108.12409, section 3, mirrored for keys that follow).
Position terms may be a hundred times larger than what they decide, where a mask allows distant keys only: float32 would
round them in the fifth digit of a weight. Scores that have any, and their log-sum-exp, are float64.

A learned sink is one more score that every query sees and that has no value (gpt-oss): lse' = logaddexp(lse, sink_h),
O shrinks by exp(lse - lse'), once, when all blocks are merged. Dropout keeps a weight with probability 1 - p, times
1 / (1 - p), by a hash of the seed and the pair's global indices: any rank can redo any block's draw.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import ClassVar

import torch

from ringattn.checking import shown
from ringattn.errors import InputError
from ringattn.mechanisms.base import Block, InputGrads, Mechanism, OutputGrad, Params, Problem, State, finite
from ringattn.mechanisms.dropout import kept


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax(Mechanism):
    """``softmax(S) v`` over the allowed keys; soft cap, sinks, ALiBi, relative and additive bias, dropout.

    S is defined at the top of this file.

    The tensors may need gradients; what a rank gets is its own queries' part, as for any replicated parameter (sum
    it over the ranks), and for ``bias``, which is sharded, all there is.

    Attributes:
        scale: of the scores; None for 1 / sqrt(D).
        softcap: the scores' limit, above 0; None for none.
        sinks: ``[Hq]``, a learned score per head that takes weight and gives no value. The log-sum-exp includes it.
        alibi: ``[Hq]``, slopes: the score falls by the slope times the distance of the global positions.
        relative: ``[Hq, 2 R + 1]``, added by ``i - j`` from -R to R; what is further apart takes the outermost entry.
            T5's buckets are such a table: one entry a distance, up to their largest distance.
        bias: ``[Hq, S_local, Skv]``, added by position: this rank's queries (``sharding.split(bias, 1)``) and all keys
            in global order.
        dropout: probability of dropping a weight, from 0 to below 1.
        seed: of the dropout; None draws one for each call from PyTorch's default CPU generator, which must be seeded
            alike on every rank; replicas that are seeded alike drop alike.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi: torch.Tensor | None = None
    relative: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    dropout: float = 0.0
    seed: int | None = dataclasses.field(default=None, repr=False)

    tensors: ClassVar[tuple[str, ...]] = ("sinks", "alibi", "relative", "bias")
    sharded: ClassVar[tuple[str, ...]] = ("bias",)
    extras: ClassVar[tuple[str, ...]] = ("lse",)
    by_rows: ClassVar[bool] = True
    words: ClassVar[Mapping[str, str]] = {
        "softcap": "soft cap",
        "alibi": "ALiBi",
        "relative": "relative position bias",
        "bias": "additive bias",
        "dropout": "dropout that can be replayed from global positions",
    }

    def __post_init__(self) -> None:
        for name in ("scale", "softcap", "dropout"):
            value = getattr(self, name)
            if value is not None or name == "dropout":
                # one text for one number, whatever its type: ranks compare it
                object.__setattr__(self, name, finite(value, f"Softmax's {name}"))
        if self.softcap is not None and self.softcap <= 0:
            raise InputError(f"Softmax's softcap must be above 0, or None for none; got {shown(self.softcap)}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"Softmax's dropout is a probability from 0 to below 1; got {shown(self.dropout)}.")
        if self.seed is not None:
            integral = isinstance(self.seed, numbers.Integral) and not isinstance(self.seed, bool)
            if not integral or not 0 <= self.seed < 1 << 63:
                raise InputError(f"Softmax's seed is a number from 0 to below 2^63; got {shown(self.seed)}.")
            if type(self.seed) is not int:  # compiled code holds one as a symbol, and another seed is no other graph
                object.__setattr__(self, "seed", int(self.seed))
        for name in self.tensors:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                raise InputError(f"Softmax's {name} must be a tensor of floating point numbers; got {shown(value)}.")

    def new_seed(self) -> int | torch.Tensor:
        if not self.dropout:
            return 0
        return torch.randint(1 << 62, (), device="cpu") if self.seed is None else self.seed

    def check(self, problem: Problem, queries: int, keys: int) -> None:
        heads = problem.heads
        # the middle entry of a relative table is that of distance 0: an odd number of them
        distances = 0 if self.relative is None or self.relative.dim() != 2 else self.relative.shape[1] | 1
        shapes = {
            "sinks": ((heads,), f"[{heads}], one for each query head"),
            "alibi": ((heads,), f"[{heads}], one for each query head"),
            "relative": ((heads, distances), f"[{heads}, 2 R + 1], query heads and an odd number of distances"),
            "bias": (
                (heads, queries, keys),
                f"[{heads}, {queries}, {keys}]: query heads, this rank's queries (sharding.split(bias, 1)), all keys",
            ),
        }
        for name, x in self.params.items():
            shape, words = shapes[name]
            if tuple(x.shape) != shape:
                raise InputError(f"{name} must have shape {words}; got {list(x.shape)}.")
            if x.device != problem.device:
                raise InputError(f"{name} must be where q, k and v are, on {problem.device}; got {x.device}.")

    def scale_for(self, problem: Problem) -> float:
        """The factor of the scores."""
        return 1 / math.sqrt(problem.dim) if self.scale is None else self.scale

    def empty(self, problem: Problem, length: int) -> State:
        lse = problem.rows(problem.heads, length, 1).squeeze(-1)
        if problem.params.keys() - {"sinks"}:
            lse = lse.double()
        return problem.rows(problem.heads, length, problem.value_dim), lse.fill_(-math.inf)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        scores, _ = self._scores(problem, block, q, k)
        lse = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - _finite(lse).unsqueeze(-1)).to(v.dtype)
        if self.dropout:
            weights = weights * self._kept(problem, block)
        return (weights @ v.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)

    def merge(self, into: State, part: State) -> None:
        (out, lse), (part_out, part_lse) = into, part
        # -inf - -inf, where neither side has a key, is nan: such a row keeps its zeros.
        weight = torch.sigmoid(torch.nan_to_num_(part_lse - lse, nan=-math.inf, posinf=math.inf, neginf=-math.inf))
        out.lerp_(part_out.to(out.dtype), weight.to(out.dtype).unsqueeze(-1))
        torch.logaddexp(lse, part_lse, out=lse)

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        out, lse = state
        if "sinks" in problem.params:
            with_sink = torch.logaddexp(lse, problem.params["sinks"].to(lse.dtype)[:, None])
            out *= torch.exp(lse - _finite(with_sink)).to(out.dtype).unsqueeze(-1)
            lse = with_sink
        return out.to(problem.dtype), (lse,)

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
        tables = {name: total for name, total in dparams.items() if name != "sinks" and problem.wants(name)}
        if not (tables or problem.wants("q", "k", "v")):
            return None, None, None
        lse, scale, groups = output_grad.saved[1], self.scale_for(problem), (problem.kv_heads, -1)
        scores, slope = self._scores(problem, block, q, k)
        weights = torch.exp(scores - _finite(lse).unflatten(1, groups).unsqueeze(-1)).to(v.dtype)
        keep = self._kept(problem, block) if self.dropout else None
        dout = output_grad.dout.unflatten(1, groups)
        dq = dk = dv = None
        if problem.wants("v"):
            kept_weights = weights if keep is None else weights * keep
            dv = (kept_weights.transpose(-1, -2) @ dout).sum(dim=2)
        if tables or problem.wants("q", "k"):
            dscores = dout @ v.unsqueeze(2).transpose(-1, -2)
            if keep is not None:
                dscores *= keep
            dscores -= _delta(output_grad).unflatten(1, groups).unsqueeze(-1)
            dscores *= weights
            self._add_table_grads(block, dscores, tables)
            if slope is not None:
                dscores *= slope
            if problem.wants("q"):
                dq = (dscores @ k.unsqueeze(2)).flatten(1, 2) * scale
            if problem.wants("k"):
                dk = (dscores.transpose(-1, -2) @ q.unflatten(1, groups)).sum(dim=2) * scale
        return dq, dk, dv

    def finish_grad(self, problem: Problem, output_grad: OutputGrad, dparams: Params) -> None:
        if "sinks" in problem.params and problem.wants("sinks"):
            total, lse = dparams["sinks"], output_grad.saved[1]
            weight = torch.exp(problem.params["sinks"].to(lse.dtype)[:, None] - _finite(lse))
            total -= (weight * _delta(output_grad.select(lambda x: x, total.dtype))).sum(dim=(0, 2))

    def _scores(
        self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[B, Hkv, Hq / Hkv, M, N]``, -inf where a pair is not allowed, and the soft cap's derivative there."""
        grouped = q.unflatten(1, (problem.kv_heads, -1)) * self.scale_for(problem)
        scores, slope = torch.matmul(grouped, k.unsqueeze(2).transpose(-1, -2)), None
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * capped, 1 - capped * capped
        for name, table in problem.params.items():
            if name != "sinks":
                added = self._added(name, table.double() if name != "bias" else table, block)
                scores = scores + added.unflatten(0, (problem.kv_heads, -1)).double()
        return (scores if block.allowed is None else scores.masked_fill(~block.allowed, -math.inf)), slope

    @staticmethod
    def _added(name: str, table: torch.Tensor, block: Block) -> torch.Tensor:
        """What a table adds to the scores of a block, ``[Hq, M, N]``."""
        if name == "alibi":
            return -table[:, None, None] * _distances(block, table.device).abs()
        if name == "relative":
            return table[:, _entries(block, table)]
        return table[:, block.queries, block.k_at]

    @staticmethod
    def _add_table_grads(block: Block, dscores: torch.Tensor, tables: Params) -> None:
        """Adds the gradients of the tables, which are those of the scores, summed over what shares an entry."""
        for name, total in tables.items():
            each = dscores.sum(dim=0).flatten(0, 1)
            if name == "alibi":
                total -= (each * _distances(block, total.device).abs()).sum(dim=(1, 2))
            elif name == "relative":
                total.index_add_(1, _entries(block, total).flatten(), each.flatten(1))
            else:
                total[:, block.queries, block.k_at] += each

    def _kept(self, problem: Problem, block: Block) -> torch.Tensor:
        """0 or 1 / (1 - p) for each weight, ``[B, Hkv, Hq / Hkv, M, N]``."""
        device = problem.device
        keep: torch.Tensor = kept(
            problem.seed,
            self.dropout,
            torch.arange(problem.batch, device=device)[:, None, None, None],
            torch.arange(problem.heads, device=device)[:, None, None],
            block.q_positions(device)[:, None],
            block.k_positions(device),
        )
        keep = keep.unflatten(1, (problem.kv_heads, -1)).to(problem.accumulator)
        return keep / (1 - self.dropout)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Lse with 0 for -inf: the scores it is taken from are all -inf, and exp(-inf - 0) is the 0 wanted."""
    return torch.where(lse == -math.inf, 0.0, lse)


def _delta(output_grad: OutputGrad) -> torch.Tensor:
    """``rowsum(dO o O) - dlse``, ``[B, Hq, M]``."""
    delta, dlse = (output_grad.dout * output_grad.saved[0]).sum(dim=-1), output_grad.grad_extras[0]
    return delta if dlse is None else delta - dlse


def _distances(block: Block, device: torch.device) -> torch.Tensor:
    """``i - j`` of global positions, ``[M, N]``."""
    return block.q_positions(device)[:, None] - block.k_positions(device)


def _entries(block: Block, table: torch.Tensor) -> torch.Tensor:
    """The entry of a relative table for each pair, ``[M, N]``."""
    reach = table.shape[1] // 2
    return _distances(block, table.device).clamp(-reach, reach) + reach
