"""The region algebra: sets of (query, key) pairs as banded rectangles, in NumPy.

A set of *regions* is an int64 array of rows ``(q0, q1, k0, k1, lo, hi)``. A row holds the pairs with
``q0 <= q < q1``, ``k0 <= k < k1`` and ``lo <= q - k <= hi``. The rows of one set are disjoint.

Every operation ends in `tighten`, which makes a row canonical: the tightest box, and a band that is as tight
as the box allows. Then every row and every column of the box holds at least one pair, so ``[k0, k1)`` *is*
the set of keys the region needs, and a full rectangle is recognised by ``lo`` and ``hi`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ringattn.errors import InputError

Array = npt.NDArray[np.int64]
Regions = Array
Mask = npt.NDArray[np.bool_]

INF = 1 << 40
"""Infinity. Not iinfo.max, which overflows when added to; not a float, which breaks floor division."""

MAX_PAIRS = 1 << 24
"""Rows of a table that grows with the product of two others, such as that of tiles: more would take gigabytes."""

MAX_EXACT = 1 << 31
"""Of positions below it, 64 bits count all pairs."""

Q0, Q1, K0, K1, LO, HI = range(6)


def regions(rows: Iterable[Iterable[int]]) -> Regions:
    """Canonical regions from rows ``(q0, q1, k0, k1, lo, hi)``, which must be disjoint."""
    array = np.array(list(rows), dtype=np.int64).reshape(-1, 6)
    return tighten(array)[0]


def empty() -> Regions:
    """The empty set of pairs."""
    return np.empty((0, 6), dtype=np.int64)


def tighten(rows: Regions) -> tuple[Regions, Array]:
    """The canonical form of each row that is not empty, and the indices of the rows kept."""
    q0, q1, k0, k1, lo, hi = rows.T
    lo = np.maximum(lo, q0 - k1 + 1)
    hi = np.minimum(hi, q1 - 1 - k0)
    # The test comes before the box shrinks: an empty band would shrink it to nonsense.
    kept = np.flatnonzero((q0 < q1) & (k0 < k1) & (lo <= hi))
    q0, q1, k0, k1, lo, hi = (column[kept] for column in (q0, q1, k0, k1, lo, hi))
    out = np.empty((len(kept), 6), dtype=np.int64)
    out[:, Q0] = np.maximum(q0, k0 + lo)
    out[:, Q1] = np.minimum(q1, k1 + hi)
    out[:, K0] = np.maximum(k0, q0 - hi)
    out[:, K1] = np.minimum(k1, q1 - lo)
    out[:, LO] = np.maximum(lo, out[:, Q0] - out[:, K1] + 1)
    out[:, HI] = np.minimum(hi, out[:, Q1] - 1 - out[:, K0])
    full = (out[:, Q0] < out[:, Q1]) & (out[:, K0] < out[:, K1]) & (out[:, LO] <= out[:, HI])
    return (out, kept) if full.all() else (out[full], kept[full])


def areas(rows: Regions) -> Array:
    """The number of pairs in each canonical row.

    The pairs with ``q - k <= x`` fill a triangle whose legs are cut off by the box: a second difference of the
    triangular numbers ``S(t) = t (t + 1) / 2``.
    """
    q0, q1, k0, k1, lo, hi = rows.T
    corner, height, width = q0 - k1 + 1, q1 - q0, k1 - k0

    def triangle(t: Array) -> Array:
        t = np.maximum(t, 0)
        return t * (t + 1) // 2

    def below(x: Array) -> Array:
        t = x - corner + 1
        return triangle(t) - triangle(t - height) - triangle(t - width) + triangle(t - height - width)

    return below(hi) - below(lo - 1)


def area(rows: Regions) -> int:
    """The number of pairs in the set."""
    if len(rows) and int(rows[:, Q0 : K1 + 1].max()) >= MAX_EXACT:
        rows = rows.astype(object)  # Python's integers
    return int(areas(rows).sum())


def expand(counts: Array) -> tuple[Array, Array]:
    """For ``counts[i]`` items of each group i: the group of every item, and its index within the group."""
    group = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    return group, np.arange(len(group), dtype=np.int64) - first[group]


def pairs(counts: Array) -> tuple[Array, Array]:
    """`expand` for pairs of two tables, of which there may be too many.

    Raises:
        InputError: there are more than `MAX_PAIRS`; none has been made.
    """
    check_pairs(int(counts.sum()))
    return expand(counts)


def check_pairs(count: int) -> None:
    """An error, if a table of so many rows is too large."""
    if count > MAX_PAIRS:
        raise InputError(
            f"Planning would take a table of {count:,} tiles or ranges of keys; it makes {MAX_PAIRS:,} at most. Use "
            f"fewer ranks, a layout in longer runs (contiguous, zigzag or balanced) or a mask of fewer parts; or plan "
            f"ranks one by one, with ringattn.plan."
        )


def overlaps(a0: Array, a1: Array, b0: Array, b1: Array) -> tuple[Array, Array]:
    """Index pairs (i, j) with ``[a0[i], a1[i])`` and ``[b0[j], b1[j])`` overlapping; `b` in any order.

    Pairs come in the order of i, then of b0[j]. The cost is that of a few sorts of the intervals and of the pairs that
    overlap, however long single intervals are.
    """
    order = np.argsort(b0, kind="stable")
    starts, stops = b0[order], b1[order]
    last = np.searchsorted(starts, a1, side="left")
    if (stops[1:] >= stops[:-1]).all():  # none reaches beyond a later one: those that overlap lie behind one another
        first = np.searchsorted(stops, a0, side="right")
        i, nth = pairs(np.maximum(last - first, 0))
        j = order[first[i] + nth]
    else:
        i, j = _crossing(a0, starts, stops, last)
        at = np.argsort(i * len(order) + j)
        i, j = i[at], order[j[at]]
    hit = (a0[i] < b1[j]) & (b0[j] < a1[i])
    return (i, j) if hit.all() else (i[hit], j[hit])


def _crossing(a0: Array, starts: Array, stops: Array, last: Array) -> tuple[Array, Array]:
    """Of two intervals that overlap, one begins within the other: first those of b within one of a, then the others."""
    first = np.searchsorted(starts, a0, side="left")
    within, nth = pairs(np.maximum(last - first, 0))
    order = np.argsort(a0, kind="stable")
    begin = np.searchsorted(a0[order], starts, side="right")
    end = np.searchsorted(a0[order], stops, side="left")
    around, ith = pairs(np.maximum(end - begin, 0))
    return np.concatenate([within, order[begin[around] + ith]]), np.concatenate([first[within] + nth, around])


def intersect(a: Regions, b: Regions) -> Regions:
    """The pairs in both sets."""
    i, j = overlaps(a[:, Q0], a[:, Q1], b[:, Q0], b[:, Q1])
    low, high = np.maximum(a[i], b[j]), np.minimum(a[i], b[j])
    columns = (low[:, Q0], high[:, Q1], low[:, K0], high[:, K1], low[:, LO], high[:, HI])
    return tighten(np.stack(columns, axis=1))[0]


def _remove(rows: Regions, b: Array) -> Regions:
    """``rows`` without the single canonical region ``b``: six disjoint pieces around and beside its band."""
    q0, q1, k0, k1, lo, hi = (int(x) for x in b)
    far = INF
    around = np.array(
        [
            (-far, q0, -far, far, -far, far),
            (q1, far, -far, far, -far, far),
            (q0, q1, -far, k0, -far, far),
            (q0, q1, k1, far, -far, far),
            (q0, q1, k0, k1, -far, lo - 1),
            (q0, q1, k0, k1, hi + 1, far),
        ],
        dtype=np.int64,
    )
    hit = (rows[:, Q0] < q1) & (rows[:, Q1] > q0) & (rows[:, K0] < k1) & (rows[:, K1] > k0)
    return np.concatenate([rows[~hit], intersect(rows[hit], around)])


def difference(a: Regions, b: Regions) -> Regions:
    """The pairs of ``a`` that are not in ``b``.

    Rows of ``b`` are removed one after the other; with many of them both sets are first cut at a row in the
    middle, so that ten thousand documents cost n log n and not n squared.
    """
    if not len(a) or not len(b):
        return a
    if len(b) > 8:
        middle = int(np.median(b[:, Q0]))
        above, below = b[:, Q0] < middle, b[:, Q1] > middle
        if not above.all() and not below.all():  # both sides get fewer rows: this ends
            top = difference(rows_between(a, -INF, middle), rows_between(b[above], -INF, middle))
            return np.concatenate([top, difference(rows_between(a, middle, INF), rows_between(b[below], middle, INF))])
    for row in b:
        a = _remove(a, row)
    return a


def transpose(rows: Regions) -> Regions:
    """The same pairs with queries for keys."""
    q0, q1, k0, k1, lo, hi = rows.T
    return np.stack([k0, k1, q0, q1, -hi, -lo], axis=1)


def rows_between(rows: Regions, start: int, stop: int) -> Regions:
    """The pairs whose query lies in ``[start, stop)``."""
    cut = rows.copy()
    cut[:, Q0] = np.maximum(cut[:, Q0], start)
    cut[:, Q1] = np.minimum(cut[:, Q1], stop)
    return tighten(cut)[0]


def union(a: Regions, b: Regions) -> Regions:
    """The pairs in either set. The smaller set is the one taken out of the other."""
    if len(a) < len(b):
        a, b = b, a
    return np.concatenate([difference(a, b), b])


def complement(rows: Regions, q_length: int, k_length: int) -> Regions:
    """The pairs of ``[0, q_length) x [0, k_length)`` that are not in the set."""
    return difference(regions([(0, q_length, 0, k_length, -INF, INF)]), rows)


def dense(rows: Regions, q_positions: Array, k_positions: Array) -> Mask:
    """The boolean matrix ``[len(q_positions), len(k_positions)]`` of the set at these positions."""
    out = np.zeros((len(q_positions), len(k_positions)), dtype=np.bool_)
    for q0, q1, k0, k1, lo, hi in rows.tolist():
        i = np.flatnonzero((q0 <= q_positions) & (q_positions < q1))
        j = np.flatnonzero((k0 <= k_positions) & (k_positions < k1))
        offset = q_positions[i, None] - k_positions[None, j]
        out[np.ix_(i, j)] |= (lo <= offset) & (offset <= hi)
    return out


def row_areas(rows: Regions, length: int) -> Array:
    """The number of allowed keys of every query, ``[length]``."""
    position, weight = breakpoints(rows)
    second = np.zeros(length + 2, dtype=np.int64)
    second[position] = weight
    return np.cumsum(np.cumsum(second))[:length]


def breakpoints(rows: Regions) -> tuple[Array, Array]:
    """Where the number of allowed keys of a query bends: the second difference of `row_areas`, where it is not 0.

    Along the queries a region's count rises by one a row, stays, and falls by one a row. It is piecewise linear: its
    second difference is a few spikes, and those of all regions add up.
    """
    q0, q1, k0, k1, lo, hi = rows.T
    positions, weights = [], []
    # keys of row q = min(k1, q - lo + 1) - max(k0, q - hi)
    #               = (q - lo + 1 - k0)+ - (q - lo + 1 - k1)+ - (q - hi - k0)+
    # and each of the three is sign * (q - start + 1) from `start` on, within [q0, q1).
    for start, sign in ((k0 + lo, 1), (k1 + lo, -1), (k0 + hi + 1, -1)):
        first = np.clip(start, q0, q1)
        height = sign * (first - start + 1)
        positions += [first, first + 1, q1, q1 + 1]
        weights += [height, sign - height, -sign * (q1 - start + 1), sign * (q1 - start)]
    return summed(np.concatenate(positions), np.concatenate(weights))


def summed(positions: Array, weights: Array) -> tuple[Array, Array]:
    """The positions, sorted, at which the weights do not sum to 0, and the sums."""
    kept = weights != 0
    order = np.argsort(positions[kept], kind="stable")
    positions, weights = positions[kept][order], weights[kept][order]
    first = np.flatnonzero(np.diff(positions, prepend=-1))
    sums = np.add.reduceat(weights, first) if len(first) else weights
    return positions[first][sums != 0], sums[sums != 0]
