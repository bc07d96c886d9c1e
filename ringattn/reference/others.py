"""Mechanisms that are not softmax, densely.

Hard attention takes the value of the key with the largest λ q·k, of equal ones the first; its gradient goes to that
value and nowhere else.

Linear attention (Katharopoulos et al., arXiv 2006.16236, equation 8), with φ(x) = elu(x) + 1 and j what row i may see:

    W_ij = φ(q_i)·φ(k_j)        d_i = Σ_j W_ij        O = W V / d        G = dO / d        g_i = −Σ_d G_id O_id
    dV = Wᵀ G        dW = G Vᵀ + g        dQ = φ'(Q) ∘ (dW φ(K))        dK = φ'(K) ∘ (dWᵀ φ(Q))

Magnitudes are the same with every factor absolute, as in `softmax`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

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
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`. Only the scale's sign matters, None is positive."""
    query, key, value = checked(q, k, v)
    query = query * (query.shape[3] ** -0.5 if scale is None else finite(scale, "scale"))
    output_grad = output_gradient(dout, query, value)
    values, sizes = (zeros(query, key, value, {}) for _ in range(2))
    group = query.shape[1] // key.shape[1]
    for rows, keys, block in blocks(query, key, allowed):
        seen = np.flatnonzero(block.any(axis=1))
        for batch, head in np.ndindex(query.shape[:2]):
            columns = key[batch, head // group, keys]
            scores = np.zeros(block.shape)
            for d in range(query.shape[3]):  # term by term, in order: equal keys get equal scores, to the bit
                scores += query[batch, head, rows, d, None] * columns[:, d]
            scores[~block] = -np.inf
            winner = keys.start + scores.argmax(axis=1)[seen]
            at = rows.start + seen
            values.out[batch, head, at] = value[batch, head // group, winner]
            np.add.at(values.dv[batch, head // group], winner, output_grad[batch, head, at])
            np.add.at(sizes.dv[batch, head // group], winner, np.abs(output_grad[batch, head, at]))
    np.copyto(sizes.out, np.abs(values.out))
    return _evaluation(values, sizes)


def linear(q: ArrayLike, k: ArrayLike, v: ArrayLike, allowed: Allowed, dout: ArrayLike | None = None) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`."""
    query, key, value = checked(q, k, v)
    output_grad = output_gradient(dout, query, value)
    values, sizes = (zeros(query, key, value, {}) for _ in range(2))
    group = query.shape[1] // key.shape[1]
    for rows, keys, block in blocks(query, key, allowed):
        for batch, head in np.ndindex(query.shape[:2]):
            at, of = (batch, head, rows), (batch, head // group, keys)
            weights = (_phi(query[at]) @ _phi(key[of]).T) * block
            total = weights.sum(axis=1)[:, None]
            total[total == 0] = 1
            out = weights @ value[of] / total
            values.out[at], sizes.out[at] = out, weights @ np.abs(value[of]) / total
            g = output_grad[at] / total
            ds = g @ value[of].T - (g * out).sum(axis=1)[:, None]
            e = np.abs(g) @ np.abs(value[of]).T + np.abs(g * out).sum(axis=1)[:, None]
            for sums, each, sent in ((values, ds * block, g), (sizes, e * block, np.abs(g))):
                _add(sums, at, of, (weights, each), (query[at], key[of]), sent)
    return _evaluation(values, sizes)


def _evaluation(values: Magnitudes, sizes: Magnitudes) -> Evaluation:
    none = np.full(values.out.shape[:3], np.nan)
    return Evaluation(values.out, none, Gradients(values.dq, values.dk, values.dv), sizes)


def _add(
    sums: Magnitudes,
    at: tuple[int, int, slice],
    of: tuple[int, int, slice],
    weights: tuple[Array, Array],
    inputs: tuple[Array, Array],
    dout: Array,
) -> None:
    q, k = inputs
    sums.dq[at] = _slope(q) * (weights[1] @ _phi(k))
    sums.dk[of] += _slope(k) * (weights[1].T @ _phi(q))
    sums.dv[of] += weights[0].T @ dout


def _phi(x: Array) -> Array:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _slope(x: Array) -> Array:
    return np.exp(np.minimum(x, 0))
