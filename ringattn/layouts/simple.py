"""The layouts that are closed formulas, and the one that is given."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from ringattn.bands import Array
from ringattn.checking import integer, shown
from ringattn.errors import InputError
from ringattn.layouts.base import Layout, make_runs, make_spans, shares_of


@dataclasses.dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds the r-th run of positions: nothing moves that a local mask does not ask for."""

    def spans(self, length: int, size: int) -> Array:
        edges = shares_of(length, size)
        return make_spans(np.arange(size), edges[:-1], np.diff(edges), 1)

    def __str__(self) -> str:
        return "contiguous"


@dataclasses.dataclass(frozen=True)
class Zigzag(Layout):
    """Rank r holds the r-th run from the front and the r-th from the back: balances one causal sequence.

    The sequence is folded (first, last, second, last but one, …) and the folded one cut into even shares, so
    a share ``[a, b)`` is the head ``[ceil(a/2), ceil(b/2))`` and the tail ``[N - b//2, N - a//2)``, for any N.
    """

    def spans(self, length: int, size: int) -> Array:
        edges = shares_of(length, size)
        ranks, a, b = np.arange(size), edges[:-1], edges[1:]
        head, tail = (a + 1) // 2, length - b // 2
        halves = (ranks, head, (b + 1) // 2), (ranks, tail, length - a // 2)
        return make_runs(np.concatenate([np.stack(half, axis=1) for half in halves]))

    def __str__(self) -> str:
        return "zigzag"


@dataclasses.dataclass(frozen=True)
class Striped(Layout):
    """Rank r holds positions r, r + P, r + 2P, … (Striped Attention, arXiv 2311.09431)."""

    def spans(self, length: int, size: int) -> Array:
        ranks = np.arange(size, dtype=np.int64)
        return make_spans(ranks, ranks, (length - ranks + size - 1) // size, size)

    def __str__(self) -> str:
        return "striped"


@dataclasses.dataclass(frozen=True, init=False)
class Explicit(Layout):
    """Exactly the positions that are named: for each rank its half-open runs ``(start, stop)``, ascending.

    >>> Explicit([[(0, 2), (6, 8)], [(2, 6)]]).spans(8, 2).tolist()
    [[0, 0, 0, 2, 1], [0, 2, 6, 2, 1], [1, 0, 2, 4, 1]]
    """

    runs: tuple[tuple[tuple[int, int], ...], ...]

    def __init__(self, runs: Sequence[Sequence[tuple[int, int]]]) -> None:
        try:
            given = tuple(tuple((integer(a, "start"), integer(b, "stop")) for a, b in rank) for rank in runs)
        except Exception as error:  # whatever the values' own methods raise
            raise InputError(
                f"Explicit takes for each rank a list of runs (start, stop); got {shown(runs)}: {error}"
            ) from error
        if any(b <= a for rank in given for a, b in rank) or any(
            left[1] > right[0] for rank in given for left, right in itertools.pairwise(rank)
        ):
            raise InputError(f"Explicit needs a rank's runs (start, stop) ascending and not empty; got {shown(given)}.")
        object.__setattr__(self, "runs", given)

    def spans(self, length: int, size: int) -> Array:
        if len(self.runs) != size:
            raise InputError(f"Explicit names the positions of {len(self.runs)} ranks; the mesh has {size}.")
        rows = [(rank, start, stop) for rank, runs in enumerate(self.runs) for start, stop in runs]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        by_start = table[np.argsort(table[:, 1])]
        if not np.array_equal(np.append(by_start[:, 1], length), np.insert(by_start[:, 2], 0, 0)):
            raise InputError(f"Explicit must give each of the {length} positions to one rank; got {shown(self.runs)}.")
        return make_runs(table)

    def __str__(self) -> str:
        return f"explicit({len(self.runs)} ranks, {sum(len(rank) for rank in self.runs)} runs)"
