"""α-entmax, densely: weights that sum to 1 and are 0 for low scores (Peters et al., arXiv 1905.05702, equation 10).

    Z = (α − 1) λ Q Kᵀ        W = [Z − τ]₊^(1 / (α − 1)), τ by bisection so that rows sum to 1        O = W V
    U = W^(2 − α) where W > 0 (their equation 12)        M = U V / Σ_j U        δ_i = Σ_d G_id M_id
    dV = Wᵀ G        dS = U ∘ (G Vᵀ − δ)        dQ = λ dS K        dK = λ dSᵀ Q

Magnitudes are the same with every factor absolute, as in `softmax`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ringattn.errors import InputError
from ringattn.reference.measure import (
    Allowed,
    Array,
    Bools,
    Evaluation,
    Gradients,
    blocks,
    checked,
    finite,
    output_gradient,
    zeros,
)


def entmax(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`. ``alpha`` is above 1, and at most 2."""
    query, key, value = checked(q, k, v)
    alpha = finite(alpha, "alpha")
    if not 1 < alpha <= 2:
        raise InputError(f"alpha must be above 1 and at most 2; got {alpha}")
    factor = query.shape[3] ** -0.5 if scale is None else finite(scale, "scale")
    output_grad = output_gradient(dout, query, value)
    values, sizes = (zeros(query, key, value, {}) for _ in range(2))
    group = query.shape[1] // key.shape[1]
    for rows, keys, block in blocks(query, key, allowed):
        for batch, head in np.ndindex(query.shape[:2]):
            at, of = (batch, head, rows), (batch, head // group, keys)
            scores = factor * (query[at] @ key[of].T)
            weights, slopes = _weights(scores, block, alpha)
            share = slopes / np.maximum(slopes.sum(axis=1), 1)[:, None]
            inputs = query[at], key[of], value[of], output_grad[at]
            for sums, (qs, ks, vs, g), sign in ((values, inputs, -1), (sizes, map(np.abs, inputs), 1)):
                ds = factor * slopes * (g @ vs.T + sign * (g * (share @ vs)).sum(axis=1)[:, None])
                ds = ds if sums is values else np.abs(ds)
                sums.out[at] = weights @ vs
                sums.dq[at] += ds @ ks
                sums.dk[of] += ds.T @ qs
                sums.dv[of] += weights.T @ g
    none = np.full(values.out.shape[:3], np.nan)
    return Evaluation(values.out, none, Gradients(values.dq, values.dk, values.dv), sizes)


def _weights(scores: Array, allowed: Bools, alpha: float) -> tuple[Array, Array]:
    """The weights of each row, and their slopes: both 0 for a row that no key may reach."""
    z = np.where(allowed, (alpha - 1) * scores, -np.inf)
    top = z.max(axis=1, initial=-np.inf)
    above = z - np.where(np.isfinite(top), top, 0)[:, None]  # of the largest score: the threshold is in (-1, 0]
    power = 1 / (alpha - 1)
    low, high = np.full(len(z), -1.0), np.zeros(len(z))
    for _ in range(64):
        middle = (low + high) / 2
        enough = (np.maximum(above - middle[:, None], 0) ** power).sum(axis=1) >= 1
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    weights = np.maximum(above - low[:, None], 0) ** power
    return weights, np.where(weights > 0, weights, 1) ** (2 - alpha) * (weights > 0)
