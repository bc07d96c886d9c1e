"""Scan: ranks exchange summaries of their keys; keys and values stay where they are.

For mechanisms whose keys can be summed up (`mechanisms.base.Summarising`), such as linear attention. In one exchange,
behind which own keys are attended to, every rank gets from each other rank one summary of each set of keys that its
queries see alike, and folds them in the order of positions: an exclusive scan when the mask is causal (LASP-2, arXiv
2502.07563, section 3), an all-reduce when it is full. What travels depends on the number of ranks and not on the
sequence's length. It takes a mask and a layout by which a query sees all of a run of another rank's keys or none of it:
between ranks, no diagonals.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from ringattn import bands
from ringattn.bands import Array
from ringattn.payloads.base import Payload
from ringattn.payloads.summaries import Summaries
from ringattn.plans import tiles
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.tiles import K_RANK, Q_RANK, Tiles
from ringattn.schedules.base import Schedule


@dataclasses.dataclass(frozen=True)
class Scan(Schedule):
    """Ask for sums over keys in place of keys."""

    payload: ClassVar[Payload] = Summaries()

    def refusal(self, demand: Demand) -> str | None:
        wrong: Array | None = next(filter(len, map(_not_whole, demand.rows_of_all())), None)
        if wrong is None:
            return None
        return (
            f"scan exchanges sums over keys, so a query must see all of a run of another rank's keys or none of it; "
            f"under this mask and layout rank {wrong[0, Q_RANK]} sees rank {wrong[0, K_RANK]}'s only in part. Use a "
            f"layout without diagonals between ranks (contiguous, zigzag or balanced when the mask is causal), or "
            f"route, by which keys and values travel"
        )

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        phases: Array = (q_ranks != k_ranks).astype(np.int64)
        return phases

    def moves(self, demand: Demand, rank: int) -> Moves:
        _, owner, start, stop = _summaries(demand.rows(rank)).T
        one = np.ones_like(owner)
        receives = np.stack([one, owner, owner, start, stop], axis=1)
        user, _, start, stop = _summaries(demand.columns(rank)).T
        one = np.ones_like(user)
        sends = np.stack([one, user, 0 * one, rank * one, start, stop], axis=1)
        return Moves(receives, sends)

    def received_tokens(self, requested: Array, size: int) -> int:
        return 0

    def __str__(self) -> str:
        return "scan"


def _foreign(table: Array) -> Array:
    foreign: Array = table[table[:, Q_RANK] != table[:, K_RANK]]
    return foreign


def _not_whole(table: Array) -> Array:
    """The tiles of a cut that see another rank's keys in part."""
    foreign = _foreign(table)
    rows = foreign[:, 2:]
    full = bands.areas(Tiles(rows).regions) == rows[:, tiles.M] * rows[:, tiles.N]
    partly: Array = foreign[~(full & (rows[:, tiles.K_STEP] == 1) & (rows[:, tiles.PARTIAL] == 0))]
    return partly


def _summaries(table: Array) -> Array:
    """The sets of keys to sum up for a part of the cut: ``(q_rank, k_rank, start, stop)``, sorted.

    For every two ranks, the coarsest runs of the owner's rows of which each tile takes whole ones.
    """
    foreign = _foreign(table)
    if not len(foreign):
        return np.empty((0, 4), dtype=np.int64)
    pairs, pair = np.unique(foreign[:, [Q_RANK, K_RANK]], axis=0, return_inverse=True)
    start, length = foreign[:, 2 + tiles.K], foreign[:, 2 + tiles.N]
    lift = int((start + length).max()) + 1
    first, last = pair * lift + start, pair * lift + start + length
    edges = np.unique(np.concatenate([first, last]))
    depth = np.searchsorted(np.sort(first), edges, side="right") - np.searchsorted(np.sort(last), edges, side="right")
    inside = np.flatnonzero(depth > 0)  # an edge after which some tile goes on is never a pair's last
    of, begin = np.divmod(edges[inside], lift)
    summed: Array = np.column_stack([pairs[of], begin, edges[inside + 1] - of * lift])
    return summed
