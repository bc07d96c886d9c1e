"""Demand: which rank's queries need which rank's keys. A mask cut by two shardings, and what schedules ask of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import numpy as np

from ringattn import bands, layouts
from ringattn.bands import Array, Regions
from ringattn.masks import Mask, Transposed
from ringattn.plans import tiles
from ringattn.plans.tiles import K_RANK, Q_RANK

T = TypeVar("T")

AT_ONCE = 100_000  # tiles: while there are fewer, twice as many ranks are cut at once


@dataclasses.dataclass(frozen=True, eq=False)
class Demand:
    """The allowed pairs of a mask, by the ranks that hold them.

    One rank's plan needs only its own rows and columns of the cut, which are made when they are asked for; all ranks'
    plans share one (`for_all_ranks`).

    Attributes:
        mask: what was asked for.
        regions, partial: its regions in these lengths: all pairs allowed, and pairs to be asked for.
        q_spans, k_spans: who holds which queries and keys, as `layouts` describes.
        size: ranks that share the sequence.
        node: how many neighbouring ones share a node; None where all do, or it is not known.
        table: the cut of all ranks, sorted by the rank of the queries, then of the keys; None where ranks are planned
            one by one.
    """

    mask: Mask
    regions: Regions
    partial: Regions
    q_spans: Array
    k_spans: Array
    size: int
    node: int | None = None
    table: Array | None = None
    _memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False)

    def memo(self, function: Callable[..., T], *args: Hashable) -> T:
        """``function(self, *args)``, worked out once for this demand."""
        key = (function, args)
        if key not in self._memo:
            self._memo[key] = function(self, *args)
        return self._memo[key]  # type: ignore[no-any-return]

    def for_all_ranks(self) -> Demand:
        """The same demand with one cut for all ranks."""
        return dataclasses.replace(self, table=self.cut(self.q_spans, self.k_spans))

    @property
    def transposed(self) -> Demand:
        """The same pairs with queries for keys: which rank's keys need which rank's queries."""
        return self.memo(_transposed)

    @property
    def of_all_for_all(self) -> bool:
        """Whether every rank has keys, and queries that need all keys of all ranks, as far as that is seen at once."""
        return self.memo(_of_all_for_all)

    def rows(self, rank: int) -> Array:
        """The cut of one rank's queries with everybody's keys."""
        return self.memo(_rows, range(rank, rank + 1))

    def keys_needed_by(self, rank: int) -> Array:
        """The key rows one rank's queries use: ``(rank, k_rank, start, stop)``, sorted."""
        return self.memo(_keys_needed_by, rank)

    def keys_requested_from(self, rank: int) -> Array:
        """One rank's key rows that queries use: ``(q_rank, rank, start, stop)``, sorted."""
        return self.memo(_keys_requested_from, range(rank, rank + 1))[0]

    def columns(self, rank: int) -> Array:
        """The cut of everybody's queries with one rank's keys."""
        return _columns(self, range(rank, rank + 1))

    def rows_of_all(self) -> Iterator[Array]:
        """The whole cut, the queries of some ranks at a time, in order."""
        ranks = range(1)
        while ranks.start < self.size:
            table = _rows(self, ranks)
            yield table
            ranks = _next(ranks, len(table))

    def keys_requested_from_all(self) -> Iterator[Array]:
        """The key rows that queries use, of the keys of some ranks at a time, in order: see `keys_requested_from`.

        The first are those of rank 0: who finds among them what was looked for has cut no more than one plan takes.
        """
        ranks, rows = range(1), 0
        while ranks.start < self.size:
            used, cut = self.memo(_keys_requested_from, ranks)
            rows += len(used)
            bands.check_pairs(rows)
            yield used
            ranks = _next(ranks, cut)

    def needed_by_all(self, most: int) -> Array | None:
        """The key rows that all ranks' queries use, without a cut: see `keys_needed_by`.

        None where they are not seen at once, for the strides of a layout, or would be more than ``most`` ranges.
        """
        return self.memo(_needed_by_all, most)

    def cut(self, q_spans: Array, k_spans: Array) -> Array:
        """The mask cut by some ranks' queries and keys, sorted by the rank of the queries, then of the keys."""
        table = tiles.cut(self.regions, q_spans, k_spans)
        if len(self.partial):
            table = np.concatenate([table, tiles.cut(self.partial, q_spans, k_spans, partial=True)])
        return table[np.lexsort((table[:, K_RANK], table[:, Q_RANK]))]


