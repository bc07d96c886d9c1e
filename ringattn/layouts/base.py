"""The layout contract, and what layouts are made with.

A layout cuts ``length`` positions over ``size`` ranks into *spans*, an int64 array of rows
``(rank, offset, start, count, stride)``: the rank's local rows ``[offset, offset + count)`` are the positions
``start, start + stride, …``. Rows are sorted by rank and offset, positions ascend on every rank, and every
position is in exactly one span. Any length goes with any number of ranks; ranks' shares differ by at most one
token, unless they were named one by one, and may be empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from ringattn import bands
from ringattn.bands import Array
from ringattn.checking import MAX_RANKS, integer, tokens
from ringattn.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ringattn.masks import Mask

RANK, OFFSET, START, COUNT, STRIDE = range(5)
MAX_POSITIONS = 1 << 31  # of one rank: 16 GB


class Layout(ABC):
    """Who holds which positions: an immutable value."""

    @classmethod
    def from_mask(cls, mask: Mask | None) -> Layout:  # noqa: ARG003 (most go by no mask)
        """The layout of this name where a mask is known, or None: made without arguments, unless the class says more.

        Raises:
            InputError: it needs other arguments.
        """
        try:
            return cls()
        except TypeError as error:
            raise InputError(f"A layout that needs arguments must be made first: {error}.") from error

    @abstractmethod
    def spans(self, length: int, size: int) -> Array:
        """The spans ``(rank, offset, start, count, stride)`` of every rank, without empty ones."""

    @abstractmethod
    def __str__(self) -> str:
        """The layout's name, and what tells it from others of that name."""

    def describe(self, length: int, size: int) -> str:
        """The layout in a line, for so many tokens on so many ranks.

        >>> from ringattn.layouts import Zigzag
        >>> Zigzag().describe(8192, 4)
        'zigzag: 8,192 tokens on 4 ranks, 2,048 to 2,048 tokens a rank in 2 runs at most'
        """
        length, size = _checked(length, size)
        spans = self.spans(length, size)
        held = counts(spans, size)
        runs = np.bincount(spans[:, RANK], weights=np.where(spans[:, STRIDE] == 1, 1, spans[:, COUNT]), minlength=size)
        return (
            f"{self}: {length:,} tokens on {size} ranks, {held.min():,} to {held.max():,} tokens a rank "
            f"in {int(runs.max(initial=0)):,} runs at most"
        )

    def draw(self, axes: Axes, length: int, size: int) -> None:
        """Draws who holds what into matplotlib axes: one row per rank, positions across, a bar for every run."""
        length, size = _checked(length, size)
        for rank, _, start, count, stride in self.spans(length, size).tolist():
            runs = [(start, count)] if stride == 1 else [(start + stride * i, 1) for i in range(count)]
            axes.broken_barh(runs, (rank - 0.4, 0.8))
        axes.set(
            xlabel="position", ylabel="rank", title=str(self)[:60], xlim=(0, max(length, 1)), ylim=(size - 0.5, -0.5)
        )


def _checked(length: object, size: object) -> tuple[int, int]:
    return tokens(length, "A sequence's length"), integer(
        size, "The layout's size", least=1, below=MAX_RANKS + 1, needed="a number of ranks"
    )


def make_spans(rank: Array, start: Array, count: Array, stride: int | Array) -> Array:
    """Spans in order of rank and start, empty ones dropped and offsets filled in."""
    rows = np.stack(np.broadcast_arrays(rank, 0, start, count, stride), axis=1).astype(np.int64)
    rows = rows[rows[:, COUNT] > 0]
    rows = rows[np.lexsort((rows[:, START], rows[:, RANK]))]
    before = np.cumsum(rows[:, COUNT]) - rows[:, COUNT]
    first = np.searchsorted(rows[:, RANK], rows[:, RANK], side="left")
    rows[:, OFFSET] = before - before[first] if len(rows) else before
    return rows


def make_runs(runs: Array) -> Array:
    """Spans of runs ``(rank, start, stop)``: empty ones dropped, those that touch on one rank made one."""
    runs = runs[runs[:, 1] < runs[:, 2]]
    runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))]
    apart = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 1] != runs[:-1, 2])
    first = np.flatnonzero(np.concatenate([[True], apart])[: len(runs)])
    last = np.append(first[1:], len(runs)) - 1 if len(runs) else first
    return make_spans(runs[first, 0], runs[first, 1], runs[last, 2] - runs[first, 1], 1)


def shares_of(length: int, size: int) -> Array:
    """The edges ``[size + 1]`` of shares that differ by at most one token, larger ones first."""
    each, extra = divmod(length, size)
    ranks = np.arange(size + 1, dtype=np.int64)
    return ranks * each + np.minimum(ranks, extra)


def positions(spans: Array, rank: int) -> Array:
    """The global positions ``[tokens]`` of one rank, ascending."""
    own = spans[slice(*np.searchsorted(spans[:, RANK], [rank, rank + 1]))]
    tokens = int(own[:, COUNT].sum())
    if tokens > MAX_POSITIONS:
        raise InputError(f"Rank {rank} holds {tokens:,} tokens; up to {MAX_POSITIONS:,} are listed. Use more ranks.")
    span, nth = bands.expand(own[:, COUNT])
    found: Array = own[span, START] + own[span, STRIDE] * nth
    return found


def counts(spans: Array, size: int) -> Array:
    """How many tokens each rank receives, ``[size]``."""
    return np.bincount(spans[:, RANK], weights=spans[:, COUNT], minlength=size).astype(np.int64)
