"""Softmax attention and its gradients, densely.

Formulas (FlashAttention-2, arXiv 2307.08691, sections 2.1 and 3.1; λ is the scale, j what row i may see):

    S = λ Q Kᵀ         L_i = log Σ_j exp S_ij         P = exp(S − L)         O = P V
    dV = Pᵀ dO         Δ_i = Σ_d dO_id O_id           dS = P ∘ (dO Vᵀ − Δ + dL)
    dQ = λ dS K        dK = λ dSᵀ Q

dL is the gradient output_grad at the log-sum-exp: ∂L_i/∂S_ij = P_ij. The log-sum-exp is taken relative to the
row's maximum (Milakov and Gimelshein, arXiv 1805.02867, equation 3), so it does not overflow.

With all that may change the scores, T = λ Q Kᵀ and S = c tanh(T / c) − a_h |i − j| + r_h[i − j] + b_h[i, j]; the
tables' gradients are sums of dS, and dT = dS ∘ (1 − tanh²(T / c)). A sink s_h is one more score in L, without a value:
ds_h = −Σ_i exp(s_h − L_i) (Δ_i − dL_i). Dropout multiplies P by m, 0 or 1 / (1 − p), in O, dV and dO Vᵀ.

Additive scores (Bahdanau et al., arXiv 1409.0473): T = λ Σ_d a_hd t_ijd with t = tanh(q_id + k_jd) and λ = 1 unless
given, da = λ Σ_ij dT t, dq_id = λ a_hd Σ_j dT (1 − t²), dk the same over i. Predictive local attention (Luong et al.,
arXiv 1508.04025, equation 10) allows |j − c_i| ≤ w alone and multiplies P, as dropout does, by γ = exp(−(j − c_i)² /
2σ²), σ = w / 2; dc_i = Σ_j P γ (dO Vᵀ) (j − c_i) / σ².

A magnitude is the same formula with every factor absolute: the sum of the sizes of what is added up, which is
what rounding errors are proportional to, however much of it cancels:

    out: P |V|         dV: Pᵀ |dO|         E = P ∘ (|dO| |V|ᵀ + Σ_d |dO ∘ O| + |dL|)
    dQ: λ E |K|        dK: λ Eᵀ |Q|
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ringattn.errors import InputError
from ringattn.reference.hashes import hashed
from ringattn.reference.measure import (
    Allowed,
    Array,
    Bools,
    Evaluation,
    Gradients,
    Magnitudes,
    blocks,
    zeros,
)
from ringattn.reference.scoring import Additive, Inputs, Products, Scores, Slices, add, scored, store


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, allowed: Allowed, **scores: Any) -> tuple[Array, Array]:
    """Attention of q [B, Hq, Sq, D] over k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv]; ``scores`` as in `Scores`.

    Returns out [B, Hq, Sq, Dv] and lse [B, Hq, Sq] (natural log). A row without keys has out 0, lse −inf.
    """
    result = evaluate(q, k, v, allowed, **scores)
    return result.out, result.lse


def gradients(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike,
    dlse: ArrayLike | None = None,
    **scores: Any,
) -> Gradients:
    """The gradients of q, k and v when dout [B, Hq, Sq, Dv] arrives at out and dlse [B, Hq, Sq] at lse."""
    if dout is None:
        raise InputError("gradients needs dout, the gradient that arrives at the output; got None")
    return evaluate(q, k, v, allowed, dout, dlse, **scores).gradients


def magnitudes(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
    **scores: Any,
) -> Magnitudes:
    """The scale of rounding errors, to be given to `error`; without dout those of the gradients are 0."""
    return evaluate(q, k, v, allowed, dout, dlse, **scores).magnitudes


def evaluate(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
    **scores: Any,
) -> Evaluation:
    """Output, gradients and magnitudes from one pass over the rows; without dout and dlse gradients are 0."""
    x = Inputs.of(q, k, v, dout, dlse, Scores.checked(scores))
    values, sizes = (zeros(x.q, x.k, x.v, x.params) for _ in range(2))
    lse = np.full(x.q.shape[:3], -np.inf)
    if "sinks" in x.params:
        lse[:] = x.params["sinks"][:, None]
    group = x.q.shape[1] // x.k.shape[1]
    for rows, keys, block in blocks(x.q, x.k, allowed):
        for batch, head in np.ndindex(x.k.shape[:2]):
            at = Slices((batch, slice(head * group, (head + 1) * group), rows), (batch, head, keys))
            _block(x, at, block, lse, values, sizes)
    if "alibi" in x.params:
        values.params["alibi"][:] *= -1  # the slope times the distance is taken off the score
    if x.dout is not None and "sinks" in x.params:
        weight = np.exp(x.params["sinks"][:, None] - lse)
        terms = x.dout * values.out
        values.params["sinks"][:] = (weight * (x.dlse - terms.sum(axis=3))).sum(axis=(0, 2))
        sizes.params["sinks"][:] = (weight * (np.abs(x.dlse) + np.abs(terms).sum(axis=3))).sum(axis=(0, 2))
    return Evaluation(values.out, lse, Gradients(values.dq, values.dk, values.dv, values.params), sizes)


def kept(seed: int, probability: float, batch: int, heads: int, queries: ArrayLike, keys: ArrayLike) -> Bools:
    """Which weights dropout keeps, [batch, heads, queries, keys]: a hash of the seed and the global indices."""
    bits = hashed(seed, np.arange(batch), np.arange(heads), queries, keys)
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) >= round(probability * 2**53))


def _block(x: Inputs, at: Slices, allowed: Bools, lse: Array, values: Magnitudes, sizes: Magnitudes) -> None:
    """One block of r rows under n keys of one key head; its G query heads are G·r rows of the products."""
    q, k, v = x.q[at.q].reshape(-1, x.q.shape[3]), x.k[at.k], x.v[at.k]
    pairs = Additive.of(x, at, q, k) if "additive" in x.params else Products(q * x.scale, k * x.scale)
    scores, slope = scored(x, at, pairs.scores(k))
    offsets = _offsets_from_centres(x, at)
    if offsets is not None:
        scores[np.abs(offsets) > x.scores.width] = -np.inf
    p, row_lse = _softmax(scores, allowed, x.params["sinks"][at.heads] if "sinks" in x.params else None)
    given = p * _kept(x, at, p.shape) if x.scores.dropout else p
    if offsets is not None:
        given = given * np.exp(-(offsets**2) / (2 * x.variance))
    out = given @ v
    store(values.out, at, out)
    store(lse, at, row_lse)
    store(sizes.out, at, given @ np.abs(v))
    if x.dout is None:
        return
    dout = x.dout[at.q].reshape(out.shape)
    # the gradient of an unreachable row's lse goes nowhere, whatever it is (a loss over -inf sends NaN)
    dlse = np.where(np.isfinite(row_lse), x.dlse[at.q].reshape(-1), 0.0)
    keep = given / np.where(p == 0, 1, p)
    dp, sizes_of_dp = (dout @ v.T) * keep, (np.abs(dout) @ np.abs(v).T) * keep
    if offsets is not None:
        for sums, each, away in ((values, dp, offsets), (sizes, sizes_of_dp, np.abs(offsets))):
            store(sums.params["centres"], at, (p * each * away).sum(axis=1) / x.variance)
    ds = dp + (dlse - np.sum(dout * out, axis=1))[:, None]
    add(values, at, (p, given, slope), ds, pairs, dout)
    e = sizes_of_dp + (np.abs(dlse) + np.sum(np.abs(dout * out), axis=1))[:, None]
    add(sizes, at, (p, given, slope), e, pairs.sizes, np.abs(dout))


def _offsets_from_centres(x: Inputs, at: Slices) -> Array | None:
    """J − c_i, [G·r, n], of predictive local attention."""
    if "centres" not in x.params:
        return None
    keys = at.k[2]
    offsets: Array = np.arange(keys.start, keys.stop) - x.params["centres"][at.q].reshape(-1, 1)
    return offsets


def _kept(x: Inputs, at: Slices, shape: tuple[int, ...]) -> Array:
    """0 or 1 / (1 − p) for each weight, [G·r, n]."""
    queries, keys = (np.arange(each.start, each.stop) for each in (at.q[2], at.k[2]))
    keep = kept(x.scores.seed, x.scores.dropout, at.q[0] + 1, at.heads.stop, queries, keys)
    return keep[at.q[0], at.heads].reshape(shape) / (1 - x.scores.dropout)


def _softmax(scores: Array, allowed: Bools, sinks: Array | None) -> tuple[Array, Array]:
    """P, in place of scores [G·r, n], and L under allowed [r, n]; rows without keys give 0 and −inf."""
    np.copyto(scores.reshape(-1, *allowed.shape), -np.inf, where=~allowed)
    peak = scores.max(axis=1)
    sink = np.full_like(peak, -np.inf) if sinks is None else np.repeat(sinks, len(allowed))
    peak = np.maximum(peak, sink)
    peak[np.isneginf(peak)] = 0.0
    scores -= peak[:, None]
    np.exp(scores, out=scores)
    total = scores.sum(axis=1) + np.exp(sink - peak)
    scores /= np.where(total == 0.0, 1.0, total)[:, None]
    with np.errstate(divide="ignore"):
        return scores, peak + np.log(total)
