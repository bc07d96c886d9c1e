"""The layouts: who holds which positions.

A layout cuts ``length`` positions over ``size`` ranks into *spans*, an int64 array of rows
``(rank, offset, start, count, stride)``: the rank's local rows ``[offset, offset + count)`` are the positions
``start, start + stride, …``. Rows are sorted by rank and offset, positions ascend on every rank, and every
position is in exactly one span. Any length goes with any number of ranks; ranks' shares differ by at most one
token and may be empty.

To add a layout, write one class here and its line in ``ringattn/__init__.py``.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn import bands
from ringattn.bands import Array
from ringattn.errors import InputError
from ringattn.masks import Causal, Mask, checked

RANK, OFFSET, START, COUNT, STRIDE = range(5)


class Layout(ABC):
    """Who holds which positions: an immutable value."""

    @abstractmethod
    def spans(self, length: int, size: int) -> Array:
        """The spans ``(rank, offset, start, count, stride)`` of every rank, without empty ones."""


def _spans(rank: Array, start: Array, count: Array, stride: int | Array) -> Array:
    """Spans in order of rank and start, empty ones dropped and offsets filled in."""
    rows = np.stack(np.broadcast_arrays(rank, 0, start, count, stride), axis=1).astype(np.int64)
    rows = rows[rows[:, COUNT] > 0]
    rows = rows[np.lexsort((rows[:, START], rows[:, RANK]))]
    before = np.cumsum(rows[:, COUNT]) - rows[:, COUNT]
    first = np.searchsorted(rows[:, RANK], rows[:, RANK], side="left")
    rows[:, OFFSET] = before - before[first] if len(rows) else before
    return rows


def _runs(runs: Array) -> Array:
    """Spans of runs ``(rank, start, stop)``: empty ones dropped, those that touch on one rank made one."""
    runs = runs[runs[:, 1] < runs[:, 2]]
    runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))]
    apart = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 1] != runs[:-1, 2])
    first = np.flatnonzero(np.concatenate([[True], apart])[: len(runs)])
    last = np.append(first[1:], len(runs)) - 1 if len(runs) else first
    return _spans(runs[first, 0], runs[first, 1], runs[last, 2] - runs[first, 1], 1)


def _shares(length: int, size: int) -> Array:
    """The edges ``[size + 1]`` of shares that differ by at most one token, larger ones first."""
    each, extra = divmod(length, size)
    ranks = np.arange(size + 1, dtype=np.int64)
    return ranks * each + np.minimum(ranks, extra)


@dataclasses.dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th run of positions: nothing moves that a local mask does not ask for."""

    def spans(self, length: int, size: int) -> Array:
        edges = _shares(length, size)
        return _spans(np.arange(size), edges[:-1], np.diff(edges), 1)

    def __str__(self) -> str:
        return "contiguous"


