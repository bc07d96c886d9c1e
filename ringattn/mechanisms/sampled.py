"""Sampled attention: a query takes the value of one key, drawn with softmax's probabilities (stochastic "hard"
attention of Xu et al., arXiv 1502.03044, section 4.1).

The key of the largest ``s_j + g_j``, with independent Gumbel noise g, is an exact draw from softmax(s) (the Gumbel-max
trick), and a maximum merges over blocks and ranks. The noise is a hash of the seed and of global indices, so the draw
is the same however the sequence is cut; as in `mechanisms.hard`, a product only finds the candidates for the largest,
which are then computed term by term.

A draw is not differentiable, but its probability is, and so REINFORCE estimates the gradient of an expected reward r as
that of ``r log_prob``. With p = softmax(s), H its entropy and c the key drawn,

    log_prob = s_c - lse        d log_prob / d s_j = [j = c] - p_j        d H / d s_j = -p_j (s_j - lse + H)

The straight-through estimator (Jang, Gu and Poole, arXiv 1611.01144, section 2.2) treats the draw as if it were
P = softmax((s + g) / temperature): dS = P o (dO V^T - dO . (P V)) / temperature. The gradient of the values is that of
the draw.
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
from ringattn.mechanisms.choices import AT_ONCE, NOWHERE, chosen, taken
from ringattn.mechanisms.dropout import fresh, indices, seed_of, uniform
from ringattn.mechanisms.lse import average, without_infinity
from ringattn.mechanisms.scores import LEARNED, WORDS, Scored, alike


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled(Scored):
    """The value of one allowed key, drawn with the probabilities of ``softmax(S)``; the same on any ranks.

    The extras are the key's global ``position`` (int64, 2^63 - 1 where no key may be reached), the logarithm of its
    probability, ``log_prob``, and the ``entropy`` of the probabilities; both 0 where no key may be reached.

    Attributes:
        straight_through: temperature of the straight-through estimator, by which the output has a gradient for queries
            and keys; None for none: they get gradients by way of `log_prob` and `entropy` alone.
        seed: of the draws; None draws one for each call from PyTorch's default CPU generator, which must be seeded
            alike on every rank.
        scale, softcap, alibi, relative, bias, additive: as in `Softmax`.
    """

    alibi: torch.Tensor | None = None
    relative: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    additive: torch.Tensor | None = None
    straight_through: float | None = None
    seed: int | None = dataclasses.field(default=None, repr=False)

    tensors: ClassVar[tuple[str, ...]] = LEARNED
    sharded: ClassVar[Mapping[str, int]] = {"bias": 1}
    extras: ClassVar[tuple[str, ...]] = ("position", "log_prob", "entropy")
    kept: ClassVar[tuple[str, ...]] = ("lse", "soft_lse", "soft_out")
    words: ClassVar[Mapping[str, str]] = {**WORDS, "straight_through": "the straight-through estimator"}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", seed_of(self.seed, "Sampled's seed"))
        if self.straight_through is not None:
            name = "Sampled's straight_through"
            object.__setattr__(self, "straight_through", finite(self.straight_through, name))
            if self.straight_through <= 0:
                raise InputError(f"{name} is a temperature above 0, or None; got {shown(self.straight_through)}.")

    def new_seed(self) -> int | torch.Tensor:
        return fresh(self.seed)

    def empty(self, problem: Problem, length: int) -> State:
        best = problem.rows(problem.heads, length, 1).squeeze(-1).double().fill_(-math.inf)
        position, none = torch.full_like(best, NOWHERE, dtype=torch.int64), torch.zeros_like(best)
        value = problem.rows(problem.heads, length, problem.value_dim)
        soft = problem.rows(problem.heads, length, 0 if self.straight_through is None else problem.value_dim)
        return best, position, none, value, best.clone(), none.clone(), best.clone(), soft

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        wide, groups = dataclasses.replace(problem, dtype=torch.float64), (problem.kv_heads, -1)
        q, k = q.double(), k.double()
        scores = self.scores(wide, block, q, k)[0].flatten(1, 2)
        perturbed = scores + _gumbel(uniform(problem.seed, *indices(problem, block)))
        exact = self._exact(wide, block, q, k, perturbed)
        best, column = exact.amax(dim=-1), exact.argmax(dim=-1)  # argmax takes the first of equals
        grouped = (x.unflatten(1, groups) for x in (best, column))
        position, value = (x.flatten(1, 2) for x in taken(block, v, *grouped))
        score = torch.where(best != -math.inf, scores.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)
        lse, weights = _softmax(scores)
        mean = (weights * torch.where(scores == -math.inf, 0.0, scores)).sum(dim=-1)
        if self.straight_through is None:
            soft = torch.full_like(lse, -math.inf), value[..., :0]
        else:
            soft_lse, weights = _softmax(perturbed / self.straight_through)
            soft = soft_lse, (weights.unflatten(1, groups).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)
        return best, position, score, value, lse, mean, *soft

    def merge(self, into: State, part: State) -> None:
        (best, position), (part_best, part_position) = into[:2], part[:2]
        wins = (part_best > best) | ((part_best == best) & (part_position < position)) | part_best.isnan()
        for x, other in zip(into[:4], part[:4], strict=True):
            over = wins.unsqueeze(-1) if x.dim() > wins.dim() else wins
            x.copy_(torch.where(over, other.to(x.dtype), x))
        for at in (4, 6):
            average(into[at : at + 2], part[at : at + 2])

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        _, position, score, value, lse, mean, *soft = state
        reached = lse > -math.inf
        log_prob, entropy = torch.where(reached, score - lse, 0.0), torch.where(reached, lse - mean, 0.0)
        return value.to(problem.dtype), (position, log_prob, entropy, lse, *soft)

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
        tables, groups = self.wanted_tables(problem, dparams), (problem.kv_heads, -1)
        dq = dk = dv = None
        if problem.wants("v"):
            # a product with ones and zeros adds in a fixed order, where scattering would not on every device
            won, dout = self.weights(problem, block, q, k, output_grad.saved), output_grad.dout.unflatten(1, groups)
            dv = (won.transpose(-1, -2) @ dout).sum(dim=2)
        _, dlog_prob, dentropy = output_grad.grad_extras
        used = dlog_prob is not None or dentropy is not None or self.straight_through is not None
        if used and (tables or problem.wants("q", "k")):
            scores, slope = self.scores(problem, block, q, k)
            dscores = self._score_grads(problem, block, v, output_grad, scores.flatten(1, 2))
            dscores = dscores.to(q.dtype).unflatten(1, groups)
            dq, dk = self.score_grads(problem, block, q, k, slope, dscores, tables)
        return dq, dk, dv

    def _score_grads(
        self, problem: Problem, block: Block, v: torch.Tensor, output_grad: OutputGrad, scores: torch.Tensor
    ) -> torch.Tensor:
        """Of the scores ``[B, Hq, M, N]``."""
        position, _, entropy, lse, soft_lse, soft_out = (x.unsqueeze(-1) for x in output_grad.saved[1:])
        _, dlog_prob, dentropy = (None if x is None else x.unsqueeze(-1) for x in output_grad.grad_extras)
        weights, total = torch.exp(scores - without_infinity(lse)), torch.zeros_like(scores, dtype=torch.float64)
        if dlog_prob is not None:
            total += dlog_prob * (chosen(block, position).double() - weights)
        if dentropy is not None:
            surprise = torch.where(scores == -math.inf, 0.0, scores - without_infinity(lse) + entropy)
            total -= dentropy * weights * surprise
        if self.straight_through is not None:
            perturbed = scores + _gumbel(uniform(problem.seed, *indices(problem, block)))
            soft = torch.exp(perturbed / self.straight_through - without_infinity(soft_lse))
            dweights = (output_grad.dout.unflatten(1, (problem.kv_heads, -1)) @ v.unsqueeze(2).mT).flatten(1, 2)
            delta = (output_grad.dout * soft_out.squeeze(-1)).sum(dim=-1, keepdim=True)
            total += soft * (dweights - delta) / self.straight_through
        return total

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        won: torch.Tensor = chosen(block, saved[1].unsqueeze(-1)).unflatten(1, (problem.kv_heads, -1))
        return won.to(problem.accumulator)

    def _exact(
        self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, perturbed: torch.Tensor
    ) -> torch.Tensor:
        """The perturbed scores of every row's candidates, to the bit the same in any block; else -inf."""
        largest = torch.where(perturbed.isinf(), 0.0, perturbed.abs()).amax(dim=-1)
        lengths = q.norm(dim=-1) * k.norm(dim=-1).amax(dim=(-1, -2))[:, None, None] * abs(self.scale_for(problem))
        # far more than any rounding error, and still few candidates
        margin = 2.0**-30 * (1 + largest) + 2.0**-40 * lengths
        # written so that a NaN is a candidate, and where margins are NaN every key is
        near = ~(perturbed < (perturbed.amax(dim=-1) - margin).unsqueeze(-1)) & (perturbed != -math.inf)
        out, device = torch.full_like(perturbed, -math.inf), q.device
        for at in (x.unbind(1) for x in near.nonzero().split(AT_ONCE)):
            batch, head, row, column = at
            where = block.q_positions(device)[row], block.k_positions(device)[column]
            noise = alike(_gumbel, uniform(problem.seed, batch, head + problem.first_head, *where))
            out[at] = self.pairs(problem, block, q, k, at) + noise
        return out


def _gumbel(u: torch.Tensor) -> torch.Tensor:
    """Noise of the standard Gumbel distribution from uniform numbers."""
    return -torch.log(-torch.log(u))


def _softmax(scores: torch.Tensor) -> State:
    """The log-sum-exp of rows, and their weights."""
    lse = scores.logsumexp(dim=-1)
    return lse, torch.exp(scores - without_infinity(lse).unsqueeze(-1))
