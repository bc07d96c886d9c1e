"""Co-attention of a long context and a question, each of which may be sharded by itself.

Shapes: context ``[B, T_local, d]`` and question ``[B, J_local, d]``, this rank's tokens.
"""

from __future__ import annotations

import torch

from ringattn.collectives.pooling import pool
from ringattn.functional import attention
from ringattn.masks import Full
from ringattn.mechanisms.hard import Hard
from ringattn.mechanisms.softmax import Softmax
from ringattn.sharding import Sharding

PLAIN = Softmax(scale=1.0)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: Sharding, other: Sharding) -> torch.Tensor:
    """``softmax(q k^T) v`` of one head: tokens ``[B, S_local, .]`` that attend to those of another sequence."""
    one = (x.unsqueeze(1) for x in (q, k, v))
    q, k, v = one
    return attention(q, k, v, Full(), sharding=own, kv_sharding=other, mechanism=PLAIN).squeeze(1)


class BiDAF(torch.nn.Module):
    """Bi-directional attention flow (Seo et al., arXiv 1611.01603, section 2.4, equations 1 to 3).

    With ``S_tj = w1 . h_t + w2 . u_j + w3 . (h_t o u_j)``, a context token gets what the question says to it,
    ``u~_t = sum_j softmax_j(S_tj) u_j``, and all of them what of the context the question is about,
    ``h~ = sum_t softmax_t(max_j S_tj) h_t``: ``[h_t; u~_t; h_t o u~_t; h_t o h~]``.

    The question travels, and the state of one query.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_context, self.of_question = (torch.nn.Linear(dim, 1, bias=False) for _ in range(2))
        self.of_both = torch.nn.Parameter(torch.randn(dim) / dim**0.5)

    def forward(
        self, context: torch.Tensor, question: torch.Tensor, *, sharding: Sharding, question_sharding: Sharding
    ) -> torch.Tensor:
        """``[B, T_local, 4 d]``."""
        # S as one dot product, of two further dims
        q = torch.cat([context * self.of_both, self.of_context(context), torch.ones_like(context[..., :1])], dim=-1)
        k = torch.cat([question, torch.ones_like(question[..., :1]), self.of_question(question)], dim=-1)
        seen = attended(q, k, question, sharding, question_sharding)
        q, k = q.unsqueeze(1), k.unsqueeze(1)
        _, best = attention(
            q,
            k,
            k[..., :1],
            Full(),
            sharding=sharding,
            kv_sharding=question_sharding,
            mechanism=Hard(1.0),
            extras=["score"],
        )
        one = best.new_ones(len(best), 1, 1, 1)
        keys, values = best.to(context.dtype).unsqueeze(3), context.unsqueeze(1)
        about = pool(one.to(context.dtype), keys, values, sharding=sharding, mechanism=PLAIN)
        assert isinstance(about, torch.Tensor)
        return torch.cat([context, seen, context * seen, context * about.squeeze(1)], dim=-1)


class DCN(torch.nn.Module):
    """Dynamic co-attention's encoder (Xiong et al., arXiv 1611.01604, section 2.2, equation 2).

    The question is projected, ``Q = tanh(W Q' + b)``; with ``L = D^T Q``, whose columns and rows are normalised,
    ``C^Q = D softmax(L)`` and ``C^D = [Q; C^Q] softmax(L^T)``. Sentinels are tokens that the caller appends.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = torch.nn.Linear(dim, dim)

    def forward(
        self, context: torch.Tensor, question: torch.Tensor, *, sharding: Sharding, question_sharding: Sharding
    ) -> torch.Tensor:
        """C^D, ``[B, T_local, 2 d]``."""
        question = torch.tanh(self.project(question))
        of_question = attended(question, context, context, question_sharding, sharding)
        return attended(context, question, torch.cat([question, of_question], dim=-1), sharding, question_sharding)


class DCNPlus(torch.nn.Module):
    """Deep residual co-attention (DCN+, Xiong et al., arXiv 1711.00106, section 2.1): one co-attention on another.

    Of encodings E, each gives ``S^D = E^Q softmax(A^T)``, ``S^Q = E^D softmax(A)`` and ``C^D = S^Q softmax(A^T)``, with
    ``A = E^D E^Q``; the second one's encodings are of the first one's summaries S. All are handed on:
    ``[E1; E2; S1; S2; C1; C2]``.

    Args:
        encode: between the two, tokens ``[B, S_local, d]`` of either sequence to ``[B, S_local, d]``. The paper has a
            bidirectional LSTM, which reads a whole sequence in order; anything that is sequence-parallel goes.
    """

    def __init__(self, encode: torch.nn.Module) -> None:
        super().__init__()
        self.encode = encode

    def forward(
        self, context: torch.Tensor, question: torch.Tensor, *, sharding: Sharding, question_sharding: Sharding
    ) -> torch.Tensor:
        """``[B, T_local, 6 d]``."""
        shardings = sharding, question_sharding
        summary, of_question, first = _coattended(context, question, *shardings)
        deeper = self.encode(summary)
        second_summary, _, second = _coattended(deeper, self.encode(of_question), *shardings)
        return torch.cat([context, deeper, summary, second_summary, first, second], dim=-1)


def _coattended(
    context: torch.Tensor, question: torch.Tensor, sharding: Sharding, question_sharding: Sharding
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summaries of context and question, and the context of the co-attention."""
    of_question = attended(question, context, context, question_sharding, sharding)
    # one pass over the question gives both what it says and what it has seen
    both = attended(context, question, torch.cat([question, of_question], dim=-1), sharding, question_sharding)
    summary, found = both.chunk(2, dim=-1)
    return summary, of_question, found