@dataclasses.dataclass(frozen=True)
class Zigzag(Layout):
    """Rank r holds the r-th run from the front and the r-th from the back: balances one causal sequence.

    The sequence is folded (first, last, second, last but one, …) and the folded one cut into even shares, so
    a share ``[a, b)`` is the head ``[ceil(a/2), ceil(b/2))`` and the tail ``[N - b//2, N - a//2)``, for any N.
    """

    def spans(self, length: int, size: int) -> Array:
        edges = _shares(length, size)
        ranks, a, b = np.arange(size), edges[:-1], edges[1:]
        head, tail = (a + 1) // 2, length - b // 2
        halves = (ranks, head, (b + 1) // 2), (ranks, tail, length - a // 2)
        return _runs(np.concatenate([np.stack(half, axis=1) for half in halves]))

    def __str__(self) -> str:
        return "zigzag"


@dataclasses.dataclass(frozen=True)
class Striped(Layout):
    """Rank r holds positions r, r + P, r + 2P, … (Striped Attention, arXiv 2311.09431)."""

    def spans(self, length: int, size: int) -> Array:
        ranks = np.arange(size, dtype=np.int64)
        return _spans(ranks, ranks, (length - ranks + size - 1) // size, size)

    def __str__(self) -> str:
        return "striped"


@dataclasses.dataclass(frozen=True, init=False)
class Balanced(Layout):
    """Every rank gets the same tokens and the same area of the mask, in few long runs: fold and squeeze.

    The row area (allowed keys of a query) of any banded mask is piecewise linear in the position. The sequence is
    cut where its slope changes. A sloped segment is *folded* (its head and tail taken in turn), so that all its
    tokens count with the same mean area; a flat one stays as it is. Segments are sorted by density, and each rank
    in turn is *squeezed* between the ends: it takes x tokens of the densest and the rest of its share from the
    sparsest, with x such that its area is its part of what remains. One causal sequence reduces to zigzag, a full
    mask to contiguous.

    Attributes:
        masks: what is balanced: one mask, or those of several layers over one sharding, for their sum.
    """

    masks: tuple[Mask, ...]

    def __init__(self, masks: Mask | Sequence[Mask]) -> None:
        given = (masks,) if isinstance(masks, Mask) else tuple(checked(mask) for mask in masks)
        if not given:
            raise InputError("Balanced needs at least one mask to balance.")
        object.__setattr__(self, "masks", given)

    def spans(self, length: int, size: int) -> Array:
        start, count, area, folded = self._segments(length)
        edges = np.concatenate([[0], np.cumsum(count)])
        taken = _squeezed(edges, np.concatenate([[0], np.cumsum(area)]), _shares(length, size))
        part, segment = bands.overlaps(taken[:, 1], taken[:, 2], edges[:-1], edges[1:])
        a = np.maximum(taken[part, 1], edges[segment]) - edges[segment]
        b = np.minimum(taken[part, 2], edges[segment + 1]) - edges[segment]
        rank, first, whole, fold = taken[part, 0], start[segment], count[segment], folded[segment]
        # of a folded segment, tokens [a, b) are a piece of its head and a piece of its tail (see Zigzag)
        head = np.where(fold, (a + 1) // 2, a), np.where(fold, (b + 1) // 2, b)
        tail = whole - b // 2, whole - np.where(fold, a // 2, b // 2)
        runs = [np.stack([rank, first + x, first + y], axis=1) for x, y in (head, tail)]
        return _runs(np.concatenate(runs))

    def _segments(self, length: int) -> tuple[Array, Array, Array, npt.NDArray[np.bool_]]:
        """Start, tokens, area and whether folded, of every segment, densest first."""
        rows = sum(
            (bands.row_areas(mask.regions(length, length), length) for mask in self.masks), np.zeros(length, int)
        )
        slope = np.diff(rows)
        # A segment begins where the step into a row differs from the step into the row before. Its own first step is
        # free: of rows in a run that all seem to begin one, every second does not.
        differs = np.concatenate([[True, True], slope[1:] != slope[:-1]])[:length]
        row = np.arange(length)
        before = np.maximum.accumulate(np.where(differs, -1, row))
        start = np.flatnonzero(differs & ((row - before) % 2 == 1))
        count = np.diff(np.append(start, length))
        area = np.add.reduceat(rows, start) if length else rows
        folded = np.append(slope, 0)[start] != 0
        order = np.lexsort((start, -area / np.maximum(count, 1)))
        return start[order], count[order], area[order], folded[order] & (count[order] > 1)

    def __str__(self) -> str:
        return f"balanced({'; '.join(map(str, self.masks))})"


@dataclasses.dataclass(frozen=True, init=False)
class Explicit(Layout):
    """Exactly the positions that are named: for each rank its half-open runs ``(start, stop)``, ascending.

    >>> Explicit([[(0, 2), (6, 8)], [(2, 6)]]).spans(8, 2).tolist()
    [[0, 0, 0, 2, 1], [0, 2, 6, 2, 1], [1, 0, 2, 4, 1]]
    """

    runs: tuple[tuple[tuple[int, int], ...], ...]

    def __init__(self, runs: Sequence[Sequence[tuple[int, int]]]) -> None:
        given = tuple(tuple((operator.index(start), operator.index(stop)) for start, stop in rank) for rank in runs)
        if any(b <= a for rank in given for a, b in rank) or any(
            left[1] > right[0] for rank in given for left, right in itertools.pairwise(rank)
        ):
            raise InputError(f"Explicit needs each rank's runs (start, stop) ascending and not empty; got {given}.")
        object.__setattr__(self, "runs", given)

    def spans(self, length: int, size: int) -> Array:
        if len(self.runs) != size:
            raise InputError(f"Explicit names the positions of {len(self.runs)} ranks; the mesh has {size}.")
        rows = [(rank, start, stop) for rank, runs in enumerate(self.runs) for start, stop in runs]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        by_start = table[np.argsort(table[:, 1])]
        if not np.array_equal(np.append(by_start[:, 1], length), np.insert(by_start[:, 2], 0, 0)):
            raise InputError(f"Explicit must give each of the {length} positions to one rank; got {self.runs}.")
        return _runs(table)

    def __str__(self) -> str:
        return f"explicit({len(self.runs)} ranks, {sum(len(rank) for rank in self.runs)} runs)"


def _squeezed(edges: Array, area: Array, shares: Array) -> Array:
    """What each rank takes of the tokens in order of density: rows ``(rank, start, stop)``, sorted by start.

    Args:
        edges, area: ends of the segments, in tokens and in summed area, from 0 on; between them area grows evenly.
        shares: the ends of the ranks' shares in tokens.
    """
    ends, sums = edges.tolist(), area.tolist()

    def upto(t: int) -> float:
        """The area of the first t tokens."""
        i = max(bisect.bisect_left(ends, t), 1)
        if i >= len(ends):
            return float(sums[-1])
        return float(sums[i - 1] + (sums[i] - sums[i - 1]) * (t - ends[i - 1]) / max(ends[i] - ends[i - 1], 1))

    def taken(x: int, low: int, high: int, tokens: int) -> float:
        """The area of x tokens of the densest and the others of the sparsest, which grows with x."""
        return upto(low + x) - upto(low) + upto(high) - upto(high - tokens + x)

    ranks, low, high, rows = len(shares) - 1, 0, ends[-1], []
    for rank, tokens in enumerate(np.diff(shares).tolist()):
        target, of = (
            (upto(high) - upto(low)) / (ranks - rank),
            functools.partial(taken, low=low, high=high, tokens=tokens),
        )
        if of(tokens) - of(0) <= 1e-9 * target:
            x = tokens  # they weigh alike: one run
        else:
            x = max(bisect.bisect_right(range(tokens + 1), target, key=of) - 1, 0)
            x += x < tokens and abs(of(x + 1) - target) < abs(of(x) - target)
        rows += [(rank, low, low + x), (rank, high - tokens + x, high)]
        low, high = low + x, high - tokens + x
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    table = table[table[:, 1] < table[:, 2]]
    return table[np.argsort(table[:, 1])]


def named(layout: Any, mask: Mask | None, length: int) -> Layout:
    """The layout itself, or the one of this name; ``auto`` chooses by the mask (see `chosen`)."""
    if isinstance(layout, Layout):
        return layout
    match layout:
        case "contiguous":
            return Contiguous()
        case "zigzag":
            return Zigzag()
        case "striped":
            return Striped()
        case "balanced" if mask is not None:
            return Balanced(mask)
        case "balanced":
            raise InputError("layout='balanced' needs to know what to balance: give the mask, or Balanced(mask).")
        case "auto":
            return chosen(mask, length)
    raise InputError(
        f"layout must be a Layout or one of 'auto', 'balanced', 'contiguous', 'zigzag', 'striped'; got {layout!r}."
    )


def chosen(mask: Mask | None, length: int) -> Layout:
    """What ``auto`` takes: balanced, and where that comes to the same or moves more than it gains, the simpler one.

    One band over the whole sequence is contiguous when it is full or a window, whose rows weigh alike but for its ends,
    and zigzag when it is causal. Without a mask, contiguous.
    """
    if mask is None:
        return Contiguous()
    regions = checked(mask).regions(length, length)
    if len(regions) > 1:
        return Balanced(mask)
    one_triangle = Causal().regions(length, length)
    return Zigzag() if length and np.array_equal(regions, one_triangle) else Contiguous()


def positions(spans: Array, rank: int) -> Array:
    """The global positions ``[tokens]`` of one rank, ascending."""
    own = spans[spans[:, RANK] == rank]
    parts = [start + stride * np.arange(count) for _, _, start, count, stride in own.tolist()]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def counts(spans: Array, size: int) -> Array:
    """How many tokens each rank holds, ``[size]``."""
    return np.bincount(spans[:, RANK], weights=spans[:, COUNT], minlength=size).astype(np.int64)
