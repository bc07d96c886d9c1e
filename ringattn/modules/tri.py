"""Tri-attention: query, key and context are scored together (arXiv 2211.02899, equations 6 to 12).

The softmax runs jointly over pairs of a key i and a context j. For one context it is ordinary attention, of queries
that the context has changed; over contexts, a softmax of their log-sum-exps:

    out = sum_j pi_j f(sum_i p_ij v_i, c_j)      p_ij = softmax_i F(q, k_i, c_j)      pi_j = softmax_j lse_j

So contexts are query heads, keys and values travel once for all of a chunk, and no scores of all pairs ever exist.
Whatever number of contexts is worked on at once, chunks are joined by their log-sum-exps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ringattn.checking import choice, integer
from ringattn.functional import attention
from ringattn.masks import Mask
from ringattn.mechanisms.softmax import Softmax
from ringattn.sharding import Sharding

SCORES = ("additive", "dot", "scaled", "trilinear")


class TriAttention(nn.Module):
    """Attention over pairs of keys and contexts.

    Args:
        heads: of queries, keys, values and contexts.
        dim: of queries, keys and contexts. Values have as many.
        scores: ``additive``: p^T tanh(W q + U k + H c); ``dot``: sum_d q_d k_d c_d; ``scaled``: that over sqrt(D);
            ``trilinear``: W x_1 q x_2 k x_3 c. The value of a pair is v + c, v o c, v o c and v o (W' c).
        chunk: contexts worked on at once, which many query heads there are for each head.
    """

    def __init__(self, heads: int, dim: int, scores: str = "scaled", chunk: int = 64) -> None:
        super().__init__()
        self.scores, self.chunk = choice(scores, "scores", SCORES), integer(chunk, "chunk", least=1)
        self.heads, self.dim = heads, dim
        if scores == "additive":
            self.query, self.key, self.context = (_matrix(heads, dim, dim) for _ in "qkc")
            self.direction = _matrix(heads, dim)
        elif scores == "trilinear":
            self.tensor, self.value = _matrix(heads, dim, dim, dim), _matrix(heads, dim, dim)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        context: torch.Tensor,
        mask: Mask,
        *,
        sharding: Sharding,
        **options: Any,
    ) -> torch.Tensor:
        """``[B, H, S_local, D]``; arguments as for `ringattn.attention`.

        Args:
            q, k, v: ``[B, H, S_local, D]``, this rank's parts.
            context: ``[B, H, J, D]``, J > 0, the same on every rank: of a sharded one, ``sharding.join(context, 2)``.
            mask: of the pairs of a query and a key.
        """
        if self.scores == "additive":
            k = k @ self.key
        options |= {"sharding": sharding, "return_lse": True}
        chunks = [self._chunk(q, k, v, c, mask, options) for c in context.split(self.chunk, 2)]
        outs, lse = torch.stack([out for out, _ in chunks]), torch.stack([lse for _, lse in chunks])
        weights = torch.softmax(_reached(lse), dim=0).unsqueeze(-1)
        return (outs * weights.to(outs.dtype)).sum(dim=0)

    def _chunk(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        context: torch.Tensor,
        mask: Mask,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp over some contexts, ``[B, H, S, D]`` and ``[B, H, S]``."""
        count = context.shape[2]
        out, lse = attention(self._queries(q, context), k, v, mask, mechanism=self._mechanism(count), **options)
        out, lse = out.unflatten(1, (-1, count)), lse.unflatten(1, (-1, count))
        weights = torch.softmax(_reached(lse), dim=2).unsqueeze(-1).to(out.dtype)
        return (weights * self._paired(out, context.unsqueeze(3), lse)).sum(dim=2), lse.logsumexp(dim=2)

    def _queries(self, q: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The queries that each context makes of each query, ``[B, H J, S, D]``."""
        if self.scores == "additive":
            each = (q @ self.query).unsqueeze(2) + (context @ self.context).unsqueeze(3)
        elif self.scores == "trilinear":
            each = torch.einsum("bhsd,hdef,bhjf->bhjse", q, self.tensor, context)
        else:
            each = q.unsqueeze(2) * context.unsqueeze(3)
        return each.flatten(1, 2)

    def _mechanism(self, count: int) -> Softmax:
        if self.scores == "additive":
            return Softmax(additive=self.direction.repeat_interleave(count, dim=0))
        return Softmax(scale=1 / math.sqrt(self.dim) if self.scores == "scaled" else 1.0)

    def _paired(self, out: torch.Tensor, context: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Values ``[B, H, J, S, D]`` with their contexts ``[B, H, J, 1, D]``; 0 for a query that sees no key."""
        if self.scores == "additive":
            return (out + context) * (lse != -math.inf).unsqueeze(-1)
        return out * (context @ self.value.unsqueeze(1) if self.scores == "trilinear" else context)


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[1] ** -0.5)


def _reached(lse: torch.Tensor) -> torch.Tensor:
    """A log-sum-exp, 0 where no key is: there all contexts are without one alike, and nothing is weighed."""
    return lse.masked_fill(lse == -math.inf, 0)
