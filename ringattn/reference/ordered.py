"""Monotonic attention and MoChA, pair by pair, as their papers have them.

Raffel et al., arXiv 1704.00784, section 2.3: with p_ij = sigmoid(e_ij), r_ij the probability that the search of row i
gets to key j, and a_-1 = 1 at key 0,

    r_ij = (1 - p_i,j-1) r_i,j-1 + a_i-1,j        a_ij = p_ij r_ij        O_i = sum_j w_ij v_j

w = a. MoChA (Chiu and Raffel, arXiv 1712.05382, equations 20 to 23), with the softmax s of the energies u over the W
keys from n - W + 1 to n, has w_il = sum_n a_in s_i,n,l. Gradients, with the letters of gradients d and G = dO:

    dw = G Vᵀ        da_in = sum_l s_i,n,l dw_il        du_il = sum_n a_in s_i,n,l (dw_il - da_in)
    dr_ij = p_ij (da_ij + dr_i+1,j) + (1 - p_ij) dr_i,j+1
    de_ij = p_ij (1 - p_ij) r_ij (da_ij + dr_i+1,j - dr_i,j+1)

Magnitudes are the same with every factor absolute, as in `softmax`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from ringattn.reference.measure import (
    Array,
    Evaluation,
    Gradients,
    Magnitudes,
    checked,
    finite,
    floats,
    output_gradient,
)


def monotonic(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    dout: ArrayLike | None = None,
    *,
    scale: float | None = None,
    bias: ArrayLike | None = None,
    hard: bool = False,
    width: int = 1,
    chunk_dim: int = 0,
    chunk_scale: float | None = None,
) -> Evaluation:
    """Output, gradients and magnitudes; shapes as for `evaluate`.

    Args:
        scale, bias: of the energies ``scale q . k + bias``, the bias ``[Hq]``; None for 1 / sqrt of their dims and 0.
        hard: p is 1 where the energy is above 0, and 0 elsewhere.
        width: W; 1 is monotonic attention without chunks.
        chunk_dim, chunk_scale: how many of the last dims make u, and those alone; 0 for all dims in both energies.
    """
    query, key, value = checked(q, k, v)
    output_grad = output_gradient(dout, query, value)
    heads, dim = query.shape[1], query.shape[3]
    key, value = (np.repeat(x, heads // x.shape[1], axis=1) for x in (key, value))
    first, last = slice(0, dim - chunk_dim), slice(dim - (chunk_dim or dim), dim)
    scales = [
        (part.stop - part.start) ** -0.5 if given is None else finite(given, "scale")
        for part, given in ((first, scale), (last, chunk_scale))
    ]
    added = 0.0 if bias is None else floats(bias, "bias", (heads,))[:, None, None]
    energies = scales[0] * query[..., first] @ _turned(key[..., first]) + added
    chunk = scales[1] * query[..., last] @ _turned(key[..., last])
    p = (energies > 0).astype(np.float64) if hard else 1 / (1 + np.exp(-np.clip(energies, -700, 700)))
    rest = 1 - p if hard else 1 / (1 + np.exp(np.clip(energies, -700, 700)))
    reached = _reached(p, rest)
    windows = list(_windows(chunk, width))
    weights = np.zeros_like(p)
    for keys, end, share in windows:
        weights[..., keys] += (p * reached)[..., end, None] * share
    made = []
    for of, sign in ((np.array, -1), (np.abs, 1)):  # values, and magnitudes
        dweights = of(output_grad) @ _turned(of(value))
        da, du = _through_windows(p * reached, dweights, windows, sign)
        de = _through_rows(p, rest, da, sign) * (p * rest * reached)
        dq, dk = np.zeros_like(query), np.zeros_like(key)
        for grad, dims, factor in ((de, first, of(scales[0])), (du, last, of(scales[1]))):
            dq[..., dims] += factor * grad @ of(key[..., dims])
            dk[..., dims] += factor * _turned(grad) @ of(query[..., dims])
        params = {} if bias is None else {"bias": de.sum(axis=(0, 2, 3))}
        dv = _turned(weights) @ of(output_grad)
        kv_heads = np.shape(k)[1]
        made.append((weights @ of(value), dq, _grouped(dk, kv_heads), _grouped(dv, kv_heads), params))
    none = np.full(query.shape[:3], np.nan)
    return Evaluation(made[0][0], none, Gradients(*made[0][1:]), Magnitudes(*made[1]))


def _turned(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def _grouped(x: Array, kv_heads: int) -> Array:
    """Added up over the query heads of each key head."""
    batch, heads, *rest = x.shape
    summed: Array = x.reshape(batch, kv_heads, heads // kv_heads, *rest).sum(axis=2)
    return summed


def _reached(p: Array, rest: Array) -> Array:
    """r, one row and one key after the other."""
    r = np.zeros_like(p)
    rows, keys = p.shape[2:]
    for i in range(rows):
        for j in range(keys):
            above = p[:, :, i - 1, j] * r[:, :, i - 1, j] if i else float(j == 0)
            r[:, :, i, j] = above + (rest[:, :, i, j - 1] * r[:, :, i, j - 1] if j else 0)
    return r


def _windows(energies: Array, width: int) -> Iterator[tuple[slice, int, Array]]:
    """For each end n the keys of its window, n, and their softmax."""
    for end in range(energies.shape[3]):
        keys = slice(max(0, end - width + 1), end + 1)
        share = np.exp(energies[..., keys] - energies[..., keys].max(axis=-1, initial=-np.inf, keepdims=True))
        yield keys, end, share / share.sum(axis=-1, keepdims=True)


def _through_windows(
    a: Array, dweights: Array, windows: list[tuple[slice, int, Array]], sign: int
) -> tuple[Array, Array]:
    """Da and du, or their magnitudes where the sign is 1."""
    da, du = np.zeros_like(a), np.zeros_like(a)
    for keys, end, share in windows:
        da[..., end] = (share * dweights[..., keys]).sum(axis=-1)
        du[..., keys] += a[..., end, None] * share * (dweights[..., keys] + sign * da[..., end, None])
    return da, du


def _through_rows(p: Array, rest: Array, da: Array, sign: int) -> Array:
    """``da_ij + dr_i+1,j - dr_i,j+1``, or its magnitude where the sign is 1: the last row and key first."""
    dr, out = np.zeros_like(p), np.zeros_like(p)
    rows, keys = p.shape[2:]
    for i in reversed(range(rows)):
        for j in reversed(range(keys)):
            stop = da[:, :, i, j] + (dr[:, :, i + 1, j] if i + 1 < rows else 0)
            on = dr[:, :, i, j + 1] if j + 1 < keys else np.zeros(p.shape[:2])
            dr[:, :, i, j] = p[:, :, i, j] * stop + rest[:, :, i, j] * on
            out[:, :, i, j] = stop + sign * on
    return out
