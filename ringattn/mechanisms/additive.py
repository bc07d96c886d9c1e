"""Additive scores (Bahdanau et al., arXiv 1409.0473, appendix A.1.2) and their gradients, in pieces that fit a cache.

    S_ij = sum_d v_d tanh(q_id + k_jd)

has no matrix product, but M N D hyperbolic tangents. With tanh(x) = 1 - 2 r and r = 1 / (1 + e^2q e^2k) each of them is
a product, a sum and a reciprocal of exponentials that are taken once a query and once a key. Backward, from dS,

    dv_d = sum_ij dS_ij (1 - 2 r_ijd)        dq_id = 4 v_d sum_j dS_ij (r - r^2)_ijd        dk_jd = the same over i
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

PIECE = 1 << 17  # numbers: half a megabyte, of which a core's own cache holds two
FAR = 30.0
"""Of a dim of a query and of a key. Where both are further from 0, one exponential may be infinite and the other 0.
Where one is, even if its exponential is infinite, tanh is 1 or -1 in all its digits."""


def scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, G, M, N]`` of queries ``[B, Hkv, G, M, D]``, keys ``[B, Hkv, N, D]`` and ``[Hkv, G, D]``."""
    out = q.new_empty(*q.shape[:-1], k.shape[2])
    for head, rows, r in _pieces(q, k):
        torch.matmul(r, -2 * v[head[1:]], out=out[head][rows])
    out += v.sum(dim=-1)[:, :, None, None]
    return out


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dscores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those of q, k and v, shaped like them."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for head, rows, r in _pieces(q, k):
        ds = dscores[head][rows]
        dv[head[1:]] -= 2 * (ds.reshape(-1) @ r.flatten(0, 1))
        slope = torch.addcmul(r, r, r, value=-1)
        dq[head][rows] = (ds.unsqueeze(1) @ slope).squeeze(1)
        slope *= ds.unsqueeze(-1)
        dk[head[:2]] += slope.sum(dim=0) * v[head[1:]]
    dv += dscores.sum(dim=(0, 3, 4)).unsqueeze(-1)
    dq *= 4 * v.unsqueeze(-2)
    dk *= 4
    return dq, dk, dv


def _pieces(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[tuple[int, int, int], slice, torch.Tensor]]:
    """Batch, key head and query head in it; some queries; their ``r [queries, N, D]``, which may be written over."""
    batch, kv_heads, groups, queries, dim = q.shape
    at_once, one = max(PIECE // max(k.shape[2] * dim, 1), 1), q.new_ones(())
    for head in itertools.product(range(batch), range(kv_heads), range(groups)):
        rows, keys = q[head], k[head[:2]]
        far_rows, far_keys = rows.abs() > FAR, keys.abs() > FAR
        both = (far_rows.any(dim=0) & far_keys.any(dim=0)).nonzero().flatten()
        powers, key_powers = torch.exp(2 * rows), torch.exp(2 * keys)
        for start in range(0, queries, at_once):
            at = slice(start, start + at_once)
            r = torch.addcmul(one, powers[at].unsqueeze(1), key_powers).reciprocal_()
            if len(both):
                # decided pair by pair, so that a pair's bits do not depend on which others are computed beside it
                exact = 0.5 - 0.5 * torch.tanh(rows[at, None][..., both] + keys[:, both])
                where = far_rows[at, None][..., both] & far_keys[:, both]
                r[..., both] = torch.where(where, exact, r[..., both])
            yield head, at, r
