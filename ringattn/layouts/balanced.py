"""The layout that balances tokens and the area of a mask together."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ringattn import bands
from ringattn.bands import Array, Regions
from ringattn.checking import shown
from ringattn.errors import InputError
from ringattn.layouts.base import Layout, make_runs, shares_of
from ringattn.masks import Mask, checked

SLACK = 1e-9  # areas that differ by no more of themselves are equal
SEGMENTS_PLACED = 16  # whole segments a rank, at most: the others are small, and cut where a rank needs it


@dataclasses.dataclass(frozen=True, init=False)
class Balanced(Layout):
    """Every rank gets the same tokens and the same area of the mask, in few long runs: fold, cut and fill.

    The row area (allowed keys of a query) of any banded mask is piecewise linear in the position. The sequence is
    cut where its slope changes. A sloped segment is *folded* (its head and tail taken in turn), so that all its
    tokens count with the same mean area; a flat one stays as it is. Then (see `_Deal`)

    1. while one segment is too much for a rank, the next rank takes as much of the largest as leaves it room for the
       sparsest tokens of the others: the largest segments meet the fewest ranks;
    2. of what remains, whole segments, densest first, go to the rank that lacks the densest tokens;
    3. what each rank still lacks is a window of the rest in order of density, cut to the token.

    Each step leaves what the next can share out exactly. One causal sequence reduces to zigzag, a full mask to
    contiguous.

    Attributes:
        masks: what is balanced: one mask, or those of several layers over one sharding, for their sum.
    """

    masks: tuple[Mask, ...]

    def __init__(self, masks: Mask | Sequence[Mask]) -> None:
        if not isinstance(masks, (Mask, list, tuple)):
            raise InputError(f"Balanced takes a ringattn mask, or several in a list; got {shown(masks)}.")
        given = (masks,) if isinstance(masks, Mask) else tuple(checked(mask) for mask in masks)
        if not given:
            raise InputError("Balanced needs at least one mask to balance.")
        object.__setattr__(self, "masks", given)

    @classmethod
    def from_mask(cls, mask: Mask | None) -> Balanced:
        if mask is None:
            raise InputError("layout='balanced' needs to know what to balance: give the mask, or Balanced(mask).")
        return cls(mask)

    def spans(self, length: int, size: int) -> Array:
        start, count, area, folded = self._segments(length)
        rank, segment, a, b = _dealt(count, area, np.diff(shares_of(length, size))).T
        first, whole, fold = start[segment], count[segment], folded[segment]
        # of a folded segment, tokens [a, b) are a piece of its head and a piece of its tail (see Zigzag)
        head = np.where(fold, (a + 1) // 2, a), np.where(fold, (b + 1) // 2, b)
        tail = whole - b // 2, whole - np.where(fold, a // 2, b // 2)
        runs = [np.stack([rank, first + x, first + y], axis=1) for x, y in (head, tail)]
        return make_runs(np.concatenate(runs))

    def _segments(self, length: int) -> tuple[Array, Array, Array, npt.NDArray[np.bool_]]:
        """Start, tokens, area and whether folded, of every segment, sparsest first."""
        if length >= bands.MAX_EXACT:
            raise InputError(
                f"Balanced weighs the pairs of up to {bands.MAX_EXACT - 1:,} tokens; got {length:,}. Use contiguous, "
                f"zigzag or striped."
            )
        parts = [_breakpoints(mask, length) for mask in self.masks]
        position, weight = parts[0] if len(parts) == 1 else bands.summed(*map(np.concatenate, zip(*parts, strict=True)))
        # rows 0 and 1 without a bend too: where the sequence begins, a segment does
        ends = np.array([row for row in (0, 1) if row not in position[:2]], dtype=np.int64)
        order = np.argsort(np.concatenate([ends, position]), kind="stable")
        position = np.concatenate([ends, position])[order]
        slope = np.cumsum(np.concatenate([0 * ends, weight])[order])
        slope, position = slope[position < length], position[position < length]
        # the row area at a bend is that of the row before it, and one step of the new slope
        gap = np.diff(position, prepend=0)
        value = np.cumsum(slope + np.concatenate([[0], slope[:-1]])[: len(gap)] * np.maximum(gap - 1, 0))
        # A segment's own first step is free: of rows in a run that all bend, every second begins none.
        nth = np.arange(len(position))
        run = np.maximum.accumulate(np.where(gap != 1, nth, 0)) if len(nth) else nth
        begins = np.flatnonzero((nth - run) % 2 == 0)
        start = position[begins]
        count = np.diff(np.append(start, length))[: len(start)]
        step = slope[np.searchsorted(position, start + 1, side="right") - 1] * (count > 1)
        area = count * value[begins] + step * (count * (count - 1) // 2)
        folded = step != 0
        order = np.lexsort((-start, area / np.maximum(count, 1)))
        return start[order], count[order], area[order], folded[order]

    def __str__(self) -> str:
        return f"balanced({'; '.join(map(str, self.masks))})"


def _breakpoints(mask: Mask, length: int) -> tuple[Array, Array]:
    """Where the row area of a mask bends, and by how much."""
    regions, partial = fitting(mask, length)
    if not len(partial):
        return bands.breakpoints(regions)
    second = np.diff(mask.row_areas(length, length), n=2, prepend=[0, 0])
    at = np.flatnonzero(second)
    return at, second[at]


def fitting(mask: Mask, length: int) -> tuple[Regions, Regions]:
    """The mask, divided, as one of so many queries and as many keys; an error that says so where it is not."""
    try:
        return checked(mask).classify(length, length)
    except InputError as error:
        raise InputError(
            f"A layout that goes by the mask takes it as one of {length} queries and as many keys. {error} Where it is "
            f"a mask of two sequences, name another layout, such as 'contiguous'."
        ) from error


class _Deal:
    """Segments in order of density, sparsest first, and what of each is left while ranks take of them.

    Attributes:
        density: mean row area of each segment: all its tokens count with it.
        low, left: tokens ``[low, low + left)`` of each are left, numbered from the outside of the fold in.
        first: the segments before this one are gone.
        taken: what was taken: rows ``(rank, segment, start, stop)``.
    """

    def __init__(self, count: Array, area: Array) -> None:
        self.density = area / np.maximum(count, 1)
        self.low, self.left, self.first = np.zeros_like(count), count.copy(), 0
        self.taken = [np.empty((0, 4), dtype=np.int64)]

    @property
    def weight(self) -> float:
        """The area of all that is left. Not a product of vectors, which is rounded otherwise on another processor."""
        return float((self.left * self.density).sum())

    def line(self, segments: Array, tokens: Array) -> Callable[[Any], Any]:
        """The area of the first t of these tokens (so many of each segment) in order of density, as a function of t."""
        ends = np.concatenate([[0.0], np.cumsum(tokens)])
        sums = np.concatenate([[0.0], np.cumsum(tokens * self.density[segments])])
        return lambda t: np.interp(t, ends, sums)

    def take(self, rank: int, segments: Array, tokens: Array, outside: int | None = None) -> None:
        """Gives a rank so many tokens of each segment: the innermost, but of segment ``outside`` the outermost."""
        segments, tokens = segments[tokens > 0], tokens[tokens > 0]
        start = self.low[segments] + np.where(segments == outside, 0, self.left[segments] - tokens)
        self.taken.append(np.stack([np.full_like(segments, rank), segments, start, start + tokens], axis=1))
        self.left[segments] -= tokens
        if outside is not None:
            self.low[outside] += tokens[segments == outside].sum()

    def sparsest(self, tokens: int, but: int) -> Array:
        """Segments that begin with the sparsest, and hold so many tokens beside one of them, or all there are."""
        while self.first < len(self.left) and not self.left[self.first]:
            self.first += 1
        many = 64
        while True:
            segments = np.arange(self.first, min(self.first + many, len(self.left)))
            held = self.left[segments].sum() - (self.left[but] if segments[0] <= but <= segments[-1] else 0)
            if held >= tokens or self.first + many >= len(self.left):
                others: Array = segments[segments != but]
                return others
            many *= 4

    def cut(self, rank: int, tokens: int, area: float) -> bool:
        """Gives a rank its part of the largest segment and the sparsest of the others; False if none needs cutting."""
        largest = int(np.argmax(self.left * self.density))
        whole, density = int(self.left[largest]), float(self.density[largest])
        segments = self.sparsest(tokens, but=largest)
        others = self.left[segments]
        upto = self.line(segments, others)
        low, high = max(0, tokens - int(others.sum())), min(tokens, whole)

        def area_at(x: int) -> float:
            return float(x * density + upto(tokens - x))

        fits = whole <= tokens and area_at(whole) <= area * (1 + SLACK)
        if fits or area_at(low) > area * (1 + SLACK) or area_at(high) < area * (1 - SLACK):
            return False
        x = _nearest(area_at, low, high, area)
        mine = _between(others, 0, tokens - x)
        self.take(rank, np.append(segments, largest), np.append(mine, x), outside=largest)
        return True

    def fill(self, rank: int, tokens: int, area: float) -> None:
        """Gives a rank the window of what is left that has so many tokens and so much area."""
        segments = np.flatnonzero(self.left)
        left = self.left[segments]
        upto = self.line(segments, left)

        def area_at(x: int) -> float:
            return float(upto(x + tokens) - upto(x))

        x = _nearest(area_at, 0, int(left.sum()) - tokens, area)
        self.take(rank, segments, _between(left, x, x + tokens))

    def place(self, tokens: Array, area: Array) -> Array:
        """Rows ``(segment, rank)``: whole segments, densest first, each to a rank that lacks the densest tokens.

        No more of them than leave what the others lack to be had from the rest.
        """
        need, lack, rows = tokens.astype(float), area.copy(), []
        segments = np.flatnonzero(self.left)
        for segment in segments[::-1][: SEGMENTS_PLACED * len(tokens)].tolist():
            count, weight = self.left[segment], self.left[segment] * self.density[segment]
            fits = (need >= count) & (lack - weight >= self.density[segments[0]] * (need - count))
            if fits.any():
                rank = int(np.argmax(np.where(fits, lack / np.maximum(need, 1), -1.0)))
                need[rank] -= count
                lack[rank] -= weight
                rows.append((segment, rank))
        table = np.array(rows, dtype=np.int64).reshape(-1, 2)
        most = bisect.bisect_right(
            range(1, len(rows) + 1), False, key=lambda n: not self._leaves(table[:n], tokens, area)
        )
        return table[:most]

    def lacking(self, placed: Array, tokens: Array, area: Array) -> tuple[Array, Array, Array]:
        """What is left when these segments are placed: of each segment, and the tokens and the area each rank lacks."""
        left, (segment, rank) = self.left.copy(), placed.T
        weight = left * self.density
        need = tokens - np.bincount(rank, left[segment], len(tokens)).astype(np.int64)
        lack = area - np.bincount(rank, weight[segment], len(tokens))
        left[segment] = 0
        return left, need, lack

    def _leaves(self, placed: Array, tokens: Array, area: Array) -> bool:
        """Whether, these placed, every rank can get what it lacks: no ranks together lack more than the densest."""
        left, need, lack = self.lacking(placed, tokens, area)
        upto, total = self.line(np.arange(len(left)), left), int(left.sum())
        order = np.argsort(-lack / np.maximum(need, SLACK))
        densest = upto(total) - upto(total - np.cumsum(need[order]))
        return bool((np.cumsum(lack[order]) <= densest + SLACK * area.sum()).all())


def _dealt(count: Array, area: Array, shares: Array) -> Array:
    """Who takes what of the segments, sparsest first: rows ``(rank, segment, start, stop)``, see `_Deal`."""
    deal = _Deal(count, area)
    ranks = np.flatnonzero(shares)

    def fair() -> float:
        return deal.weight / max(len(ranks), 1)

    while len(ranks) and deal.cut(int(ranks[0]), int(shares[ranks[0]]), fair()):
        ranks = ranks[1:]
    tokens, areas = shares[ranks], np.full(len(ranks), fair())
    placed = deal.place(tokens, areas)
    left, need, lack = deal.lacking(placed, tokens, areas)
    segment, rank = placed.T
    deal.taken.append(np.stack([ranks[rank], segment, deal.low[segment], (deal.low + deal.left)[segment]], axis=1))
    deal.left = left
    order = np.argsort(lack / np.maximum(need, 1))
    for at, i in enumerate(order.tolist()):
        missed = deal.weight - lack[order[at:]].sum()  # by those before, who take whole tokens
        deal.fill(int(ranks[i]), int(need[i]), float(lack[i] + missed / (len(order) - at)))
    return np.concatenate(deal.taken)


def _between(tokens: Array, start: int, stop: int) -> Array:
    """How many of each segment's tokens lie in ``[start, stop)`` of all of them in a line."""
    ends = np.cumsum(tokens)
    inside: Array = np.maximum(np.minimum(ends, stop) - np.maximum(ends - tokens, start), 0)
    return inside


def _nearest(value_at: Callable[[int], float], low: int, high: int, target: float) -> int:
    """The x in ``[low, high]`` whose value, which grows with x, is nearest the target; of equal ones the last."""
    x = max(low + bisect.bisect_right(range(low, high + 1), target * (1 + SLACK), key=value_at) - 1, low)
    return x + (x < high and abs(value_at(x + 1) - target) < abs(value_at(x) - target))
