"""Assembly: one rank's plan, from what its schedule moves and what its mask demands.

Schedules speak in rows of the shard a key comes from; plans in rows of the buffers in which it arrives. Where a
schedule says nothing of the way back of gradients, it follows from the demand alone: straight to the owner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ringattn import bands
from ringattn.bands import Array
from ringattn.declared import Collective
from ringattn.errors import PlanError
from ringattn.payloads.base import Payload
from ringattn.plans import tiles
from ringattn.plans.demand import Demand
from ringattn.plans.plan import Plan
from ringattn.plans.shape import GradientWire, Shape
from ringattn.plans.steps import (
    RECV_OFFSET,
    RECV_ORIGIN,
    RECV_PHASE,
    RECV_START,
    RECV_STOP,
    received_rows,
)
from ringattn.plans.tiles import K_RANK, Q_RANK, Tiles

Phases = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Returns:
    """How one rank's gradients go home, in rows of the origin's shard.

    Attributes:
        sends: ``(phase, peer, buffer, origin, start, stop)``: of the gradients of the rows in the buffer of a phase.
        receives: the same of what comes, buffer 0 being this rank's own rows.
    """

    sends: Array
    receives: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """What a schedule decides for one rank, in rows of the origin's shard.

    Where the schedule's payload is not per key, a row of these tables is one of its rows.

    Attributes:
        receives: ``(phase, sender, origin, start, stop)``.
        sends: ``(phase, peer, source phase, origin, start, stop)``.
        returns: None if gradients go straight to their owners, as soon as they are there on every rank.
        collective: what every exchange of keys is, of all ranks.
    """

    receives: Array
    sends: Array
    returns: Returns | None = None
    collective: Collective | None = None


def assemble(
    demand: Demand,
    rank: int,
    phases: Phases,
    moves: Moves,
    *,
    description: str,
    payload: Payload,
    lookahead: int,
    gradient_wire: GradientWire,
    shape: Shape | None,
) -> Plan:
    """The plan of a rank, from what its schedule moves.

    Args:
        phases: the phase in which the queries of some ranks meet the keys of others: see `schedules.base`.
    """
    receives = _placed(moves.receives, payload)
    buffers = _Buffers(receives, rank)

    table = demand.rows(rank)
    tile_phases = phases(table[:, Q_RANK], table[:, K_RANK])
    order = np.lexsort((table[:, 2 + tiles.K], table[:, 2 + tiles.Q], table[:, K_RANK], tile_phases))
    rows, tile_phases, owners = table[order, 2:], tile_phases[order], table[order, K_RANK]
    if payload.per_key:
        rows, tile_phases = _in_buffers(rows, tile_phases, owners, buffers)
        returns = straight_home(demand, rank, phases, 1 + lookahead) if moves.returns is None else moves.returns
        grad_sends, grad_receives = _returned(returns.sends, buffers), _returned(returns.receives, buffers)
    else:
        if moves.sends[:, 2].any():
            raise PlanError(
                f"{description}: {payload.name} are sent by the rank whose keys they are of, never relayed."
            )
        rows, tile_phases = _summed_up(rows, tile_phases, owners, receives, rank)
        offset = receives[:, RECV_OFFSET]
        phase, lag = receives[:, RECV_PHASE], 1 + lookahead
        grad_sends = _sorted(phase + lag, receives[:, RECV_ORIGIN], phase, offset, offset + 1)
        phase, peer, own, _, start, stop = moves.sends.T
        grad_receives = _sorted(phase + lag, peer, own, start, stop)

    return Plan(
        rank=rank,
        size=demand.size,
        mask=demand.mask,
        regions=demand.regions,
        partial=demand.partial,
        q_spans=demand.q_spans,
        k_spans=demand.k_spans,
        description=description,
        payload=payload,
        tile_phases=tile_phases,
        tile_rows=rows,
        receives=receives,
        sends=_sent(moves.sends, buffers),
        grad_sends=grad_sends,
        grad_receives=grad_receives,
        lookahead=lookahead,
        gradient_wire=gradient_wire,
        collective=moves.collective,
        shape=shape,
        node=demand.node,
    )


def _placed(receives: Array, payload: Payload) -> Array:
    """A schedule's receives in order, each with where its rows lie in the buffer of its phase."""
    order = np.lexsort((receives[:, 3], receives[:, 2], receives[:, 1], receives[:, 0]))
    placed = np.concatenate([receives[order], np.zeros((len(order), 1), dtype=np.int64)], axis=1)
    placed[:, RECV_OFFSET] = _offsets(placed[:, RECV_PHASE], received_rows(payload, placed))
    return placed


def _sent(sends: Array, buffers: _Buffers) -> Array:
    """A schedule's sends in order, in rows of the buffers they are sent from."""
    phase, peer, source, origin, start, stop = sends.T
    at = buffers.row(source, origin, start)
    order = np.lexsort((start, origin, peer, phase))
    return np.stack([phase, peer, source, at, at + stop - start], axis=1)[order]


