"""The dense oracle: exact attention and its gradients in float64 NumPy, straight from the formulas.

Everything else in the package is measured against this file, so it imports nothing of the package, knows no
ranks, plans or tiles, and never merges partial softmaxes: a block of rows sees all its keys at once. Only one
block of the score matrix exists at any time, so long sequences need time but little memory.

Arrays are anything `numpy.asarray` takes (NumPy has no bfloat16: convert such tensors to float32 first).

Shapes:  B batch, Hq query heads, Hkv key heads (Hq a multiple of Hkv; key head g serves the query heads
g·Hq/Hkv to (g+1)·Hq/Hkv − 1), Sq queries, Sk keys, D size of a query and key, Dv size of a value.

Formulas (FlashAttention-2, arXiv 2307.08691, sections 2.1 and 3.1; λ is the scale, j what row i may see):

    S = λ Q Kᵀ         L_i = log Σ_j exp S_ij         P = exp(S − L)         O = P V
    dV = Pᵀ dO         Δ_i = Σ_d dO_id O_id           dS = P ∘ (dO Vᵀ − Δ + dL)
    dQ = λ dS K        dK = λ dSᵀ Q

dL is the gradient arriving at the log-sum-exp: ∂L_i/∂S_ij = P_ij. The log-sum-exp is taken relative to the
row's maximum (Milakov and Gimelshein, arXiv 1805.02867, equation 3), so it does not overflow.

A magnitude is the same formula with every factor absolute: the sum of the sizes of what is added up, which is
what rounding errors are proportional to, however much of it cancels:

    out: P |V|         dV: Pᵀ |dO|         E = P ∘ (|dO| |V|ᵀ + Σ_d |dO ∘ O| + |dL|)
    dQ: λ E |K|        dK: λ Eᵀ |Q|
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]
Allowed: TypeAlias = ArrayLike | Callable[[int, int], ArrayLike]
"""Which pairs count: a boolean [Sq, Sk], or a function (start, stop) -> boolean [stop − start, Sk]."""

_BLOCK_ELEMENTS = 1 << 21  # scores of one key head held at once (16 MiB): larger blocks gain nothing


@dataclass(frozen=True)
class Gradients:
    """dq [B, Hq, Sq, D], dk [B, Hkv, Sk, D], dv [B, Hkv, Sk, Dv]."""

    dq: Array
    dk: Array
    dv: Array


@dataclass(frozen=True)
class Magnitudes:
    """The scale of rounding errors in out [B, Hq, Sq, Dv], dq, dk and dv (shaped as in `Gradients`)."""

    out: Array
    dq: Array
    dk: Array
    dv: Array


@dataclass(frozen=True)
class Evaluation:
    """All there is to compare with, from one pass over the rows: out [B, Hq, Sq, Dv], lse [B, Hq, Sq]."""

    out: Array
    lse: Array
    gradients: Gradients
    magnitudes: Magnitudes


def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, allowed: Allowed, *, scale: float | None = None
) -> tuple[Array, Array]:
    """Attention of q [B, Hq, Sq, D] over k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv]; scale 1/√D unless given.

    Returns out [B, Hq, Sq, Dv] and lse [B, Hq, Sq] (natural log). A row without keys has out 0, lse −inf.
    """
    result = _walk(_Inputs.of(q, k, v, None, None, scale), allowed, measure=False)
    return result.out, result.lse


def gradients(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike,
    dlse: ArrayLike | None = None,
    *,
    scale: float | None = None,
) -> Gradients:
    """The gradients of q, k and v when dout [B, Hq, Sq, Dv] arrives at out and dlse [B, Hq, Sq] at lse."""
    return _walk(_Inputs.of(q, k, v, dout, dlse, scale), allowed, measure=False).gradients


def magnitudes(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
    *,
    scale: float | None = None,
) -> Magnitudes:
    """The scale of rounding errors, to be given to `error`; without dout those of the gradients are 0."""
    return evaluate(q, k, v, allowed, dout, dlse, scale=scale).magnitudes


def evaluate(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    allowed: Allowed,
    dout: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
    *,
    scale: float | None = None,
) -> Evaluation:
    """Output, gradients and magnitudes from one pass over the rows; without dout and dlse gradients are 0."""
    return _walk(_Inputs.of(q, k, v, dout, dlse, scale), allowed, measure=True)


def error(actual: ArrayLike, expected: ArrayLike, magnitude: ArrayLike) -> float:
    """‖actual − expected‖ / ‖magnitude‖, a multiple of the precision of whatever computed `actual`.

    Equal infinities (the lse of unreachable rows) are no difference and add nothing to the magnitude; any
    other infinity or NaN gives inf, and so does a difference where nothing was to be added up. 0 when both
    norms are 0.
    """
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != e.shape:
        raise ValueError(f"cannot compare shape {a.shape} with the expected {e.shape}")
    difference = np.subtract(a, e, out=np.zeros_like(e), where=a != e)
    if not np.isfinite(difference).all():
        return float("inf")
    sizes = np.asarray(magnitude, dtype=np.float64)
    numerator = float(np.linalg.norm(difference))
    denominator = float(np.linalg.norm(sizes[np.isfinite(sizes)]))
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else float("inf")
    return numerator / denominator


class _Inputs(NamedTuple):
    """Checked float64 inputs; dout is None when only the forward is asked for."""

    q: Array
    k: Array
    v: Array
    dout: Array | None
    dlse: Array
    scale: float

    @staticmethod
    def of(
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        dout: ArrayLike | None,
        dlse: ArrayLike | None,
        scale: float | None,
    ) -> _Inputs:
        query, key, value = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        if not query.ndim == key.ndim == value.ndim == 4:
            raise ValueError(f"q, k, v need 4 dims; got shapes {query.shape}, {key.shape}, {value.shape}")
        fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
        if not fits or key.shape[:3] != value.shape[:3]:
            raise ValueError(f"shapes disagree: q {query.shape}, k {key.shape}, v {value.shape}")
        if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
            raise ValueError(f"{query.shape[1]} query heads cannot be shared among {key.shape[1]} key heads")
        rows = query.shape[:3]
        arriving = None
        if dout is not None or dlse is not None:
            arriving = np.zeros((*rows, value.shape[3])) if dout is None else np.asarray(dout, dtype=np.float64)
        on_lse = np.zeros(rows) if dlse is None else np.asarray(dlse, dtype=np.float64)
        return _Inputs(query, key, value, arriving, on_lse, query.shape[3] ** -0.5 if scale is None else scale)


class _Spot(NamedTuple):
    """Where a block lies: `q` indexes what has query heads and rows, `k` what has key heads and keys."""

    q: tuple[int, slice, slice]
    k: tuple[int, int, slice]


def _walk(x: _Inputs, allowed: Allowed, *, measure: bool) -> Evaluation:
    out_shape = (*x.q.shape[:3], x.v.shape[3])
    values, sizes = (
        Magnitudes(np.zeros(out_shape), np.zeros_like(x.q), np.zeros_like(x.k), np.zeros_like(x.v)) for _ in range(2)
    )
    lse = np.full(out_shape[:3], -np.inf)
    group = x.q.shape[1] // x.k.shape[1]
    for rows, keys, block in _blocks(x, allowed):
        for batch, head in np.ndindex(x.k.shape[:2]):
            spot = _Spot((batch, slice(head * group, (head + 1) * group), rows), (batch, head, keys))
            _block(x, spot, block, lse, values, sizes if measure else None)
    return Evaluation(values.out, lse, Gradients(values.dq, values.dk, values.dv), sizes)


def _blocks(x: _Inputs, allowed: Allowed) -> Iterator[tuple[slice, slice, NDArray[np.bool_]]]:
    """Blocks of rows, each with the span of keys that its rows may see; blocks that see none are left out."""
    heads, length, keys = x.q.shape[1] // x.k.shape[1], x.q.shape[2], x.k.shape[2]
    if not callable(allowed):
        dense = np.asarray(allowed)
        if dense.shape != (length, keys):
            raise ValueError(f"allowed needs shape {(length, keys)}; got {dense.shape}")
    size = max(1, min(256, _BLOCK_ELEMENTS // max(1, heads * keys)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        block = np.asarray(allowed(start, stop)) if callable(allowed) else dense[start:stop]
        if block.dtype != np.bool_ or block.shape != (stop - start, keys):
            raise ValueError(
                f"allowed needs booleans of shape {(stop - start, keys)} for rows {start} to {stop}; "
                f"got {block.dtype} of shape {block.shape}"
            )
        touched = np.flatnonzero(block.any(axis=0))
        if touched.size:
            span = slice(int(touched[0]), int(touched[-1]) + 1)
            yield slice(start, stop), span, block[:, span]


def _block(
    x: _Inputs,
    spot: _Spot,
    allowed: NDArray[np.bool_],
    lse: Array,
    values: Magnitudes,
    sizes: Magnitudes | None,
) -> None:
    """One block of r rows under n keys of one key head; its G query heads are G·r rows of the products."""
    q, k, v = x.q[spot.q].reshape(-1, x.q.shape[3]) * x.scale, x.k[spot.k], x.v[spot.k]
    p, row_lse = _softmax(q @ k.T, allowed)
    out = p @ v
    _store(values.out, spot, out)
    _store(lse, spot, row_lse)
    if sizes is not None:
        _store(sizes.out, spot, p @ np.abs(v))
    if x.dout is None:
        return
    dout, k = x.dout[spot.q].reshape(out.shape), k * x.scale
    # the gradient of an unreachable row's lse goes nowhere, whatever it is (a loss over -inf sends NaN)
    dlse = np.where(np.isfinite(row_lse), x.dlse[spot.q].reshape(-1), 0.0)
    ds = dout @ v.T
    ds += (dlse - np.sum(dout * out, axis=1))[:, None]
    _add(values, spot, p, ds, q, k, dout)
    if sizes is not None:
        e = np.abs(dout) @ np.abs(v).T
        e += (np.abs(dlse) + np.sum(np.abs(dout * out), axis=1))[:, None]
        _add(sizes, spot, p, e, np.abs(q), np.abs(k), np.abs(dout))


def _softmax(scores: Array, allowed: NDArray[np.bool_]) -> tuple[Array, Array]:
    """P, in place of scores [G·r, n], and L under allowed [r, n]; rows without keys give 0 and −inf."""
    np.copyto(scores.reshape(-1, *allowed.shape), -np.inf, where=~allowed)
    peak = scores.max(axis=1)
    peak[np.isneginf(peak)] = 0.0
    scores -= peak[:, None]
    np.exp(scores, out=scores)
    total = scores.sum(axis=1)
    scores /= np.where(total == 0.0, 1.0, total)[:, None]
    with np.errstate(divide="ignore"):
        return scores, peak + np.log(total)


def _add(sums: Magnitudes, spot: _Spot, p: Array, dp: Array, q: Array, k: Array, dout: Array) -> None:
    """Add a block's part to the gradients, with q and k times λ: dV += Pᵀ dO, dQ = dS λK, dK += dSᵀ λQ."""
    ds = np.multiply(p, dp, out=dp)
    _store(sums.dq, spot, ds @ k)
    sums.dk[spot.k] += ds.T @ q
    sums.dv[spot.k] += p.T @ dout


def _store(whole: Array, spot: _Spot, rows: Array) -> None:
    whole[spot.q] = rows.reshape(whole[spot.q].shape)
