"""Homing: every gradient that a rank computes reaches the owner of its key, once.

Followed from message to message, in the order of the phases: what a rank has of another's gradients is who computed it
and for which rows. Whoever passes gradients on sends what it has by then; what comes later is not in it, and what has
been sent twice arrives twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringattn import bands
from ringattn.bands import Array
from ringattn.errors import PlanError
from ringattn.plans import tiles
from ringattn.plans.steps import (
    GRAD_BUFFER,
    GRAD_PEER,
    GRAD_PHASE,
    GRAD_START,
    GRAD_STOP,
    RECV_OFFSET,
    RECV_ORIGIN,
    RECV_PHASE,
    RECV_START,
    RECV_STOP,
    Program,
    received_rows,
)

PHASE, FROM, TO, ORIGIN = range(4)  # of a message's rows, before their start and stop
HOLDER, OF, USER = range(3)  # of gradients that somebody has: where, of whose keys, who computed them


def verify_returns(plans: Sequence[Program]) -> None:
    """The gradient of every key row that a rank has used is sent by it, and reaches the owner once.

    Raises:
        PlanError: says whose, and which rows.
    """
    computed, sent, awaited = [], [], []
    for plan in plans:
        used = tiles.merged(np.concatenate([np.empty((0, 3), dtype=np.int64), *_used_rows(plan)]))
        leaving = plan.grad_sends[:, [GRAD_BUFFER, GRAD_START, GRAD_STOP]]
        _, origin, start, stop = _in_origin(plan, used)
        me = np.full(len(origin), plan.rank)
        computed.append(np.stack([me, origin, me, start, stop], axis=1))
        if not np.array_equal(tiles.merged(np.concatenate([used, leaving])), tiles.merged(leaving)):
            raise PlanError(f"Rank {plan.rank} does not send home the gradient of exactly the key rows it has used.")
        sent.append(_messages(plan, plan.grad_sends)[:, [PHASE, TO, FROM, ORIGIN, 4, 5]])
        awaited.append(_messages(plan, plan.grad_receives))
    out, back = (np.concatenate(part) for part in (sent, awaited))
    for rows, other in ((out, back), (back, out)):
        lost = _less(rows, other)
        if len(lost):
            phase, sender, receiver, origin, start, stop = lost[0].tolist()
            raise PlanError(
                f"A gradient does not reach its owner: from rank {sender} to rank {receiver}, phase {phase}, "
                f"rows {start} to {stop} of rank {origin}, is not what is awaited there."
            )
    _follow(np.concatenate(computed), out)


def _follow(computed: Array, messages: Array) -> None:
    """Follows the gradients that are computed home. ``computed`` is ``(holder, owner, user, start, stop)``."""
    held, home = computed, computed[:0]
    relays = messages[:, TO] != messages[:, ORIGIN]
    for phase in np.unique(messages[:, PHASE]).tolist() if relays.any() else [None]:
        now = messages if phase is None else messages[messages[:, PHASE] == phase]
        moved = _carried(held, now)
        missing = _less(now[:, [FROM, TO, ORIGIN, 4, 5]], moved[:, [0, 1, 2, 4, 5]])
        if len(missing):
            sender, receiver, origin, start, stop = missing[0].tolist()
            raise PlanError(
                f"Rank {sender} sends rank {receiver} gradients of rows {start} to {stop} of rank {origin} that nobody "
                f"has computed."
            )
        moved = moved[:, 1:]
        there = moved[:, HOLDER] == moved[:, OF]
        home, held = np.concatenate([home, moved[there]]), np.concatenate([held, moved[~there]])
    needed = computed.copy()
    needed[:, HOLDER] = needed[:, OF]
    lost = _less(needed, home)
    whole = tiles.merged(home)
    if len(lost) or _rows(whole) != _rows(home):
        owner, _, user, start, stop = (lost if len(lost) else _doubled(home))[0].tolist()
        how = "does not reach" if len(lost) else "reaches twice"
        raise PlanError(f"The gradient of rank {user} for rows {start} to {stop} of rank {owner} {how} its owner.")


def _carried(held: Array, messages: Array) -> Array:
    """What messages carry of what their senders have: ``(sender, receiver, owner, user, start, stop)``."""
    size = int(max(held[:, :USER].max(initial=0), messages[:, FROM : ORIGIN + 1].max(initial=0))) + 1
    lift = int(max(held[:, -1].max(initial=0), messages[:, -1].max(initial=0))) + 1
    has = (held[:, HOLDER] * size + held[:, OF]) * lift
    takes = (messages[:, FROM] * size + messages[:, ORIGIN]) * lift
    i, j = bands.overlaps(takes + messages[:, 4], takes + messages[:, 5], has + held[:, 3], has + held[:, 4])
    start, stop = np.maximum(messages[i, 4], held[j, 3]), np.minimum(messages[i, 5], held[j, 4])
    carried: Array = np.stack(
        [messages[i, FROM], messages[i, TO], messages[i, ORIGIN], held[j, USER], start, stop], axis=1
    )
    return carried


def _less(a: Array, b: Array) -> Array:
    """Rows of one table of intervals that another does not cover, whole ones of those that it does not."""
    union = tiles.merged(b)
    if len(union) and len(a):
        keys = np.unique(np.concatenate([a[:, :-2], union[:, :-2]]), axis=0, return_inverse=True)[1].reshape(-1)
        lift = int(max(a[:, -1].max(), union[:, -1].max())) + 1
        first = keys[len(a) :] * lift + union[:, -2]
        start = keys[: len(a)] * lift + a[:, -2]
        order = np.argsort(first)
        at = np.searchsorted(first[order], start, side="right") - 1
        held = order[np.maximum(at, 0)]
        covered = (at >= 0) & (keys[len(a) + held] == keys[: len(a)]) & (union[held, -1] >= a[:, -1])
        a = a[~covered]
    return a


def _doubled(home: Array) -> Array:
    """Gradients of which some came before."""
    home = home[np.lexsort(home.T[::-1])]
    same = (home[1:, :-2] == home[:-1, :-2]).all(axis=1) & (home[1:, -2] < home[:-1, -1])
    twice: Array = home[1:][same]
    return twice


def _rows(intervals: Array) -> int:
    return int((intervals[:, -1] - intervals[:, -2]).sum())


def _messages(plan: Program, table: Array) -> Array:
    """A rank's returned gradients, sent or received, as ``(phase, peer, rank, origin, start, stop)``."""
    buffer = table[:, GRAD_BUFFER]
    own, at = table[buffer == 0], table[buffer != 0]
    row, origin, start, stop = _in_origin(plan, at[:, [GRAD_BUFFER, GRAD_START, GRAD_STOP]])
    parts = []
    for rows, whose, ends in (
        (own, np.full(len(own), plan.rank), (own[:, GRAD_START], own[:, GRAD_STOP])),
        (at[row], origin, (start, stop)),
    ):
        me = np.full(len(rows), plan.rank)
        parts.append(np.stack([rows[:, GRAD_PHASE], rows[:, GRAD_PEER], me, whose, *ends], axis=1))
    return np.concatenate(parts)


