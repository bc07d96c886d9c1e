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

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    checked,
    finite,
    floats,
    output_gradient,
    zeros,
)

Ints: TypeAlias = NDArray[np.int64]


class Scores(NamedTuple):
    """What makes a score of q·k, and a weight of a score: as `ringattn.Softmax` has it, of the whole sequence.

    scale 1/√D unless given; sinks [Hq], alibi [Hq], relative [Hq, 2R + 1], bias [Hq, Sq, Sk]; dropout with its seed;
    additive [Hq, D]; centres [B, Hq, Sq] with their width.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: ArrayLike | None = None
    alibi: ArrayLike | None = None
    relative: ArrayLike | None = None
    bias: ArrayLike | None = None
    dropout: float = 0.0
    seed: int = 0
    additive: ArrayLike | None = None
    centres: ArrayLike | None = None
    width: float | None = None

    @staticmethod
    def checked(scores: dict[str, Any]) -> Scores:
        """The scores by name, if there are such and their numbers are in range."""
        unknown = set(scores) - set(Scores._fields)
        if unknown:
            raise InputError(f"scores are {', '.join(Scores._fields)}; got {', '.join(sorted(unknown))}")
        found = Scores(**scores)
        for name, least in (("scale", -np.inf), ("softcap", 0.0), ("dropout", -np.inf), ("width", 0.0)):
            value = getattr(found, name)
            if value is not None:
                number = finite(value, name)
                if not number > least:
                    raise InputError(f"{name} must be a finite number above {least:g}; got {value}")
                found = Scores(**{**found._asdict(), name: number})
        if not 0 <= found.dropout < 1:
            raise InputError(f"dropout must be from 0 to below 1; got {found.dropout}")
        if (found.centres is None) != (found.width is None):
            raise InputError("centres and width belong together; got one without the other")
        if not isinstance(found.seed, (int, np.integer)) or not 0 <= found.seed < 2**64 or isinstance(found.seed, bool):
            raise InputError(f"seed must be an integer from 0 to below 2^64; got {found.seed!r}")
        return found

    def params(self, q: Array, keys: int) -> dict[str, Array]:
        """The learned tensors that were given, in float64, if their shapes fit."""
        batch, heads, queries, dim = q.shape
        given = {x: getattr(self, x) for x in ("sinks", "alibi", "relative", "bias", "additive", "centres")}
        found = {name: floats(x, name) for name, x in given.items() if x is not None}
        for name, x in found.items():
            reach = x.shape[1] | 1 if x.ndim == 2 else 1  # an entry for every offset from -R to R
            wide = {"additive": (heads, dim), "centres": (batch, heads, queries)}
            needed = {"relative": (heads, reach), "bias": (heads, queries, keys), **wide}.get(name, (heads,))
            if x.shape != needed:
                raise InputError(f"{name} needs shape {needed}; got {x.shape}")
        return found


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
    x = _Inputs.of(q, k, v, dout, dlse, Scores.checked(scores))
    values, sizes = (zeros(x.q, x.k, x.v, x.params) for _ in range(2))
    lse = np.full(x.q.shape[:3], -np.inf)
    if "sinks" in x.params:
        lse[:] = x.params["sinks"][:, None]
    group = x.q.shape[1] // x.k.shape[1]
    for rows, keys, block in blocks(x.q, x.k, allowed):
        for batch, head in np.ndindex(x.k.shape[:2]):
            at = _Slices((batch, slice(head * group, (head + 1) * group), rows), (batch, head, keys))
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


class _Inputs(NamedTuple):
    """Checked float64 inputs; dout is None when only the forward is asked for."""

    q: Array
    k: Array
    v: Array
    dout: Array | None
    dlse: Array
    scale: float
    scores: Scores
    params: dict[str, Array]

    @property
    def variance(self) -> float:
        """That of the Gaussian of predictive local attention."""
        return (self.scores.width or 0.0) ** 2 / 4

    @staticmethod
    def of(
        q: ArrayLike, k: ArrayLike, v: ArrayLike, dout: ArrayLike | None, dlse: ArrayLike | None, scores: Scores
    ) -> _Inputs:
        query, key, value = checked(q, k, v)
        rows = query.shape[:3]
        output_grad = None
        if dout is not None or dlse is not None:
            output_grad = output_gradient(dout, query, value)
        on_lse = np.zeros(rows) if dlse is None else floats(dlse, "dlse", rows)
        params = scores.params(query, key.shape[2])
        usual = query.shape[3] ** -0.5 if scores.additive is None else 1.0
        scale = usual if scores.scale is None else scores.scale
        return _Inputs(query, key, value, output_grad, on_lse, scale, scores, params)


class _Slices(NamedTuple):
    """Where a block lies: `q` indexes what has query heads and rows, `k` what has key heads and keys."""

    q: tuple[int, slice, slice]
    k: tuple[int, int, slice]

    @property
    def heads(self) -> slice:
        return self.q[1]

    def offsets(self) -> Ints:
        """Offsets i − j of the block's positions, [r, n]."""
        rows, keys = self.q[2], self.k[2]
        return np.arange(rows.start, rows.stop)[:, None] - np.arange(keys.start, keys.stop)