def _transposed(demand: Demand) -> Demand:
    regions, partial = bands.transpose(demand.regions), bands.transpose(demand.partial)
    turned = Demand(Transposed(demand.mask), regions, partial, demand.k_spans, demand.q_spans, demand.size, demand.node)
    return turned if demand.table is None else turned.for_all_ranks()


def _of_all_for_all(demand: Demand) -> bool:
    held = layouts.counts(demand.k_spans, demand.size)
    ranges = tiles.key_ranges(np.concatenate([demand.regions, demand.partial]), demand.q_spans)
    everything = np.stack([np.arange(demand.size), 0 * held, np.full_like(held, held.sum())], axis=1)
    return bool((held > 0).all()) and ranges is not None and np.array_equal(ranges, everything)


def _rows(demand: Demand, ranks: range) -> Array:
    if demand.table is not None:
        return _of(demand.table, Q_RANK, ranks)
    return demand.cut(_of(demand.q_spans, layouts.RANK, ranks), demand.k_spans)


def _columns(demand: Demand, ranks: range) -> Array:
    if demand.table is not None:
        return _of(demand.memo(_by_owner), K_RANK, ranks)
    return demand.cut(demand.q_spans, _of(demand.k_spans, layouts.RANK, ranks))


def _by_owner(demand: Demand) -> Array:
    """The whole cut, sorted by the rank of the keys, then of the queries."""
    assert demand.table is not None
    return demand.table[np.argsort(demand.table[:, K_RANK], kind="stable")]


def _keys_needed_by(demand: Demand, rank: int) -> Array:
    return tiles.used_keys(demand.rows(rank))


def _keys_requested_from(demand: Demand, ranks: range) -> tuple[Array, int]:
    """The key rows of these ranks that queries use, and how many tiles do."""
    table = _columns(demand, ranks)
    return tiles.used_keys(table), len(table)


def _needed_by_all(demand: Demand, most: int) -> Array | None:
    spans = demand.k_spans[demand.k_spans[:, layouts.COUNT] > 0]
    ranges = tiles.key_ranges(np.concatenate([demand.regions, demand.partial]), demand.q_spans)
    if ranges is None or ((spans[:, layouts.STRIDE] > 1) & (spans[:, layouts.COUNT] > 1)).any():
        return None
    spans = spans[np.argsort(spans[:, layouts.START])]  # one behind the other: together they are the sequence
    begin = spans[:, layouts.START]
    end = begin + spans[:, layouts.COUNT]
    first, last = np.searchsorted(end, ranges[:, 1], side="right"), np.searchsorted(begin, ranges[:, 2], side="left")
    if int((last - first).sum()) > most:
        return None
    which, nth = bands.expand(last - first)
    span = first[which] + nth
    shift = spans[span, layouts.OFFSET] - begin[span]
    start, stop = np.maximum(ranges[which, 1], begin[span]), np.minimum(ranges[which, 2], end[span])
    return tiles.merged(np.stack([ranges[which, 0], spans[span, layouts.RANK], start + shift, stop + shift], axis=1))


def _next(ranks: range, tile_count: int) -> range:
    """The ranks after these: twice as many, or half as many where these had many tiles."""
    count = 2 * len(ranks) if tile_count < AT_ONCE else max(len(ranks) // 2, 1)
    return range(ranks.stop, ranks.stop + count)


def _of(table: Array, column: int, ranks: range) -> Array:
    """The rows of a table, sorted by this column, whose rank there is one of these."""
    start, stop = np.searchsorted(table[:, column], [ranks.start, ranks.stop])
    return table[start:stop]
