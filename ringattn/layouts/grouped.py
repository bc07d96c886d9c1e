"""What the ranks of a group hold together, as a layout over the groups."""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn.bands import Array
from ringattn.layouts.base import COUNT, OFFSET, RANK, START, STRIDE, Layout, make_runs, make_spans


@dataclasses.dataclass(frozen=True)
class Grouped(Layout):
    """A layout over ``size`` times as many ranks, of which every ``size`` neighbours are one.

    Rows are in the order of positions but for strided spans, each of which stays in one piece: striped, they lie behind
    one another. What balances the ranks balances the groups, and neighbours' runs that touch become one.
    """

    layout: Layout
    size: int

    def spans(self, length: int, size: int) -> Array:
        return self.joined(self.layout.spans(length, size * self.size))

    def joined(self, spans: Array) -> Array:
        """The groups' spans, from those of the ranks."""
        own = spans.copy()
        own[:, RANK] //= self.size
        apart = own[:, STRIDE] > 1
        runs = own[~apart]
        if not apart.any():
            return make_runs(np.stack([runs[:, RANK], runs[:, START], runs[:, START] + runs[:, COUNT]], axis=1))
        return make_spans(*own[:, [RANK, START, COUNT, STRIDE]].T)

    def __str__(self) -> str:
        return f"{self.layout} by {self.size}"


def rows_in_groups(spans: Array, joined: Array, size: int) -> Array:
    """Where every rank's rows lie among its group's: runs ``(rank, own row, the group's row, count)``, in order.

    Args:
        spans, joined: the ranks', and those that `Grouped.joined` makes of them.
    """
    # a group's spans of one stride and residue lie in order: a row's is the last that does not begin behind it
    lift = int(spans[:, START].max(initial=0)) + 1
    keys = (joined[:, RANK] * lift + _line(joined)) * lift + joined[:, START]
    order = np.argsort(keys, kind="stable")
    own = (spans[:, RANK] // size * lift + _line(spans)) * lift + spans[:, START]
    found = order[np.searchsorted(keys[order], own, side="right") - 1]
    there = joined[found, OFFSET] + (spans[:, START] - joined[found, START]) // spans[:, STRIDE]
    runs = np.stack([spans[:, RANK], spans[:, OFFSET], there, spans[:, COUNT]], axis=1)
    apart = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 2] != runs[:-1, 2] + runs[:-1, 3])
    first = np.flatnonzero(np.concatenate([[True], apart])[: len(runs)])
    merged = runs[first]
    merged[:, 3] = np.add.reduceat(runs[:, 3], first) if len(runs) else 0
    return merged


def _line(spans: Array) -> Array:
    """The residue of strided spans, which no two of a group share; of others 0, in one line."""
    line: Array = np.where(spans[:, STRIDE] > 1, 1 + spans[:, START] % spans[:, STRIDE], 0)
    return line
