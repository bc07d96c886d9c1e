"""Tiles: a mask cut by two shardings, in the local indices of the ranks that hold the tokens.

A *tile* says "attend these M queries to these N keys where lo <= i - j <= hi", with i and j counted from the
tile's first query and key. Its queries are the local rows ``q, q + q_step, …``, whose global positions are
``q_position, q_position + q_stride, …``; its keys likewise. Tiles are canonical (see `bands`): never empty, every
row and every column holds a pair, and a full tile is known by its band alone.

Where a mask can only be asked pair by pair, a tile is *partial*: of the pairs in its band, those are attended to that
the mask allows at their positions.

Tiles live in one int64 array, a row a tile. A *cut* has two more columns in front: the rank that holds the
queries and the rank that holds the keys.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from ringattn import bands, layouts
from ringattn.bands import HI, K0, K1, LO, Q0, Q1, Array, Regions
from ringattn.masks import Mask

Q_RANK, K_RANK = range(2)
Q, M, Q_STEP, K, N, K_STEP, LOW, HIGH, Q_POSITION, Q_STRIDE, K_POSITION, K_STRIDE, PARTIAL = range(13)
WIDTH = 13

CUT_ROWS = 64
"""A tile of twice as many queries is cut at multiples of them: of fewer, kernels make no good use. Smaller tiles are
cut only where there is but one."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one step: ``rows`` is int64 ``[tiles, 13]``, its columns named at the top of this file."""

    rows: Array
    _memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "_memo": {}}

    @functools.cached_property
    def regions(self) -> Regions:
        """The tiles as regions in tile indices: boxes ``[0, M) x [0, N)`` and their bands."""
        zero = np.zeros(len(self.rows), dtype=np.int64)
        rows = self.rows
        return np.stack([zero, rows[:, M], zero, rows[:, N], rows[:, LOW], rows[:, HIGH]], axis=1)

    @property
    def area(self) -> int:
        """The number of pairs in the bands, which is that of allowed pairs where no tile is partial."""
        return bands.area(self.regions)

    def parts(self, weights: Sequence[int]) -> list[Tiles]:
        """The same pairs in as many parts, of areas about as these weights; some may have no tiles.

        Parts begin at a tile or, within large ones, at a row of queries.
        """
        areas = bands.areas(self.regions)
        done, total, sum_of_weights = np.cumsum(areas), int(areas.sum()), max(sum(weights), 1)
        edges, wanted = [(0, 0)], 0
        for weight in weights[:-1]:
            wanted += weight
            edges.append(max(edges[-1], self._edge(done, total * wanted // sum_of_weights)))
        edges.append((len(self), 0))
        return [self._between(*ends) for ends in itertools.pairwise(edges)]

    def _edge(self, done: Array, area: int) -> tuple[int, int]:
        """The tile, and the row of its queries, before which about so many pairs lie; ``done`` is up to each tile."""
        tile = int(np.searchsorted(done, area, side="left"))
        before = int(done[tile - 1]) if tile else 0
        if tile == len(self) or area == before:
            return tile, 0
        box, rows = self.regions[tile : tile + 1], int(self.rows[tile, M])
        if rows < 2 * CUT_ROWS and len(self) > 1:
            return (tile, 0) if 2 * (area - before) < int(done[tile]) - before else (tile + 1, 0)
        at = np.arange(0, rows + 1, CUT_ROWS if rows >= 2 * CUT_ROWS else 1)
        boxes = np.repeat(box, len(at), axis=0)
        boxes[:, Q1] = at
        tight, kept = bands.tighten(boxes)
        above = np.zeros(len(at), dtype=np.int64)
        above[kept] = bands.areas(tight)
        row = int(at[np.abs(above - (area - before)).argmin()])
        return (tile, row) if row < rows else (tile + 1, 0)

    def _between(self, first: tuple[int, int], last: tuple[int, int]) -> Tiles:
        """The tiles from one edge to another."""
        stop = last[0] + (last[1] > 0)
        boxes = self.regions[first[0] : stop].copy()
        if len(boxes):
            boxes[0, Q0] = first[1]
            boxes[-1, Q1] = last[1] or boxes[-1, Q1]
        tight, kept = bands.tighten(boxes)
        return self._part(tight, first[0] + kept)

    @functools.cached_property
    def transposed(self) -> Tiles:
        """The same pairs with queries for keys."""
        return Tiles(transposed(self.rows))

    def columns(self, nth: Array, k: Array) -> tuple[Array, Array]:
        """One column of each tile, its nth key, which lies in buffer row k: the rows, and the tiles they are of."""
        boxes = self.regions.copy()
        boxes[:, K0], boxes[:, K1] = nth, nth + 1
        boxes, kept = bands.tighten(boxes)
        rows = self._part(boxes, kept).rows
        rows[:, K] = k[kept]
        return rows, kept

    def _part(self, boxes: Regions, kept: Array) -> Tiles:
        """These tiles cut to their canonical boxes."""
        rows = self.rows[kept].copy()
        q, k = boxes[:, Q0], boxes[:, K0]
        rows[:, M], rows[:, N] = boxes[:, Q1] - q, boxes[:, K1] - k
        rows[:, LOW], rows[:, HIGH] = boxes[:, LO] - q + k, boxes[:, HI] - q + k
        rows[:, Q] += q * rows[:, Q_STEP]
        rows[:, K] += k * rows[:, K_STEP]
        rows[:, Q_POSITION] += q * rows[:, Q_STRIDE]
        rows[:, K_POSITION] += k * rows[:, K_STRIDE]
        return Tiles(rows)

    def memo(self, function: Callable[..., T], *args: Hashable) -> T:
        """``function(tiles, *args)``, worked out once: what a kernel needs to know before its first launch."""
        key = (function, args)
        if key not in self._memo:
            self._memo[key] = function(self, *args)
        return self._memo[key]  # type: ignore[no-any-return]


NO_TILES = Tiles(np.empty((0, WIDTH), dtype=np.int64))


def cut(regions: Regions, q_spans: Array, k_spans: Array, partial: bool = False) -> Array:
    """A mask's regions cut by the spans of queries and of keys: int64 ``[tiles, 2 + 13]``, exact.

    Within spans of equal stride s, ``q = a + s u`` and ``k = b + s v``, a band stays a band:
    ``ceil((lo - (a - b)) / s) <= u - v <= floor((hi - (a - b)) / s)``. Spans of unequal strides are first split
    into residue classes of the least common multiple, which makes them equal.
    """
    stride = int(
        np.lcm.reduce(np.unique(np.concatenate([q_spans[:, layouts.STRIDE], k_spans[:, layouts.STRIDE], [1]])))
    )
    part, q, k = _crossed(regions, q_spans, k_spans)
    row, q_spans, q_steps = _classes(part[:, Q0], part[:, Q1], q_spans[q], stride)
    part, k_spans = part[row], k_spans[k[row]]
    row, k_spans, k_steps = _classes(part[:, K0], part[:, K1], k_spans, stride)
    part, q_spans, q_steps = part[row], q_spans[row], q_steps[row]
    a, b = q_spans[:, layouts.START], k_spans[:, layouts.START]
    box = np.empty_like(part)
    box[:, Q0] = np.maximum(-((a - part[:, Q0]) // stride), 0)
    box[:, Q1] = np.minimum(-((a - part[:, Q1]) // stride), q_spans[:, layouts.COUNT])
    box[:, K0] = np.maximum(-((b - part[:, K0]) // stride), 0)
    box[:, K1] = np.minimum(-((b - part[:, K1]) // stride), k_spans[:, layouts.COUNT])
    box[:, LO] = -((a - b - part[:, LO]) // stride)
    box[:, HI] = (part[:, HI] - (a - b)) // stride
    box, kept = bands.tighten(box)
    a, b, q_spans, k_spans, q_steps, k_steps = (x[kept] for x in (a, b, q_spans, k_spans, q_steps, k_steps))

    out = np.empty((len(box), 2 + WIDTH), dtype=np.int64)
    out[:, Q_RANK], out[:, K_RANK] = q_spans[:, layouts.RANK], k_spans[:, layouts.RANK]
    tile = out[:, 2:]
    tile[:, Q] = q_spans[:, layouts.OFFSET] + q_steps * box[:, Q0]
    tile[:, K] = k_spans[:, layouts.OFFSET] + k_steps * box[:, K0]
    tile[:, M], tile[:, N] = box[:, Q1] - box[:, Q0], box[:, K1] - box[:, K0]
    tile[:, Q_STEP], tile[:, K_STEP] = q_steps, k_steps
    tile[:, LOW] = box[:, LO] - box[:, Q0] + box[:, K0]
    tile[:, HIGH] = box[:, HI] - box[:, Q0] + box[:, K0]
    tile[:, Q_POSITION] = a + stride * box[:, Q0]
    tile[:, K_POSITION] = b + stride * box[:, K0]
    tile[:, Q_STRIDE] = tile[:, K_STRIDE] = stride
    tile[:, PARTIAL] = partial
    return out


def _reach(spans: Array) -> tuple[Array, Array]:
    """The half-open range of positions each span lies in."""
    start = spans[:, layouts.START]
    return start, start + (spans[:, layouts.COUNT] - 1) * spans[:, layouts.STRIDE] + 1


def _crossed(regions: Regions, q_spans: Array, k_spans: Array) -> tuple[Regions, Array, Array]:
    """The regions cut to where the spans lie: every part, and its span of queries and of keys.

    The side with fewer spans is cut first: a causal or windowed region shrinks its keys when its queries are cut, and
    its queries when its keys are. So one rank's tiles cost what they are, on either side.
    """
    if len(q_spans) <= len(k_spans):
        q, part = _cut_side(regions, q_spans, Q0, Q1)[1:]
        row, k, part = _cut_side(part, k_spans, K0, K1)
        return part, q[row], k
    k, part = _cut_side(regions, k_spans, K0, K1)[1:]
    row, q, part = _cut_side(part, q_spans, Q0, Q1)
    return part, q, k[row]


def _cut_side(regions: Regions, spans: Array, start: int, stop: int) -> tuple[Array, Array, Regions]:
    """The regions cut on one side to where these spans lie: of every part its region, its span and itself."""
    region, span = _meetings(regions[:, start], regions[:, stop], spans)
    first, last = _reach(spans)
    part = regions[region].copy()
    part[:, start] = np.maximum(part[:, start], first[span])
    part[:, stop] = np.minimum(part[:, stop], last[span])
    part, kept = bands.tighten(part)
    return region[kept], span[kept], part


def _meetings(start: Array, stop: Array, spans: Array) -> tuple[Array, Array]:
    """Index pairs of ranges of positions, and spans of which the range holds a position."""
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for stride in np.unique(spans[:, layouts.STRIDE]).tolist():
        alike = np.flatnonzero(spans[:, layouts.STRIDE] == stride)
        first, last = _reach(spans[alike])
        short = stop - start < stride
        # A range as long as the stride holds a position of whatever span it overlaps.
        i = np.flatnonzero(~short)
        long, j = bands.overlaps(start[i], stop[i], first, last)
        pairs.append(np.stack([i[long], alike[j]]))
        if short.any():
            i = np.flatnonzero(short)
            few, j = _holding(start[i], stop[i], first, last, stride)
            pairs.append(np.stack([i[few], alike[j]]))
    found = np.concatenate(pairs, axis=1)
    return found[0], found[1]


def _holding(start: Array, stop: Array, first: Array, last: Array, stride: int) -> tuple[Array, Array]:
    """Index pairs of ranges shorter than a stride, and of the spans of it, ``[first, last)``, that they meet."""
    if len(start) * len(first) <= (stop - start).sum():
        i, j = bands.overlaps(start, stop, first, last)
        position = first[j] + np.maximum(-((first[j] - start[i]) // stride), 0) * stride
        hit = position < np.minimum(stop[i], last[j])
        return i[hit], j[hit]
    # Every position is looked up among the spans of its residue, which are apart from each other.
    i, nth = bands.pairs(stop - start)
    position, lift = start[i] + nth, int(max(stop.max(), last.max()))
    key = first % stride * lift + first
    order = np.argsort(key)
    j = order[np.searchsorted(key, position % stride * lift + position, side="right", sorter=order) - 1]
    hit = (first[j] <= position) & (position < last[j]) & ((position - first[j]) % stride == 0)
    return i[hit], j[hit]


def _classes(start: Array, stop: Array, spans: Array, stride: int) -> tuple[Array, Array, Array]:
    """Spans made spans of one common stride: each split into the residue classes of which a range holds a position.

    Args:
        start, stop: a range of positions for each span.

    Returns:
        The index of the span that each class is of, the classes, and their steps in the span's rows.
    """
    own = spans[:, layouts.STRIDE]
    steps = stride // own
    first = np.maximum(-((spans[:, layouts.START] - start) // own), 0)
    last = np.minimum(-((spans[:, layouts.START] - stop) // own), spans[:, layouts.COUNT])
    span, nth = bands.pairs(np.minimum(np.maximum(last - first, 0), steps))
    residue = (first[span] + nth) % steps[span]
    out = spans[span].copy()
    out[:, layouts.OFFSET] += residue
    out[:, layouts.START] += residue * own[span]
    out[:, layouts.COUNT] = (out[:, layouts.COUNT] - residue + steps[span] - 1) // steps[span]
    out[:, layouts.STRIDE] = stride
    return span, out, steps[span]


def key_ranges(regions: Regions, q_spans: Array) -> Array | None:
    """The positions of the keys that each rank's queries need: rows ``(q_rank, start, stop)``, merged and sorted.

    None where queries with a stride leave gaps between their keys that no region shows.
    """
    _, span, part = _cut_side(regions, q_spans, Q0, Q1)
    own, stride = q_spans[span], q_spans[span, layouts.STRIDE]
    if (part[:, HI] - part[:, LO] + 1 < stride).any():
        return None
    first, count = own[:, layouts.START], own[:, layouts.COUNT]
    nth = np.maximum(-((first - part[:, Q0]) // stride), 0), np.minimum((part[:, Q1] - 1 - first) // stride, count - 1)
    start = np.maximum(part[:, K0], first + nth[0] * stride - part[:, HI])
    stop = np.minimum(part[:, K1], first + nth[1] * stride - part[:, LO] + 1)
    kept = (nth[0] <= nth[1]) & (start < stop)
    return merged(np.stack([own[:, layouts.RANK], start, stop], axis=1)[kept])


def partial_area(mask: Mask, row: list[int]) -> int:
    """The number of allowed pairs of an partial tile, asked for some rows at a time."""
    total, j = 0, np.arange(row[N])
    for first in range(0, row[M], 256):
        i = np.arange(first, min(first + 256, row[M]))[:, None]
        band = (row[LOW] <= i - j) & (i - j <= row[HIGH])
        allowed = mask.allows(row[Q_POSITION] + row[Q_STRIDE] * i, row[K_POSITION] + row[K_STRIDE] * j[None, :])
        total += int(np.count_nonzero(band & allowed))
    return total


def transposed(rows: Array) -> Array:
    """Tiles with queries for keys, in the order they are in."""
    out: Array = rows[:, [K, N, K_STEP, Q, M, Q_STEP, HIGH, LOW, K_POSITION, K_STRIDE, Q_POSITION, Q_STRIDE, PARTIAL]]
    out[:, [LOW, HIGH]] *= -1
    return out


def used_keys(table: Array) -> Array:
    """The key rows that a cut touches, merged: int64 rows ``(q_rank, k_rank, start, stop)`` in that order.

    Every column of a tile holds a pair, so its key range is exactly what it needs. Keys taken with a step are
    counted one by one, as their gaps may be anybody's.
    """
    tile = table[:, 2:]
    counts = np.where(tile[:, K_STEP] == 1, 1, tile[:, N])
    row, nth = bands.pairs(counts)
    step = tile[row, K_STEP]
    start = tile[row, K] + nth * step
    stop = start + np.where(step == 1, tile[row, N], 1)
    return merged(np.stack([table[row, Q_RANK], table[row, K_RANK], start, stop], axis=1))


def merged(intervals: Array) -> Array:
    """Intervals ``(…keys, start, stop)`` sorted, and those that touch or overlap under equal keys joined."""
    if not len(intervals):
        return intervals
    intervals = intervals[np.lexsort(intervals[:, :-1].T[::-1])]
    start, stop = intervals[:, -2], intervals[:, -1]
    keys = intervals[:, :-2]
    changed = np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])
    # Groups are lifted apart, so that one running maximum serves all of them.
    lift = np.cumsum(changed) * (int(stop.max()) + 2)
    reach = np.maximum.accumulate(stop + lift)
    first = np.flatnonzero(np.concatenate([[True], (start + lift)[1:] > reach[:-1]]))
    out = intervals[first]
    out[:, -1] = np.maximum.reduceat(stop, first)
    return out
