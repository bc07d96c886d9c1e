"""α-entmax, densely: weights that sum to 1 and are 0 for low scores (Peters et al., arXiv 1905.05702, equation 10).

    Z = (α − 1) S        W = [Z − τ]₊^(1 / (α − 1)), τ by bisection so that rows sum to 1        O = W V
    U = W^(2 − α) where W > 0 (their equation 12)        M = U V / Σ_j U        δ_i = Σ_d G_id M_id
    dV = Wᵀ G        dS = U ∘ (G Vᵀ − δ)        dα = Σ_ij (W − (α − 1) W ln W) / (α − 1)² ∘ (G Vᵀ − δ)

(the last: Correia, Niculae and Martins, arXiv 1909.00015, proposition 1). Magnitudes are the same with every factor
absolute, as in `softmax`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ringattn.errors import InputError
from ringattn.reference.measure import (
    Allowed,
    Array,
    Bools,
    Evaluation,
    Gradients,
    Magnitudes,
    blocks,
    floats,
    zeros,
)
from ringattn.reference.scoring import Additive, Inputs, Products, Scores, Slices, add, scored, store


def entmax(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    *,
    alpha: ArrayLike = 1.5,
    **scores: Any,
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`. ``scores`` as in `Scores`, of which it has those
    that make scores. ``alpha``, above 1 and at most 2, is a number, or [Hq] and has a gradient.
    """
    x = Inputs.of(q, k, v, dout, None, Scores.checked(scores))
    alphas = np.broadcast_to(floats(alpha, "alpha"), x.q.shape[1])
    if not ((alphas > 1) & (alphas <= 2)).all():
        raise InputError(f"alpha must be above 1 and at most 2; got {alphas}")
    learned = {"alpha": alphas} if np.ndim(alpha) else {}
    values, sizes = (zeros(x.q, x.k, x.v, x.params | learned) for _ in range(2))
    group = x.q.shape[1] // x.k.shape[1]
    for rows, keys, block in blocks(x.q, x.k, allowed):
        for batch, head in np.ndindex(x.k.shape[:2]):
            at = Slices((batch, slice(head * group, (head + 1) * group), rows), (batch, head, keys))
            _block(x, at, block, alphas[at.heads] - 1, values, sizes)
    if "alibi" in x.params:
        values.params["alibi"][:] *= -1  # the slope times the distance is taken off the score
    none = np.full(values.out.shape[:3], np.nan)
    return Evaluation(values.out, none, Gradients(values.dq, values.dk, values.dv, values.params), sizes)


def _block(x: Inputs, at: Slices, allowed: Bools, less_1: Array, values: Magnitudes, sizes: Magnitudes) -> None:
    """One block of r rows under n keys of one key head; its G query heads are G·r rows of the products."""
    q, k, v = x.q[at.q].reshape(-1, x.q.shape[3]), x.k[at.k], x.v[at.k]
    pairs = Additive.of(x, at, q, k) if "additive" in x.params else Products(q * x.scale, k * x.scale)
    scores, slope = scored(x, at, pairs.scores(k))
    np.copyto(scores.reshape(-1, *allowed.shape), -np.inf, where=~allowed)
    by = np.repeat(less_1, len(allowed))[:, None]
    weights, slopes = _weights(scores, by)
    share = slopes / np.maximum(slopes.sum(axis=1, keepdims=True), 1)
    out = weights @ v
    store(values.out, at, out)
    store(sizes.out, at, weights @ np.abs(v))
    if x.dout is None:
        return
    dout = x.dout[at.q].reshape(out.shape)
    by_alpha = weights * (1 - by * np.log(np.where(weights > 0, weights, 1))) / by**2
    for sums, each, values_of, g, sign in (
        (values, pairs, v, dout, -1),
        (sizes, pairs.sizes, np.abs(v), np.abs(dout), 1),
    ):
        dweights = g @ values_of.T + sign * (g * (share @ values_of)).sum(axis=1, keepdims=True)
        if "alpha" in sums.params:
            sums.params["alpha"][at.heads] += (by_alpha * dweights).reshape(len(less_1), -1).sum(axis=1)
        add(sums, at, (slopes, weights, slope), dweights, each, g)


def _weights(scores: Array, by: Array) -> tuple[Array, Array]:
    """The weights of each row, and their slopes: both 0 for a row that no key may reach. ``by`` is α − 1."""
    z = by * scores
    top = z.max(axis=1, keepdims=True, initial=-np.inf)
    above = z - np.where(np.isfinite(top), top, 0)  # of the largest score: the threshold is in (-1, 0]
    low, high = np.full_like(top, -1.0), np.zeros_like(top)
    for _ in range(64):
        middle = (low + high) / 2
        enough = (np.maximum(above - middle, 0) ** (1 / by)).sum(axis=1, keepdims=True) >= 1
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    weights = np.maximum(above - low, 0) ** (1 / by)
    return weights, np.where(weights > 0, weights, 1) ** (1 - by) * (weights > 0)
