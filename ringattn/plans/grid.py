"""Grids: one rank's pairs in whole tiles of the sequence, so that what is summed does not depend on who holds what.

The sequence is cut into *blocks* of positions, from position 0 on, the same for any number of ranks and any layout. A
rank's own rows lie in blocks that may be others' too, and so do the rows of the other side that its plan brings; each
row has the place in its block that its position says, and the places of rows that are not there are left empty. A
*tile* is a block of each side with all pairs between them that the mask allows; its shape is always the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from ringattn import bands, layouts
from ringattn.bands import Array
from ringattn.errors import PlanError
from ringattn.masks import Mask
from ringattn.plans import tiles as t
from ringattn.plans.coverage import Keys, sums_of_mask, sums_of_tiles
from ringattn.plans.demand import Demand
from ringattn.plans.plan import Plan

TILE = 128
"""Positions in a block. A block that is cut apart makes work for every rank that has a part of it; in smaller ones more
time is lost between products."""


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Those blocks of a sequence that a rank has rows of.

    Attributes:
        numbers: which blocks, ascending: block n begins at position ``n * TILE``.
    """

    numbers: Array

    @classmethod
    def holding(cls, positions: Array) -> Blocks:
        """The blocks of these positions."""
        return cls(np.unique(positions // TILE))

    def places(self, positions: Array) -> tuple[Array, Array]:
        """Where these positions lie: of which of the blocks, counted from 0, and of which row of it."""
        return np.searchsorted(self.numbers, positions // TILE), positions % TILE

    def at(self, nth: int) -> slice:
        """The positions of one of the blocks; those of the last may go beyond the sequence."""
        start = int(self.numbers[nth]) * TILE
        return slice(start, start + TILE, 1)

    def spans(self, length: int) -> Array:
        """The blocks as spans of a layout, each a rank's."""
        start = self.numbers * TILE
        nth = np.arange(len(start))
        return np.stack([nth, 0 * nth, start, np.minimum(TILE, length - start), 0 * nth + 1], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Arrival:
    """The rows of one phase's buffer that a rank computes with, and where they lie in blocks.

    Attributes:
        rows: of the buffer.
        block, row: the place of each, as `Blocks.places` says it.
    """

    rows: Array
    block: Array
    row: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """All allowed pairs of a block of the own side and one of the other.

    Attributes:
        other: which of the blocks of the other side.
        rows: the allowed pairs, as the rows of `plans.tiles`, both sides counted within their blocks.
        full: whether that are all pairs of the two blocks' positions.
    """

    other: int
    rows: Array
    full: bool

    def allowed(self, mask: Mask, device: torch.device) -> torch.Tensor | None:
        """Bool ``[TILE, TILE]``; None when every pair is."""
        if self.full:
            return None
        allowed = np.zeros((TILE, TILE), dtype=np.bool_)
        for row in self.rows.tolist():
            i, j = np.arange(row[t.M])[:, None], np.arange(row[t.N])[None, :]
            pairs = (row[t.LOW] <= i - j) & (i - j <= row[t.HIGH])
            if row[t.PARTIAL]:
                pairs &= mask.allows(row[t.Q_POSITION] + i, row[t.K_POSITION] + j)
            allowed[row[t.Q] : row[t.Q] + row[t.M], row[t.K] : row[t.K] + row[t.N]] |= pairs
        return torch.from_numpy(allowed).to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The tiles of one rank's plan, whose queries are the own side and whose keys the other.

    Attributes:
        own, other: the blocks of both sides.
        edges: the rows of this rank in each of its own blocks: from one of these to the next.
        row: the place of each own row within its block.
        arrivals: what comes of the other side, by the plan's phases.
        tiles: those of every own block, in the order of the other side's positions.
    """

    own: Blocks
    other: Blocks
    edges: list[int]
    row: Array
    arrivals: dict[int, Arrival]
    tiles: list[list[Tile]]

    @classmethod
    def of(cls, plan: Plan) -> Grid:
        """The grid of a plan.

        Raises:
            PlanError: its tiles are not exactly the pairs of the plan.
        """
        positions, keys = layouts.positions(plan.q_spans, plan.rank), Keys(plan.k_spans)
        own = Blocks.holding(positions)
        used = {phase: used_rows(plan, phase, keys) for phase in plan.tiles}
        other = Blocks.holding(np.concatenate([np.empty(0, np.int64), *(at for _, at in used.values())]))
        demand = Demand(plan.mask, plan.regions, plan.partial, plan.q_spans, plan.k_spans, plan.size)
        table = demand.cut(
            *(x.spans(int(s[:, layouts.COUNT].sum())) for x, s in ((own, plan.q_spans), (other, plan.k_spans)))
        )
        block, row = own.places(positions)
        _verify(plan, table, positions, own, keys)
        return cls(
            own,
            other,
            np.searchsorted(block, np.arange(len(own.numbers) + 1)).tolist(),
            row,
            {phase: Arrival(rows, *other.places(at)) for phase, (rows, at) in used.items()},
            list(_tiles(table, len(own.numbers))),
        )

    def rows(self, nth: int) -> tuple[slice, torch.Tensor]:
        """This rank's rows in one of its blocks, and their places there."""
        own = slice(self.edges[nth], self.edges[nth + 1])
        return own, torch.from_numpy(self.row[own])


def used_rows(plan: Plan, phase: int, keys: Keys) -> tuple[Array, Array]:
    """The rows of a phase's buffer that the plan's tiles use, and their positions."""
    rows = plan.tiles[phase].rows
    used = t.used_keys(np.concatenate([np.zeros((len(rows), 2), dtype=np.int64), rows], axis=1))
    nth, further = bands.expand(used[:, 3] - used[:, 2])
    at = used[nth, 2] + further
    return at, np.concatenate(keys.in_buffer(plan, phase))[at]


def _tiles(table: Array, blocks: int) -> Iterator[list[Tile]]:
    """The tiles of each of so many own blocks, from a cut by the blocks of both sides."""
    edges = np.searchsorted(table[:, t.Q_RANK], np.arange(blocks + 1))
    for part in np.split(table, edges[1:-1]) if blocks else []:
        firsts = np.flatnonzero(np.diff(part[:, t.K_RANK], prepend=-1))
        yield [
            Tile(int(rows[0, t.K_RANK]), rows[:, 2:], _is_full(rows[:, 2:]))
            for rows in (np.split(part, firsts[1:]) if len(part) else [])
        ]


def _is_full(rows: Array) -> bool:
    whole = bands.area(t.Tiles(rows).regions) == TILE * TILE
    return whole and not rows[:, t.PARTIAL].any()


def _verify(plan: Plan, table: Array, positions: Array, own: Blocks, keys: Keys) -> None:
    """Every own row has exactly its allowed pairs in the tiles."""
    rows = table[:, 2:].copy()
    rows[:, t.Q] += table[:, t.Q_RANK] * TILE
    block, row = own.places(positions)
    for partial, regions in enumerate((plan.regions, plan.partial)):
        found = sums_of_tiles(rows[rows[:, t.PARTIAL] == partial], len(own.numbers) * TILE, keys)
        wanted = sums_of_mask(regions, positions, keys)
        if not np.array_equal(found.weights[block * TILE + row], wanted.weights):
            raise PlanError(f"Rank {plan.rank}: the whole tiles of {plan.description} do not hold the allowed pairs.")
