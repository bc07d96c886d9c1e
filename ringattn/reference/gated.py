"""Gated linear attention with a scalar decay, densely.

With A the cumulative sums of the log decays (Dao and Gu, arXiv 2405.21060, equation 16: the mask L of a semiseparable
matrix) and j what row i may see, none of them later:

    L_ij = exp(A_i - A_j)        W_ij = λ q_i·k_j L_ij        O = W V        dW = dO Vᵀ
    dV = Wᵀ dO        dQ = λ (dW ∘ L) K        dK = λ (dW ∘ L)ᵀ Q        dA_i = Σ_j (dW ∘ W)_ij − Σ_j (dW ∘ W)_ji

and the gradient of a log decay is the sum of dA from its token on. Magnitudes are the same with every factor absolute.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ringattn.reference.measure import (
    Allowed,
    Evaluation,
    Gradients,
    blocks,
    checked,
    finite,
    floats,
    output_gradient,
    zeros,
)


def gated(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    *,
    log_decay: ArrayLike | None = None,
    scale: float | None = None,
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`, ``log_decay`` [B, Hkv, S], -800 at least."""
    query, key, value = checked(q, k, v)
    factor = query.shape[3] ** -0.5 if scale is None else finite(scale, "scale")
    output_grad = output_gradient(dout, query, value)
    given = floats(np.zeros(key.shape[:3]) if log_decay is None else log_decay, "log_decay", key.shape[:3])
    sums = np.cumsum(np.maximum(given, -800), axis=2)
    values, sizes = (zeros(query, key, value, {"log_decay": given}) for _ in range(2))
    group = query.shape[1] // key.shape[1]
    for rows, keys, block in blocks(query, key, allowed):
        for batch, head in np.ndindex(query.shape[:2]):
            at, of = (batch, head, rows), (batch, head // group, keys)
            exponents = np.zeros(block.shape)
            if log_decay is not None:
                exponents = sums[batch, head // group, rows, None] - sums[of]
            decays = factor * np.exp(np.where(block, exponents, -np.inf))
            g = output_grad[at]
            for found, sign, (a, b, c, d) in (
                (values, -1, (query[at], key[of], value[of], g)),
                (sizes, 1, tuple(np.abs(x) for x in (query[at], key[of], value[of], g))),
            ):
                slopes = decays if sign < 0 else np.abs(decays)
                weights, dproducts = (a @ b.T) * slopes, (d @ c.T) * slopes
                found.out[at] = weights @ c
                found.dv[of] += weights.T @ d
                found.dq[at] = dproducts @ b
                found.dk[of] += dproducts.T @ a
                if log_decay is None:
                    continue
                each, total = dproducts * (a @ b.T), found.params["log_decay"][batch, head // group]
                total[rows] += each.sum(axis=1)
                total[keys] += sign * each.sum(axis=0)
    for found in (values, sizes):
        np.copyto(found.params["log_decay"], np.cumsum(found.params["log_decay"][..., ::-1], axis=2)[..., ::-1])
    values.params["log_decay"][given < -800] = 0
    params = {} if log_decay is None else values.params
    none = np.full(values.out.shape[:3], np.nan)
    return Evaluation(values.out, none, Gradients(values.dq, values.dk, values.dv, params), sizes)