def _block(x: _Inputs, at: _Slices, allowed: Bools, lse: Array, values: Magnitudes, sizes: Magnitudes) -> None:
    """One block of r rows under n keys of one key head; its G query heads are G·r rows of the products."""
    q, k, v = x.q[at.q].reshape(-1, x.q.shape[3]), x.k[at.k], x.v[at.k]
    pairs = _Additive.of(x, at, q, k) if "additive" in x.params else _Products(q * x.scale, k * x.scale)
    scores, slope = _scored(x, at, pairs.scores(k))
    offsets = _offsets_from_centres(x, at)
    if offsets is not None:
        scores[np.abs(offsets) > x.scores.width] = -np.inf
    p, row_lse = _softmax(scores, allowed, x.params["sinks"][at.heads] if "sinks" in x.params else None)
    given = p * _kept(x, at, p.shape) if x.scores.dropout else p
    if offsets is not None:
        given = given * np.exp(-(offsets**2) / (2 * x.variance))
    out = given @ v
    _store(values.out, at, out)
    _store(lse, at, row_lse)
    _store(sizes.out, at, given @ np.abs(v))
    if x.dout is None:
        return
    dout = x.dout[at.q].reshape(out.shape)
    # the gradient of an unreachable row's lse goes nowhere, whatever it is (a loss over -inf sends NaN)
    dlse = np.where(np.isfinite(row_lse), x.dlse[at.q].reshape(-1), 0.0)
    keep = given / np.where(p == 0, 1, p)
    dp, sizes_of_dp = (dout @ v.T) * keep, (np.abs(dout) @ np.abs(v).T) * keep
    if offsets is not None:
        for sums, each, away in ((values, dp, offsets), (sizes, sizes_of_dp, np.abs(offsets))):
            _store(sums.params["centres"], at, (p * each * away).sum(axis=1) / x.variance)
    ds = dp + (dlse - np.sum(dout * out, axis=1))[:, None]
    _add(values, at, (p, given, slope), ds, pairs, dout)
    e = sizes_of_dp + (np.abs(dlse) + np.sum(np.abs(dout * out), axis=1))[:, None]
    _add(sizes, at, (p, given, slope), e, pairs.sizes, np.abs(dout))


class _Products(NamedTuple):
    """λ q·k, of q and k times λ."""

    q: Array
    k: Array

    def scores(self, k: Array) -> Array:
        return self.q @ k.T

    def add_gradients(self, sums: Magnitudes, at: _Slices, ds: Array) -> None:
        _store(sums.dq, at, ds @ self.k)
        sums.dk[at.k] += ds.T @ self.q

    @property
    def sizes(self) -> _Products:
        return _Products(np.abs(self.q), np.abs(self.k))


