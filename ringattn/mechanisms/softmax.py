"""Softmax attention, blockwise and exact.

The state is normalised: the output over the keys seen so far and the log of the sum of their exponentials,
``out [B, Hq, M, Dv]`` and ``lse [B, Hq, M]``. Two blocks merge as (Online softmax, arXiv 1805.02867; in this form
FlashAttention-2, arXiv 2307.08691, section 3.1)

    out = out_a - sigmoid(lse_b - lse_a) (out_a - out_b)        lse = logaddexp(lse_a, lse_b)

which never exponentiates a positive number. A query that no key may reach keeps out 0 and lse -inf, and gives zero
gradients. With the final lse and output known, blocks of the backward pass are independent (FlashAttention-2,
section 3.2.2): P = exp(S - lse), dV = P^T dO, dS = P o (dO V^T - rowsum(dO o O) + dlse), dQ = scale dS K,
dK = scale dS^T Q.

The scores S are those of `mechanisms.scores`.

A learned sink is one more score that every query sees and that has no value (gpt-oss): lse' = logaddexp(lse, sink_h),
O shrinks by exp(lse - lse'), once, when all blocks are merged. Dropout keeps a weight with probability 1 - p, times
1 / (1 - p), by a hash of the seed and the pair's global indices: any rank can redo any block's draw.

Predictive local attention (Luong et al., arXiv 1508.04025, section 3.2, equation 10) sees the keys within a width D of
a centre p_i and multiplies their weights, when they are normalised, by exp(-(j - p_i)^2 / 2 sigma^2) with sigma = D /
2; the log-sum-exp is without that factor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch

from ringattn.checking import finite, shown
from ringattn.errors import InputError
from ringattn.mechanisms.base import InputGrads, OutputGrad, Params, Problem, State
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.dropout import fresh, indices, kept, seed_of
from ringattn.mechanisms.lse import average, without_infinity
from ringattn.mechanisms.scores import TABLES, WORDS, Scored


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax(Scored):
    """``softmax(S) v`` over the allowed keys; soft cap, sinks, ALiBi, relative and additive bias, dropout.

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
        additive: ``[Hq, D]``, weights of additive scores, ``sum_d additive_hd tanh(q_id + k_jd)`` in place of q k^T.
        centres: ``[B, Hq, S_local]``, predictive local attention: the position, any real number, around which each of
            this rank's queries (``sharding.split(centres, 2)``) attends.
        width: how far it sees from there, in tokens, above 0; half of it is the standard deviation of the Gaussian.
    """

    sinks: torch.Tensor | None = None
    alibi: torch.Tensor | None = None
    relative: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    dropout: float = 0.0
    seed: int | None = dataclasses.field(default=None, repr=False)
    additive: torch.Tensor | None = None
    centres: torch.Tensor | None = None
    width: float | None = None

    tensors: ClassVar[tuple[str, ...]] = ("sinks", "alibi", "relative", "bias", "additive", "centres")
    sharded: ClassVar[Mapping[str, int]] = {"bias": 1, "centres": 2}
    heads_at: ClassVar[Mapping[str, int]] = {"centres": 1}
    extras: ClassVar[tuple[str, ...]] = ("lse",)
    by_rows: ClassVar[bool] = True
    words: ClassVar[Mapping[str, str]] = {
        **WORDS,
        "dropout": "dropout that can be replayed from global positions",
        "centres": "predictive local attention",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dropout", finite(self.dropout, "Softmax's dropout"))
        if not 0 <= self.dropout < 1:
            raise InputError(f"Softmax's dropout is a probability from 0 to below 1; got {shown(self.dropout)}.")
        object.__setattr__(self, "seed", seed_of(self.seed, "Softmax's seed"))
        if (self.centres is None) != (self.width is None):
            raise InputError("Softmax's centres and width belong together; got one without the other.")
        if self.width is not None:
            object.__setattr__(self, "width", finite(self.width, "Softmax's width"))
            if self.width <= 0:
                raise InputError(f"Softmax's width is a number of tokens above 0; got {shown(self.width)}.")

    def new_seed(self) -> int | torch.Tensor:
        if not self.dropout:
            return 0
        return fresh(self.seed)

    def check(self, problem: Problem, queries: int, keys: int) -> None:
        super().check(problem, queries, keys)
        sinks, centres, rows = self.sinks, self.centres, (problem.batch, problem.heads, queries)
        if centres is not None and tuple(centres.shape) != rows:
            raise InputError(
                f"centres must have shape {list(rows)}: batch, query heads, this rank's queries "
                f"(sharding.split(centres, 2)); got {list(centres.shape)}."
            )
        if sinks is not None and tuple(sinks.shape) != (problem.heads,):
            raise InputError(
                f"sinks must have shape [{problem.heads}], one for each query head; got {list(sinks.shape)}."
            )

    def empty(self, problem: Problem, length: int) -> State:
        lse = problem.rows(problem.heads, length, 1).squeeze(-1)
        if problem.params.keys() & {*TABLES}:
            lse = lse.double()
        return problem.rows(problem.heads, length, problem.value_dim), lse.fill_(-math.inf)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        scores, _ = self.scores(problem, block, q, k)
        lse = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - without_infinity(lse).unsqueeze(-1)).to(v.dtype)
        factor = self._factor(problem, block)
        if factor is not None:
            weights = weights * factor
        return (weights @ v.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)

    def merge(self, into: State, part: State) -> None:
        average(into[::-1], part[::-1])

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        out, lse = state
        if "sinks" in problem.params:
            with_sink = torch.logaddexp(lse, problem.params["sinks"].to(lse.dtype)[:, None])
            out *= torch.exp(lse - without_infinity(with_sink)).to(out.dtype).unsqueeze(-1)
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
        tables = self.wanted_tables(problem, dparams)
        moved = "centres" in dparams and problem.wants("centres")
        if not (tables or moved or problem.wants("q", "k", "v")):
            return None, None, None
        lse, groups = output_grad.saved[1], (problem.kv_heads, -1)
        scores, slope = self.scores(problem, block, q, k)
        weights = torch.exp(scores - without_infinity(lse).unflatten(1, groups).unsqueeze(-1)).to(v.dtype)
        factor = self._factor(problem, block)
        dout = output_grad.dout.unflatten(1, groups)
        dq = dk = dv = None
        if problem.wants("v"):
            given = weights if factor is None else weights * factor
            dv = (given.transpose(-1, -2) @ dout).sum(dim=2)
        if tables or moved or problem.wants("q", "k"):
            dscores = dout @ v.unsqueeze(2).transpose(-1, -2)
            if factor is not None:
                dscores *= factor
            if moved:
                by_centre = (weights * dscores * self._offsets(problem, block)).sum(dim=-1) / self._variance
                dparams["centres"][:, :, block.queries] += by_centre.flatten(1, 2)
            dscores -= _delta(output_grad).unflatten(1, groups).unsqueeze(-1)
            dscores *= weights
            dq, dk = self.score_grads(problem, block, q, k, slope, dscores, tables)
        return dq, dk, dv

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        scores, _ = self.scores(problem, block, q, k)
        lse = without_infinity(saved[1]).unflatten(1, (problem.kv_heads, -1)).unsqueeze(-1)
        weights = torch.exp(scores - lse).to(problem.accumulator)
        return weights if self.width is None else weights * self._nearness(problem, block)

    def finish_grad(self, problem: Problem, output_grad: OutputGrad, dparams: Params) -> None:
        if "sinks" in problem.params and problem.wants("sinks"):
            total, lse = dparams["sinks"], output_grad.saved[1]
            weight = torch.exp(problem.params["sinks"].to(lse.dtype)[:, None] - without_infinity(lse))
            total -= (weight * _delta(output_grad.select(lambda x: x, total.dtype))).sum(dim=(0, 2))

    def scores(
        self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores, slope = super().scores(problem, block, q, k)
        if self.width is not None:
            scores = scores.masked_fill(self._offsets(problem, block).abs() > self.width, -math.inf)
        return scores, slope

    def _factor(self, problem: Problem, block: Block) -> torch.Tensor | None:
        """By which weights are multiplied after they were normalised, ``[B, Hkv, Hq / Hkv, M, N]``; None for 1."""
        kept = self._kept(problem, block) if self.dropout else None
        if self.width is None:
            return kept
        near = self._nearness(problem, block)
        return near if kept is None else near * kept

    def _nearness(self, problem: Problem, block: Block) -> torch.Tensor:
        """The Gaussian of predictive local attention."""
        return torch.exp(-(self._offsets(problem, block) ** 2) / (2 * self._variance)).to(problem.accumulator)

    def _offsets(self, problem: Problem, block: Block) -> torch.Tensor:
        """``j - p_i``, in float64, whose digits are enough for any position."""
        centres = problem.params["centres"][:, :, block.queries].unflatten(1, (problem.kv_heads, -1)).double()
        offsets: torch.Tensor = block.k_positions(problem.device) - centres.unsqueeze(-1)
        return offsets

    @property
    def _variance(self) -> float:
        assert self.width is not None
        return (self.width / 2) ** 2

    def _kept(self, problem: Problem, block: Block) -> torch.Tensor:
        """0 or 1 / (1 - p) for each weight, ``[B, Hkv, Hq / Hkv, M, N]``."""
        keep = kept(problem.seed, self.dropout, *indices(problem, block))
        grouped: torch.Tensor = keep.unflatten(1, (problem.kv_heads, -1)).to(problem.accumulator)
        return grouped / (1 - self.dropout)


def _delta(output_grad: OutputGrad) -> torch.Tensor:
    """``rowsum(dO o O) - dlse``, ``[B, Hq, M]``."""
    delta, dlse = (output_grad.dout * output_grad.saved[0]).sum(dim=-1), output_grad.grad_extras[0]
    return delta if dlse is None else delta - dlse