def straight_home(demand: Demand, rank: int, phases: Phases, lag: int) -> Returns:
    """The gradients of the keys a rank has used go to their owners, so many phases after the keys have come."""
    used = demand.keys_needed_by(rank)
    _, owner, start, stop = used[used[:, K_RANK] != rank].T
    met = phases(np.full_like(owner, rank), owner)
    sends = np.stack([met + lag, owner, met, owner, start, stop], axis=1)
    requested = demand.keys_requested_from(rank)
    user, own, start, stop = requested[requested[:, Q_RANK] != rank].T
    receives = np.stack([phases(user, own) + lag, user, 0 * user, own, start, stop], axis=1)
    return Returns(sends, receives)


def _returned(table: Array, buffers: _Buffers) -> Array:
    """Gradients that travel, in order, in rows of the buffers they are of."""
    phase, peer, buffer, origin, start, stop = table.T
    at = buffers.row(buffer, origin, start)
    order = np.lexsort((start, origin, peer, phase))
    returned: Array = np.stack([phase, peer, buffer, at, at + stop - start], axis=1)[order]
    return returned


def _summed_up(rows: Array, phases: Array, owners: Array, receives: Array, rank: int) -> tuple[Array, Array]:
    """Tiles, and their phases, with every tile of another rank's keys cut into the summaries that make it up."""
    foreign = owners != rank
    tile, receive = bands.overlaps(
        *_lifted(owners[foreign], rows[foreign, tiles.K], rows[foreign, tiles.K] + rows[foreign, tiles.N]),
        *_lifted(receives[:, RECV_ORIGIN], receives[:, RECV_START], receives[:, RECV_STOP]),
    )
    order = np.lexsort((receive, tile))
    tile, receive = tile[order], receive[order]
    out = rows[foreign][tile]
    out[:, tiles.K_POSITION] += (receives[receive, RECV_START] - out[:, tiles.K]) * out[:, tiles.K_STRIDE]
    out[:, tiles.K] = receives[receive, RECV_OFFSET]
    out[:, tiles.N] = receives[receive, RECV_STOP] - receives[receive, RECV_START]
    out[:, tiles.LOW], out[:, tiles.HIGH] = 1 - out[:, tiles.N], out[:, tiles.M] - 1
    out, phases = np.concatenate([rows[~foreign], out]), np.concatenate([phases[~foreign], phases[foreign][tile]])
    order = np.argsort(phases, kind="stable")
    return out[order], phases[order]


def _lifted(owners: Array, start: Array, stop: Array) -> tuple[Array, Array]:
    """Row ranges of many ranks as ranges of one axis, the ranks' apart."""
    return owners * bands.INF + start, owners * bands.INF + stop


def _in_buffers(rows: Array, phases: Array, owners: Array, buffers: _Buffers) -> tuple[Array, Array]:
    """Tiles, and their phases, with their keys in rows of the buffers, which leave out what nobody needs.

    Keys taken with a step (of shardings of unequal strides) may so come to lie at uneven distances: such a tile is
    taken apart into its columns.
    """
    stepped = np.flatnonzero((rows[:, tiles.K_STEP] > 1) & (rows[:, tiles.N] > 1))
    tile, nth = bands.expand(rows[stepped, tiles.N])
    tile = stepped[tile]
    at = buffers.row(phases[tile], owners[tile], rows[tile, tiles.K] + nth * rows[tile, tiles.K_STEP])
    out = rows.copy()
    out[:, tiles.K] = buffers.row(phases, owners, rows[:, tiles.K])
    out[tile[nth == 1], tiles.K_STEP] = at[nth == 1] - at[nth == 0]
    uneven = np.zeros(len(rows), dtype=bool)
    uneven[tile[at != out[tile, tiles.K] + nth * out[tile, tiles.K_STEP]]] = True
    if not uneven.any():
        return out, phases
    columns = uneven[tile]
    apart, parent = Tiles(out[tile[columns]]).columns(nth[columns], at[columns])
    out, phases = (
        np.concatenate([out[~uneven], apart]),
        np.concatenate([phases[~uneven], phases[tile[columns]][parent]]),
    )
    order = np.argsort(phases, kind="stable")
    return out[order], phases[order]


def _sorted(*columns: Array) -> Array:
    rows = np.stack(columns, axis=1)
    return rows[np.lexsort(columns[::-1])]


def _offsets(phases: Array, counts: Array) -> Array:
    """Where each run of rows begins within its phase's buffer."""
    before = np.cumsum(counts) - counts
    first = np.searchsorted(phases, phases, side="left")
    return before - before[first] if len(before) else before


class _Buffers:
    """Finds the buffer row of an origin's row: the last receive that begins at or before it."""

    def __init__(self, receives: Array, rank: int) -> None:
        self._rank = rank
        self._lift = int(receives[:, RECV_STOP].max(initial=0)) + 1
        self._ranks = int(receives[:, RECV_ORIGIN].max(initial=0)) + 1
        self._keys = self._key(receives[:, RECV_PHASE], receives[:, RECV_ORIGIN], receives[:, RECV_START])
        self._order = np.argsort(self._keys)
        self._shift = receives[:, RECV_OFFSET] - receives[:, RECV_START]

    def _key(self, phase: Array, origin: Array, start: Array) -> Array:
        return (phase * self._ranks + origin) * self._lift + start

    def row(self, phase: Array, origin: Array, start: Array) -> Array:
        if not len(self._keys):
            return start
        found = np.searchsorted(self._keys, self._key(phase, origin, start), side="right", sorter=self._order) - 1
        return start + np.where(origin == self._rank, 0, self._shift[self._order[found]])
