"""Tiles lowered to what kernels know: for flash kernels full rectangles and causal squares, few and alike.

First, tiles that together form one band are joined: a zigzag rank's own keys are three tiles and one causal square.
Then every band is cut into rectangles that are full, causal (``j <= i``) or flipped (``j >= i``, a causal square of
both sides reversed). A flash kernel computes whole blocks along a diagonal; where that costs more than launches do,
large squares are halved until only small ones lie on it. Last, equal rectangles at equal distances become one group: a
window of 1,024 over 8,192 rows is two launches, and each halving is one. What a launch returns is memory on top of the
plan's buffers, so where launches are cheap their rows are limited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from ringattn import bands
from ringattn.bands import HI, INF, K0, K1, LO, Q0, Q1, Array
from ringattn.plans import tiles as t
from ringattn.plans.tiles import Tiles

FULL, CAUSAL, FLIPPED = range(3)


@dataclasses.dataclass(frozen=True)
class TileGroup:
    """``count`` equal rectangles of ``m`` queries by ``n`` keys; those pairs count with ``low <= i - j <= high``.

    The first begins at rows ``q`` and ``k``, each further one ``q_next`` and ``k_next`` rows later. Rows are taken
    every ``q_step`` and ``k_step``.
    """

    low: int
    high: int
    m: int
    n: int
    q_step: int
    k_step: int
    q: int
    k: int
    count: int = 1
    q_next: int = 0
    k_next: int = 0

    @property
    def kind(self) -> int:
        """Of the rectangles of `lower`: FULL, CAUSAL or FLIPPED."""
        if self.low == 1 - self.n and self.high == self.m - 1:
            return FULL
        return CAUSAL if self.low == 0 else FLIPPED


def lower(tiles: Tiles, min_block: int = INF, max_rows: int = INF) -> list[TileGroup]:
    """The groups of rectangles that compute these tiles: every pair once, and no launch without a pair.

    Args:
        min_block: rows of a square on a diagonal up to which it is not halved.
        max_rows: queries, and keys, of one launch at most.
    """
    origin, regions, steps = _joined(tiles)
    rectangles = _limited(_halved(_cut(origin, regions, steps), min(min_block, max_rows)), max_rows)
    kind, m, n = rectangles[:, :3].T
    low, high = np.where(kind == CAUSAL, 0, 1 - n), np.where(kind == FLIPPED, 0, m - 1)
    return _grouped(np.concatenate([np.stack([low, high], axis=1), rectangles[:, 1:]], axis=1), max_rows)


def banded(tiles: Tiles, max_rows: int) -> list[TileGroup]:
    """The same pairs in rectangles of any band, for kernels that need not cut them.

    Args:
        max_rows: queries, and keys, of all rectangles of a group at most, but for one that is larger itself.
    """
    origin, regions, steps = _joined(tiles)
    return _grouped(np.concatenate([regions[:, [LO, HI, Q1, K1]], steps, origin], axis=1), max_rows)


def _joined(tiles: Tiles) -> tuple[Array, Array, Array]:
    """Neighbours joined: first rows, canonical regions whose boxes begin at 0, 0, and steps."""
    rows = tiles.rows
    plain = (rows[:, t.Q_STEP] == 1) & (rows[:, t.K_STEP] == 1)
    joined, strided = coalesce(_boxes(rows[plain])), rows[~plain]
    return (
        np.concatenate([joined[:, [Q0, K0]], strided[:, [t.Q, t.K]]]),
        np.concatenate([_canonical(joined), Tiles(strided).regions]),
        np.concatenate([np.ones((len(joined), 2), dtype=np.int64), strided[:, [t.Q_STEP, t.K_STEP]]]),
    )


def _boxes(rows: Array) -> Array:
    """Tiles without steps as regions over the rows of the two buffers."""
    q, k, shift = rows[:, t.Q], rows[:, t.K], rows[:, t.Q] - rows[:, t.K]
    columns = (q, q + rows[:, t.M], k, k + rows[:, t.N], rows[:, t.LOW] + shift, rows[:, t.HIGH] + shift)
    return np.stack(columns, axis=1)


def _canonical(boxes: Array) -> Array:
    """Regions moved so that their boxes begin at 0, 0."""
    out = boxes.copy()
    out[:, [Q0, Q1]] -= boxes[:, [Q0]]
    out[:, [K0, K1]] -= boxes[:, [K0]]
    out[:, [LO, HI]] -= (boxes[:, Q0] - boxes[:, K0])[:, None]
    return out


def coalesce(rows: Array) -> Array:
    """The same pairs in fewer regions: neighbours are joined when their hull holds nothing but their pairs."""
    while len(rows) > 1:
        before = len(rows)
        for first, second in ((K0, Q0), (Q0, K0)):
            rows = _join_neighbours(rows[np.lexsort((rows[:, first], rows[:, second]))])
        if len(rows) == before:
            break
    return rows


def _join_neighbours(rows: Array) -> Array:
    low, high = np.minimum(rows[:-1], rows[1:]), np.maximum(rows[:-1], rows[1:])
    columns = (low[:, Q0], high[:, Q1], low[:, K0], high[:, K1], low[:, LO], high[:, HI])
    hull = np.stack(columns, axis=1)
    area = bands.areas(rows)
    fits = bands.areas(hull) == area[:-1] + area[1:]
    # Of a run of pairs that fit, every second one: a region joins one neighbour at a time.
    position = np.arange(len(fits))
    begins = np.maximum.accumulate(np.where(fits, -1, position))
    taken = np.flatnonzero(fits & ((position - begins) % 2 == 1))
    out = rows.copy()
    out[taken] = hull[taken]
    return np.delete(out, taken + 1, axis=0)


def _cut(origin: Array, regions: Array, steps: Array) -> Array:
    """Rectangles ``(kind, m, n, q_step, k_step, q, k)`` of canonical regions whose boxes begin at 0, 0.

    From the top, a band's right edge moves until row b2 and its left edge from row b1 on. The boundary rows belong
    to either side; they are taken so that a causal square needs no one-row rectangle beside it.
    """
    m, n, lo, hi = regions[:, Q1], regions[:, K1], regions[:, LO], regions[:, HI]
    zero = np.zeros_like(m)
    b1 = np.where(hi == m - 1, m, hi)
    b2 = np.where(lo == 1 - n, 0, n + lo)
    b2 = np.minimum(b2, m)
    both = np.minimum(b1, b2)
    rectangles = []

    def add(kind: int, q: Array, rows: Array, k: Array, columns: Array, parent: Array) -> None:
        kept = (rows > 0) & (columns > 0)
        parent = parent[kept]
        shape = np.stack([np.full(len(parent), kind), rows[kept], columns[kept]], axis=1)
        at = origin[parent] + np.stack([q[kept], k[kept]], axis=1) * steps[parent]
        rectangles.append(np.concatenate([shape, steps[parent], at], axis=1))

    every = np.arange(len(m))
    # right edge moving, left edge still: what all rows see, and a causal square
    add(FULL, zero, both, zero, -lo, every)
    add(CAUSAL, zero, both, -lo, both, every)
    # both still
    add(FULL, b2, b1 - b2, zero, n, every)
    # both moving: a band of constant width, cut into chunks of width - 1 rows
    width = hi - lo + 1
    chunk = np.maximum(width - 1, 1)
    band, nth = bands.expand(np.maximum(-((b1 - b2) // chunk), 0) * (b2 > b1))
    start = b1[band] + nth * chunk[band]
    rows = np.minimum(chunk[band], b2[band] - start)
    left, right, diagonal = start - hi[band], start - lo[band], width[band] > 1
    add(FLIPPED, start, rows * diagonal, left, rows, band)
    add(FULL, start, rows, left + rows * diagonal, right - left - rows * diagonal + ~diagonal, band)
    add(CAUSAL, start, rows * diagonal, right, rows, band)
    # left edge moving, right edge still: a flipped square, and what all rows see
    start = np.maximum(b1, b2)
    add(FLIPPED, start, m - start, start - hi, m - start, every)
    add(FULL, start, m - start, m - hi, n - (m - hi), every)
    return np.concatenate(rectangles)


def _halved(rectangles: Array, min_block: int) -> Array:
    """Causal and flipped squares of more than ``min_block`` rows cut into two squares and what lies between them.

    The first half is ``min_block`` times a power of two, so that the squares of one level are alike wherever they come
    from.
    """
    done = []
    while len(rectangles):
        kind, m, _, q_step, k_step, q, k = rectangles.T
        large = (kind != FULL) & (m > min_block)
        done.append(rectangles[~large])
        kind, m, q_step, k_step, q, k = (column[large] for column in (kind, m, q_step, k_step, q, k))
        half = min_block << (np.ceil(np.log2(m / min_block)).astype(np.int64) - 1)
        rest, causal = m - half, kind == CAUSAL
        lower_q, lower_k = q + half * q_step, k + half * k_step
        # below the diagonal of a causal square lie its last queries and first keys, of a flipped one the others
        columns = (
            (kind, half, half, q, k),
            (kind, rest, rest, lower_q, lower_k),
            (
                np.full_like(kind, FULL),
                np.where(causal, rest, half),
                np.where(causal, half, rest),
                np.where(causal, lower_q, q),
                np.where(causal, k, lower_k),
            ),
        )
        rectangles = np.concatenate([np.stack([a, b, c, q_step, k_step, d, e], axis=1) for a, b, c, d, e in columns])
    return np.concatenate(done) if done else rectangles


def _limited(rectangles: Array, max_rows: int) -> Array:
    """Rectangles of more than ``max_rows`` queries or keys cut into even parts."""
    kind, m, n, q_step, k_step, q, k = rectangles.T
    by_m, by_n = -(-m // max_rows), -(-n // max_rows)
    parent, nth = bands.expand(by_m * by_n)
    i, j = nth // by_n[parent], nth % by_n[parent]
    (i0, i1), (j0, j1) = (
        (x * side[parent] // parts[parent], (x + 1) * side[parent] // parts[parent])
        for x, side, parts in ((i, m, by_m), (j, n, by_n))
    )
    at = q[parent] + i0 * q_step[parent], k[parent] + j0 * k_step[parent]
    return np.stack([kind[parent], i1 - i0, j1 - j0, q_step[parent], k_step[parent], *at], axis=1)


def _grouped(rectangles: Array, max_rows: int) -> list[TileGroup]:
    """Equal rectangles joined into groups where they lie at equal distances and do not overlap."""
    rectangles = rectangles[np.lexsort(rectangles.T[::-1])]
    groups: list[TileGroup] = []
    for *shape, q, k in rectangles.tolist():
        low, high, m, n, q_step, k_step = shape
        last = groups[-1] if groups else None
        if last is not None and [last.low, last.high, last.m, last.n, last.q_step, last.k_step] == shape:
            q_next = q - (last.q + last.q_next * (last.count - 1))
            k_next = k - (last.k + last.k_next * (last.count - 1))
            apart = q_next >= (m - 1) * q_step + 1 and k_next >= (n - 1) * k_step + 1
            small = (last.count + 1) * max(m, n) <= max_rows
            if apart and small and (last.count == 1 or (q_next, k_next) == (last.q_next, last.k_next)):
                groups[-1] = dataclasses.replace(last, count=last.count + 1, q_next=q_next, k_next=k_next)
                continue
        groups.append(TileGroup(low, high, m, n, q_step, k_step, q, k))
    return groups


class TileView:
    """Where a group's rectangles lie in dim 2 of a tensor: a view ``[count or B, heads, rows, …]``."""

    def __init__(self, first: int, rows: int, step: int, count: int, following: int, b: int | None) -> None:
        self._first, self._rows, self._step = first, rows, step
        self._count, self._following, self._b = count, following, b

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._b is None:
            if self._rows == x.shape[2]:
                return x
            return x[:, :, self._first : self._first + (self._rows - 1) * self._step + 1 : self._step]
        batch, head, row, *rest = x.stride()
        return x.as_strided(
            (self._count, x.shape[1], self._rows, *x.shape[3:]),
            (self._following * row, head, self._step * row, *rest),
            x.storage_offset() + self._b * batch + self._first * row,
        )


@dataclasses.dataclass(frozen=True)
class Launch:
    """What is computed at once: of one rectangle all sequences, or of one sequence all rectangles of a group.

    Attributes:
        group: the rectangles.
        queries, keys: where they lie.
    """

    group: TileGroup
    queries: TileView
    keys: TileView


def launches(groups: Iterable[TileGroup], sequences: int) -> list[Launch]:
    """The launches that compute these groups for so many sequences."""
    return [
        Launch(
            x,
            TileView(x.q, x.m, x.q_step, x.count, x.q_next, b),
            TileView(x.k, x.n, x.k_step, x.count, x.k_next, b),
        )
        for x in groups
        for b in ([None] if x.count == 1 else range(sequences))
    ]


def lowered(tiles: Tiles, min_block: int, max_rows: int, sequences: int) -> list[Launch]:
    """The launches that compute these tiles."""
    return launches(lower(tiles, min_block, max_rows), sequences)
