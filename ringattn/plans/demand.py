"""Demand: which rank's queries need which rank's keys. A mask cut by two shardings, and what schedules ask of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

from ringattn import layouts
from ringattn.bands import Array, Regions
from ringattn.masks import Mask
from ringattn.plans import tiles
from ringattn.plans.tiles import K_RANK, Q_RANK

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Demand:
    """The allowed pairs of a mask, by the ranks that hold them.

    One rank's plan needs only its own rows and columns of the cut; all ranks' plans share one whole cut, which is
    made when `whole` is first asked for.

    Attributes:
        mask: what was asked for.
        regions, partial: its regions in these lengths: all pairs allowed, and pairs to be asked for.
        q_spans, k_spans: who holds which queries and keys, as `layouts` describes.
        size: ranks that share the sequence.
    """

    mask: Mask
    regions: Regions
    partial: Regions
    q_spans: Array
    k_spans: Array
    size: int
    _memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False)

    def memo(self, function: Callable[..., T], *args: Hashable) -> T:
        """``function(self, *args)``, worked out once for this demand."""
        key = (function, args)
        if key not in self._memo:
            self._memo[key] = function(self, *args)
        return self._memo[key]  # type: ignore[no-any-return]

    @functools.cached_property
    def whole(self) -> Array:
        """The cut of all ranks, sorted by the rank of the queries, then of the keys."""
        table = self.cut(self.q_spans, self.k_spans)
        return table[np.lexsort((table[:, K_RANK], table[:, Q_RANK]))]

    @functools.cached_property
    def used(self) -> Array:
        """Key rows used, all ranks: ``(q_rank, k_rank, start, stop)``, sorted."""
        return tiles.used_keys(self.whole)

    @functools.cached_property
    def needed_by_owner(self) -> Array:
        """`used`, sorted by the rank of the keys, then of the queries."""
        return self.used[np.argsort(self.used[:, K_RANK], kind="stable")]

    def cut(self, q_spans: Array, k_spans: Array) -> Array:
        """The mask cut by some ranks' queries and keys."""
        table = tiles.cut(self.regions, q_spans, k_spans)
        if not len(self.partial):
            return table
        return np.concatenate([table, tiles.cut(self.partial, q_spans, k_spans, partial=True)])

    def rows(self, rank: int) -> Array:
        """The cut of one rank's queries with everybody's keys."""
        return self.memo(_rows, rank)

    def keys_needed_by(self, rank: int) -> Array:
        """The key rows one rank's queries use: ``(rank, k_rank, start, stop)``, sorted."""
        return self.memo(_used_by, rank)

    def keys_requested_from(self, rank: int) -> Array:
        """One rank's key rows that queries use: ``(q_rank, rank, start, stop)``, sorted."""
        return self.memo(_used_of, rank)


def _rows(demand: Demand, rank: int) -> Array:
    if "whole" in demand.__dict__:
        return _slice(demand.whole, Q_RANK, rank)
    return demand.cut(_slice(demand.q_spans, layouts.RANK, rank), demand.k_spans)


def _used_by(demand: Demand, rank: int) -> Array:
    if "whole" in demand.__dict__:
        return _slice(demand.used, Q_RANK, rank)
    return tiles.used_keys(demand.rows(rank))


def _used_of(demand: Demand, rank: int) -> Array:
    if "whole" in demand.__dict__:
        return _slice(demand.needed_by_owner, K_RANK, rank)
    own = _slice(demand.k_spans, layouts.RANK, rank)
    return tiles.used_keys(demand.cut(demand.q_spans, own))


def _slice(table: Array, column: int, value: int) -> Array:
    """The rows of a sorted table with this value."""
    start, stop = np.searchsorted(table[:, column], [value, value + 1])
    return table[start:stop]