def _used_rows(plan: Program) -> list[Array]:
    """The buffer rows that a rank's tiles of other ranks' keys read: ``(phase, start, stop)``."""
    out = []
    for phase, step_tiles in plan.tiles.items():
        if not phase:
            continue
        if not plan.payload.per_key:
            row = np.unique(step_tiles.rows[:, tiles.K])
            start, stop = row, row + 1
        else:
            table = np.concatenate([np.full((len(step_tiles), 2), plan.rank), step_tiles.rows], axis=1)
            start, stop = tiles.used_keys(table)[:, 2:].T
        out.append(np.stack([np.full(len(start), phase), start, stop], axis=1))
    return out


def _in_origin(plan: Program, rows: Array) -> tuple[Array, Array, Array, Array]:
    """Rows of buffers, ``(phase, start, stop)``, in rows of the shard they came from: index, origin, start, stop."""
    receives = plan.receives
    offset = receives[:, RECV_OFFSET]
    stop = offset + received_rows(plan.payload, receives)
    lift = int(max(stop.max(initial=0), rows[:, 2].max(initial=0))) + 1
    phase, held = rows[:, 0] * lift, receives[:, RECV_PHASE] * lift
    i, j = bands.overlaps(phase + rows[:, 1], phase + rows[:, 2], held + offset, held + stop)
    first, last = receives[j, RECV_START], receives[j, RECV_STOP]
    if plan.payload.per_key:
        shift = first - offset[j]
        first, last = np.maximum(first, rows[i, 1] + shift), np.minimum(last, rows[i, 2] + shift)
    return i, receives[j, RECV_ORIGIN], first, last
