"""The layouts: who holds which positions.

A layout cuts ``length`` positions over ``size`` ranks into *spans*, an int64 array of rows
``(rank, offset, start, count, stride)``: the rank's local rows ``[offset, offset + count)`` are the positions
``start, start + stride, …``. Rows are sorted by rank and offset, positions ascend on every rank, and every
position is in exactly one span. Any length goes with any number of ranks; ranks' shares differ by at most one
token and may be empty.

To add a layout, write one class here and its line in ``ringattn/__init__.py``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

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
        start = np.concatenate([head, tail])
        count = np.concatenate([(b + 1) // 2 - head, length - a // 2 - tail])
        return _spans(np.concatenate([ranks, ranks]), start, count, 1)

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
        case "auto":
            return chosen(mask, length)
    raise InputError(f"layout must be a Layout or one of 'auto', 'contiguous', 'zigzag', 'striped'; got {layout!r}.")


def chosen(mask: Mask | None, length: int) -> Layout:
    """What ``auto`` takes: zigzag for one causal sequence, whose area grows along it, contiguous otherwise."""
    if mask is None:
        return Contiguous()
    regions = checked(mask).regions(length, length)
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
