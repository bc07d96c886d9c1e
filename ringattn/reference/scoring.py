"""What makes scores of queries and keys, and takes their gradients back: for every oracle that has scores.

S = c tanh(λ q·k / c) − alibi |i − j| + relative[i − j] + bias[i, j], with λ Σ_d a_d tanh(q_d + k_d) for λ q·k where
scores are additive
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ringattn.errors import InputError
from ringattn.reference.measure import Array, Magnitudes, checked, finite, floats, output_gradient

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


class Inputs(NamedTuple):
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
    ) -> Inputs:
        query, key, value = checked(q, k, v)
        rows = query.shape[:3]
        output_grad = None
        if dout is not None or dlse is not None:
            output_grad = output_gradient(dout, query, value)
        on_lse = np.zeros(rows) if dlse is None else floats(dlse, "dlse", rows)
        params = scores.params(query, key.shape[2])
        usual = query.shape[3] ** -0.5 if scores.additive is None else 1.0
        scale = usual if scores.scale is None else scores.scale
        return Inputs(query, key, value, output_grad, on_lse, scale, scores, params)


class Slices(NamedTuple):
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


class Products(NamedTuple):
    """λ q·k, of q and k times λ."""

    q: Array
    k: Array

    def scores(self, k: Array) -> Array:
        return self.q @ k.T

    def add_gradients(self, sums: Magnitudes, at: Slices, ds: Array) -> None:
        store(sums.dq, at, ds @ self.k)
        sums.dk[at.k] += ds.T @ self.q

    @property
    def sizes(self) -> Products:
        return Products(np.abs(self.q), np.abs(self.k))


class Additive(NamedTuple):
    """λ Σ_d a_d t_d: λ a of each row, [G·r, 1, D], t and λ a (1 − t²) of each pair, [G·r, n, D]."""

    scale: float
    weights: Array
    bent: Array
    slopes: Array

    @staticmethod
    def of(x: Inputs, at: Slices, q: Array, k: Array) -> Additive:
        each = x.params["additive"][at.heads]
        weights = x.scale * np.repeat(each, len(q) // len(each), axis=0)[:, None]
        bent = np.tanh(q[:, None] + k)
        return Additive(x.scale, weights, bent, weights * (1 - bent * bent))

    def scores(self, _: Array) -> Array:
        return np.asarray((self.weights * self.bent).sum(axis=2))

    def add_gradients(self, sums: Magnitudes, at: Slices, ds: Array) -> None:
        by_pair = ds[..., None] * self.slopes
        store(sums.dq, at, by_pair.sum(axis=1))
        sums.dk[at.k] += by_pair.sum(axis=0)
        by_row = self.scale * (ds[..., None] * self.bent).sum(axis=1)
        heads = at.heads.stop - at.heads.start
        sums.params["additive"][at.heads] += by_row.reshape(heads, -1, by_row.shape[1]).sum(axis=1)

    @property
    def sizes(self) -> Additive:
        return Additive(abs(self.scale), *(np.abs(x) for x in (self.weights, self.bent, self.slopes)))


def scored(x: Inputs, at: Slices, products: Array) -> tuple[Array, Array]:
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


def _entries(at: Slices, table: Array) -> Ints:
    reach = table.shape[1] // 2
    entries: Ints = np.clip(at.offsets(), -reach, reach) + reach
    return entries


def add(
    sums: Magnitudes,
    at: Slices,
    weights: tuple[Array, Array, Array],
    dp: Array,
    pairs: Products | Additive,
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


def store(whole: Array, at: Slices, rows: Array) -> None:
    whole[at.q] = rows.reshape(whole[at.q].shape)
