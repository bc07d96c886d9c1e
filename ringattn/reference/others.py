"""Mechanisms that are not softmax, densely.

Hard attention takes the value of the key with the largest λ q·k, of equal ones the first; its gradient goes to that
value and nowhere else. Of the `top` largest it takes the values by the softmax of their scores, which has a gradient.
Sampled attention is hard attention with Gumbel noise ``-ln(-ln u)`` added to the scores, which makes the choice a draw
from their softmax (Gumbel, 1954; Maddison, Tarlow and Minka, arXiv 1411.0030, section 2).

Linear attention (Katharopoulos et al., arXiv 2006.16236, equation 8), with φ(x) = elu(x) + 1 and j what row i may see:

    W_ij = φ(q_i)·φ(k_j)        d_i = Σ_j W_ij        O = W V / d        G = dO / d        g_i = −Σ_d G_id O_id
    dV = Wᵀ G        dW = G Vᵀ + g        dQ = φ'(Q) ∘ (dW φ(K))        dK = φ'(K) ∘ (dWᵀ φ(Q))

φ may also be (1, x / |x|), the first-order Taylor series of the exponential (arXiv 2007.14902, equation 16), or the
identity, of features that were computed before.

Magnitudes are the same with every factor absolute, as in `softmax`; those of a denominator whose terms cancel come in
by their ratio to it, once for each time that it divides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from ringattn.reference.hashes import hashed
from ringattn.reference.measure import (
    Allowed,
    Array,
    Evaluation,
    Gradients,
    Magnitudes,
    blocks,
    checked,
    finite,
    output_gradient,
    zeros,
)


def hard(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    *,
    scale: float | None = None,
    top: int = 1,
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`. Queries and keys have no gradient where top is 1."""
    return _best(q, k, v, allowed, dout, scale, lambda *_: 0.0, top)