class _Additive(NamedTuple):
    """λ Σ_d a_d t_d: λ a of each row, [G·r, 1, D], t and λ a (1 − t²) of each pair, [G·r, n, D]."""

    scale: float
    weights: Array
    bent: Array
    slopes: Array

    @staticmethod
    def of(x: _Inputs, at: _Slices, q: Array, k: Array) -> _Additive:
        each = x.params["additive"][at.heads]
        weights = x.scale * np.repeat(each, len(q) // len(each), axis=0)[:, None]
        bent = np.tanh(q[:, None] + k)
        return _Additive(x.scale, weights, bent, weights * (1 - bent * bent))

    def scores(self, _: Array) -> Array:
        return np.asarray((self.weights * self.bent).sum(axis=2))

    def add_gradients(self, sums: Magnitudes, at: _Slices, ds: Array) -> None:
        by_pair = ds[..., None] * self.slopes
        _store(sums.dq, at, by_pair.sum(axis=1))
        sums.dk[at.k] += by_pair.sum(axis=0)
        by_row = self.scale * (ds[..., None] * self.bent).sum(axis=1)
        heads = at.heads.stop - at.heads.start
        sums.params["additive"][at.heads] += by_row.reshape(heads, -1, by_row.shape[1]).sum(axis=1)

    @property
    def sizes(self) -> _Additive:
        return _Additive(abs(self.scale), *(np.abs(x) for x in (self.weights, self.bent, self.slopes)))


def _offsets_from_centres(x: _Inputs, at: _Slices) -> Array | None:
    """J − c_i, [G·r, n], of predictive local attention."""
    if "centres" not in x.params:
        return None
    keys = at.k[2]
    offsets: Array = np.arange(keys.start, keys.stop) - x.params["centres"][at.q].reshape(-1, 1)
    return offsets


def _scored(x: _Inputs, at: _Slices, products: Array) -> tuple[Array, Array]:
    """The scores of λ q·k, [G·r, n], and their derivative by it."""
    slope = np.ones_like(products)
    if x.scores.softcap is not None:
        bent = np.tanh(products / x.scores.softcap)
        products, slope = x.scores.softcap * bent, 1 - bent * bent
    added = np.zeros((1, *at.offsets().shape))
    for name, table in x.params.items():
        if name == "alibi":
            added = added - table[at.heads, None, None] * np.abs(at.offsets())
        elif name == "relative":
            added = added + table[at.heads][:, _entries(at, table)]
        elif name == "bias":
            added = added + table[at.heads, at.q[2], at.k[2]]
    heads = at.heads.stop - at.heads.start
    return products + np.broadcast_to(added, (heads, *added.shape[1:])).reshape(products.shape), slope


def _entries(at: _Slices, table: Array) -> Ints:
    reach = table.shape[1] // 2
    entries: Ints = np.clip(at.offsets(), -reach, reach) + reach
    return entries


def _kept(x: _Inputs, at: _Slices, shape: tuple[int, ...]) -> Array:
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


def _add(
    sums: Magnitudes,
    at: _Slices,
    weights: tuple[Array, Array, Array],
    dp: Array,
    pairs: _Products | _Additive,
    dout: Array,
) -> None:
    """Add a block's part to the gradients: dV += Pᵀ dO, dQ = dS λK, dK += dSᵀ λQ."""
    p, given, slope = weights
    ds = p * dp
    each = ds.reshape(-1, *at.offsets().shape)
    for name, total in sums.params.items():
        if name == "alibi":
            total[at.heads] += (each * np.abs(at.offsets())).sum(axis=(1, 2))
        elif name == "relative":
            for head, part in zip(total[at.heads], each, strict=True):
                np.add.at(head, _entries(at, total), part)
        elif name == "bias":
            total[at.heads, at.q[2], at.k[2]] += each
    ds *= slope
    pairs.add_gradients(sums, at, ds)
    sums.dv[at.k] += given.T @ dout


def _store(whole: Array, at: _Slices, rows: Array) -> None:
    whole[at.q] = rows.reshape(whole[at.q].shape)