def sampled(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    *,
    seed: int,
    scale: float | None = None,
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`. Queries and keys have no gradient."""

    def noise(batch: int, head: int, rows: slice, keys: slice) -> Array:
        positions = np.arange(rows.start, rows.stop), np.arange(keys.start, keys.stop)
        bits = hashed(seed ^ 0x5851F42D4C957F2D, [batch], [head], *positions)[0, 0] >> np.uint64(12)
        return np.asarray(-np.log(-np.log((bits.astype(np.float64) + 0.5) / 2**52)))

    return _best(q, k, v, allowed, dout, scale, noise)


def _best(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None,
    scale: float | None,
    noise: Callable[[int, int, slice, slice], Array | float],
    top: int = 1,
) -> Evaluation:
    """The values of the keys whose score and noise, by batch, head, rows and keys, are largest."""
    query, key, value = checked(q, k, v)
    factor = query.shape[3] ** -0.5 if scale is None else finite(scale, "scale")
    output_grad = output_gradient(dout, query, value)
    values, sizes = (zeros(query, key, value, {}) for _ in range(2))
    group = query.shape[1] // key.shape[1]
    for rows, keys, block in blocks(query, key, allowed):
        for batch, head in np.ndindex(query.shape[:2]):
            at, of = (batch, head, rows), (batch, head // group, keys)
            scores = np.zeros(block.shape)
            for d in range(query.shape[3]):  # term by term, in order: equal keys get equal scores, to the bit
                scores += factor * query[at][:, d, None] * key[of][:, d]
            scores += noise(batch, head, rows, keys)
            scores[~block] = -np.inf
            weights = _softmax_of_best(scores, top)
            inputs = query[at], key[of], value[of], output_grad[at]
            for sums, (qs, ks, vs, g), sign in ((values, inputs, -1), (sizes, map(np.abs, inputs), 1)):
                sums.out[at] = weights @ vs
                sums.dv[of] += weights.T @ g
                if top > 1:
                    ds = weights * (g @ vs.T + sign * (g * sums.out[at]).sum(axis=1)[:, None])
                    ds *= factor if sums is values else abs(factor)
                    sums.dq[at] += ds @ ks
                    sums.dk[of] += ds.T @ qs
    return _evaluation(values, sizes)


def _softmax_of_best(scores: Array, top: int) -> Array:
    """The softmax of each row's largest scores, of equal ones the first; 0 for all others."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    chosen = np.take_along_axis(scores, best, axis=1)
    peak = chosen[:, :1]
    weights = np.where(np.isfinite(chosen), np.exp(chosen - np.where(np.isfinite(peak), peak, 0)), 0)
    found = np.zeros_like(scores)
    np.put_along_axis(found, best, weights / np.maximum(weights.sum(axis=1, keepdims=True), 1), axis=1)
    return found


def linear(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    *,
    features: str = "elu",
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`. ``features`` is elu, taylor or given."""
    query, key, value = checked(q, k, v)
    phi, back, back_size = _FEATURES[features]
    output_grad = output_gradient(dout, query, value)
    values, sizes = (zeros(query, key, value, {}) for _ in range(2))
    group = query.shape[1] // key.shape[1]
    for rows, keys, block in blocks(query, key, allowed):
        for batch, head in np.ndindex(query.shape[:2]):
            at, of = (batch, head, rows), (batch, head // group, keys)
            fq, fk = phi(query[at]), phi(key[of])
            weights, most = (fq @ fk.T) * block, (np.abs(fq) @ np.abs(fk).T) * block
            total = weights.sum(axis=1)[:, None]
            total[total == 0] = 1
            ratio = np.maximum(most.sum(axis=1)[:, None] / np.abs(total), 1)
            out = weights @ value[of] / total
            values.out[at], sizes.out[at] = out, ratio * (most @ np.abs(value[of])) / np.abs(total)
            g = output_grad[at] / total
            size = ratio * np.abs(g)
            ds = (g @ value[of].T - (g * out).sum(axis=1)[:, None]) * block
            e = (size @ np.abs(value[of]).T + (size * sizes.out[at]).sum(axis=1)[:, None]) * block
            values.dv[of] += weights.T @ g
            sizes.dv[of] += most.T @ size
            values.dq[at] = back(query[at], ds @ fk)
            values.dk[of] += back(key[of], ds.T @ fq)
            sizes.dq[at] = back_size(query[at], e @ np.abs(fk))
            sizes.dk[of] += back_size(key[of], e.T @ np.abs(fq))
    return _evaluation(values, sizes)


def _evaluation(values: Magnitudes, sizes: Magnitudes) -> Evaluation:
    none = np.full(values.out.shape[:3], np.nan)
    return Evaluation(values.out, none, Gradients(values.dq, values.dk, values.dv), sizes)


def _elu(x: Array) -> Array:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _elu_back(x: Array, slope: Array) -> Array:
    return np.exp(np.minimum(x, 0)) * slope


def _taylor(x: Array) -> Array:
    return np.concatenate([np.ones_like(x[..., :1]), x / _length(x)], axis=-1)


def _taylor_back(x: Array, slope: Array) -> Array:
    direction, slope = x / _length(x), slope[..., 1:]
    back: Array = (slope - direction * (direction * slope).sum(axis=-1, keepdims=True)) / _length(x)
    return back


def _taylor_size(x: Array, size: Array) -> Array:
    direction, size = np.abs(x) / _length(x), size[..., 1:]
    back: Array = (size + direction * (direction * size).sum(axis=-1, keepdims=True)) / _length(x)
    return back


def _length(x: Array) -> Array:
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return np.where(length == 0, np.inf, length)


def _given(x: Array) -> Array:
    return x


def _given_back(_: Array, slope: Array) -> Array:
    return slope


_FEATURES = {
    "elu": (_elu, _elu_back, _elu_back),
    "taylor": (_taylor, _taylor_back, _taylor_size),
    "given": (_given, _given_back, _given_back),
}
"""By name: phi, the gradient of x from that of phi(x), and its magnitude from that magnitude."""
