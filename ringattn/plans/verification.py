"""What makes a plan right, checked before it runs.

One rank's plan (`verify_rank`): every allowed pair of its queries is computed exactly once, from keys that lie in
the buffer at that step. All ranks' plans together (`verify`): every send meets a receive of the same rows, every
gradient reaches the owner of its row, and no rank waits in a circle.

That every pair is computed once is checked by fingerprint: see `coverage`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringattn import bands, layouts
from ringattn.bands import Array
from ringattn.checking import sequence
from ringattn.declared import WORDS
from ringattn.errors import PlanError
from ringattn.plans import tiles
from ringattn.plans.coverage import Keys, Sums, sums_of_mask, sums_of_tiles
from ringattn.plans.exchanges import Exchange, Item, Step
from ringattn.plans.homing import verify_returns
from ringattn.plans.slices import of_slice
from ringattn.plans.steps import GRAD_BUFFER, Program
from ringattn.plans.tiles import Tiles

Meets = list[list[list[tuple[int, int]]]]
"""For every exchange of every rank, the exchanges (rank, index) that its messages meet."""

Pairs = list[tuple[tuple[int, int, Item], tuple[int, int, Item]]]
"""Every message, sent and received, each with its rank and the number of its exchange."""


def verify_rank(plan: Program, keys: Keys | None = None) -> None:
    """Checks one rank's plan. Raises PlanError."""
    keys = Keys(plan.k_spans) if keys is None else keys
    _verify_form(plan)
    returned, read = {*plan.grad_sends[:, GRAD_BUFFER].tolist()}, {*plan.tile_phases.tolist()}
    if not returned <= {*plan.slots} or not read <= {0, *plan.slots}:
        raise PlanError(f"Rank {plan.rank} computes, or sends home gradients of, a phase whose keys it never held.")
    queries = np.sort(layouts.positions(plan.q_spans, plan.rank))
    allowed = sums_of_mask(plan.regions, queries, keys), sums_of_mask(plan.partial, queries, keys)
    for name, steps in (("forward", plan.steps), ("backward", plan.backward_steps)):
        _verify_sources(plan, name, steps, keys)
        _verify_slots(plan, name, steps)
        for nth in range(plan.slices):
            computed = [step for step in steps if plan.slices == 1 or step.phase in (0, nth + 1)]
            _verify_coverage(plan, name, computed, allowed, keys)
    _verify_gradients(plan)
    _verify_canonical(plan)


def verify(plans: Sequence[Program]) -> None:
    """Checks every rank's plan, and that together they match, return all gradients and cannot deadlock.

    Raises:
        InputError: ``plans`` is no list of plans, or empty.
        PlanError: says which rank, phase and rows.
    """
    sequence(plans, Program, "plans", "every rank's plan, in order, as plan_all makes them")
    if [plan.rank for plan in plans] != list(range(len(plans))) or {plan.size for plan in plans} != {len(plans)}:
        raise PlanError(f"verify takes every rank's plan, in order; got ranks {[plan.rank for plan in plans]}.")
    plans = [plan.moved for plan in plans]
    first = plans[0]
    keys = Keys(first.k_spans)
    for plan in plans:
        asked = (
            (plan.regions, first.regions),
            (plan.partial, first.partial),
            (plan.q_spans, first.q_spans),
            (plan.k_spans, first.k_spans),
        )
        alike = all(getattr(plan, name) == getattr(first, name) for name in ("gradient_wire", "payload", "slices"))
        if not alike or not all(np.array_equal(a, b) for a, b in asked):
            raise PlanError(
                f"Rank {plan.rank} and rank 0 planned for another mask, sharding, payload, gradient dtype or slices."
            )
        verify_rank(plan, keys)
    for nth in range(first.slices):
        verify_returns([of_slice(plan, nth) if plan.slices > 1 else plan for plan in plans])
    for name, exchanges in (
        ("forward", [[s.exchange for s in plan.steps if s.exchange] for plan in plans]),
        ("backward", [[s.exchange for s in plan.backward_steps if s.exchange] for plan in plans]),
    ):
        pairs = paired(name, exchanges)
        _verify_content(name, plans, pairs, keys)
        meets = verify_exchanges(name, exchanges, pairs, [range(len(plans))] * len(plans))
        verify_progress(name, [[exchange.phase for exchange in own] for own in exchanges], meets)


# -- one rank -------------------------------------------------------------------------------------------------------


def _verify_form(plan: Program) -> None:
    """Every tile has a phase, queries and keys, and steps and strides that go forward."""
    columns = [tiles.M, tiles.N, tiles.Q_STEP, tiles.K_STEP, tiles.Q_STRIDE, tiles.K_STRIDE]
    if len(plan.tile_phases) != len(plan.tile_rows) or (plan.tile_rows[:, columns] < 1).any():
        raise PlanError(f"Rank {plan.rank} has tiles without a phase, without pairs, or with a step below 1.")
    if plan.slices > 1 and not {*plan.slots} <= {*range(1, plan.slices + 1)}:
        raise PlanError(f"Rank {plan.rank} receives keys in phases that are of none of its {plan.slices} slices.")


def _verify_canonical(plan: Program) -> None:
    """Bands are as tight as their tiles, as kernels take them to be: a wider one holds no other pair, but they err."""
    rows = Tiles(plan.tile_rows).regions
    regions, kept = bands.tighten(rows)
    if len(kept) != len(rows) or not np.array_equal(regions, rows):
        raise PlanError(f"Rank {plan.rank} has tiles whose bands are not canonical: wider than the tiles.")


def _verify_coverage(plan: Program, name: str, steps: Sequence[Step], allowed: tuple[Sums, Sums], keys: Keys) -> None:
    """Every query of this rank computes exactly its allowed keys, and asks for exactly those to be asked for."""
    rows = np.concatenate([np.empty((0, tiles.WIDTH), dtype=np.int64), *(s.tiles.rows for s in steps if s.tiles)])
    positions = layouts.positions(plan.q_spans, plan.rank)
    order = np.argsort(positions, kind="stable")  # of a group's rows, which need not be in the order of positions
    for partial, wanted in enumerate(allowed):
        found = sums_of_tiles(rows[rows[:, tiles.PARTIAL] == partial], plan.tokens, keys)
        wrong = np.flatnonzero(found.weights[order] != wanted.weights)
        if len(wrong):
            row, computed = int(wrong[0]), found.counts[order]
            position = positions[order[row]]
            raise PlanError(
                f"Rank {plan.rank}, {name}, {'asks for' if partial else 'computes'} the wrong pairs for {len(wrong)} "
                f"of its queries. First, the query at position {position}: its tiles hold {computed[row]} pairs, "
                f"its mask {wanted.counts[row]}."
            )


def _verify_sources(plan: Program, name: str, steps: Sequence[Step], keys: Keys) -> None:
    """Tiles name the positions that their queries and keys really have, and lie inside their buffers."""
    queries = layouts.positions(plan.q_spans, plan.rank)
    for step in steps:
        if not step.tiles:
            continue
        rows, held = step.tiles.rows, keys.in_buffer(plan, step.phase)
        sides = [("queries", [queries], (tiles.Q, tiles.M, tiles.Q_STEP, tiles.Q_POSITION, tiles.Q_STRIDE))]
        if step.phase and not plan.payload.per_key:
            _verify_summed(plan, name, step, held)
        else:
            sides.append(("keys", held, (tiles.K, tiles.N, tiles.K_STEP, tiles.K_POSITION, tiles.K_STRIDE)))
        for side, parts, columns in sides:
            whole = np.concatenate([np.empty(0, dtype=np.int64), *parts])
            bad = _misplaced(whole, *rows[:, columns].T)
            if bad is not None:
                raise PlanError(
                    f"Rank {plan.rank}, {name}, phase {step.phase}: tile {bad} takes {side} that its buffer of "
                    f"{len(whole)} rows does not hold at that place."
                )


def _verify_summed(plan: Program, name: str, step: Step, held: list[Array]) -> None:
    """Tiles that attend to summaries allow every pair, and name the keys that their summary is a sum over."""
    rows = step.tiles.rows
    full = bands.areas(step.tiles.regions) == rows[:, tiles.M] * rows[:, tiles.N]
    full &= rows[:, tiles.PARTIAL] == 0
    for tile, row in enumerate(rows.tolist()):
        keys = row[tiles.K_POSITION] + row[tiles.K_STRIDE] * np.arange(row[tiles.N])
        if not (full[tile] and 0 <= row[tiles.K] < len(held) and np.array_equal(held[row[tiles.K]], keys)):
            raise PlanError(
                f"Rank {plan.rank}, {name}, phase {step.phase}: tile {tile} takes summary {row[tiles.K]} of "
                f"{len(held)}, which is not the sum over exactly its keys."
            )


def _misplaced(held: Array, first: Array, count: Array, step: Array, position: Array, stride: Array) -> int | None:
    """The first tile whose rows of a buffer do not hold the positions it says; None when all do."""
    right = (first >= 0) & (first + (count - 1) * step < len(held))
    right[right] = held[first[right]] == position[right]
    for distance in np.unique(stride[right & (step == 1)]).tolist():
        # Rows behind one another: from the first on, each is the stride further on than the one before.
        breaks = np.concatenate([[0], np.cumsum(np.diff(held) != distance)])
        alike = np.flatnonzero(right & (step == 1) & (stride == distance))
        right[alike] = breaks[first[alike] + count[alike] - 1] == breaks[first[alike]]
    apart = np.flatnonzero(right & (step != 1))
    tile, nth = bands.expand(count[apart])
    tile = apart[tile]
    wrong = held[first[tile] + nth * step[tile]] != position[tile] + nth * stride[tile]
    right[tile[wrong]] = False
    return None if right.all() else int(np.flatnonzero(~right)[0])


def _verify_slots(plan: Program, name: str, steps: Sequence[Step]) -> None:
    """Walks the steps: keys have arrived before they are used or relayed, and no buffer is overwritten too early."""
    content: dict[int, int] = {}
    for step in steps:
        arriving, relayed = (_moved(side, gradients=False) for side in (step.exchange.receives, step.exchange.sends))
        reading = ({step.phase} if step.tiles else set()) | relayed
        for phase in reading - {0}:
            if content.get(plan.slots.get(phase, -1)) != phase:
                raise PlanError(
                    f"Rank {plan.rank}, {name}, phase {step.phase}: uses the keys of phase {phase} before they arrive."
                )
        if {plan.slots[phase] for phase in arriving} & {plan.slots[phase] for phase in reading - {0}}:
            raise PlanError(f"Rank {plan.rank}, {name}, phase {step.phase}: receives into the buffer it is reading.")
        content.update({plan.slots[phase]: phase for phase in arriving})


def _verify_gradients(plan: Program) -> None:
    """Walks the backward steps: gradients are computed before they leave, or others are added, and not overwritten."""
    content: dict[int, int] = {}
    for step in plan.backward_steps:
        coming, leaving = (_moved(side, gradients=True) for side in (step.exchange.receives, step.exchange.sends))
        where, computed = f"Rank {plan.rank}, backward, phase {step.exchange.phase}", step.phase if step.tiles else 0
        if any(content.get(plan.grad_slots[phase]) != phase for phase in leaving):
            raise PlanError(f"{where}: sends gradients of phases {sorted(leaving)} before they are computed.")
        busy = {plan.grad_slots[phase] for phase in leaving}
        if computed:
            if plan.grad_slots[computed] in busy:
                raise PlanError(f"{where}: adds to gradients that are being sent.")
            content[plan.grad_slots[computed]] = computed
        for phase in coming - {0}:
            if content.get(plan.grad_slots[phase]) != phase:
                raise PlanError(f"{where}: adds to gradients of phase {phase} that are not there.")


def _moved(items: Sequence[Item], *, gradients: bool) -> set[int]:
    """The phases of whose buffers rows, or their gradients, travel."""
    return {phase for item in items if item.gradient == gradients for phase in item.phases}


# -- all ranks ------------------------------------------------------------------------------------------------------


def _positions(plan: Program, item: Item, keys: Keys) -> list[Array]:
    """The positions of the keys that an item carries, or sums up, or whose gradients it carries."""
    out: list[Array] = []
    for phase, spans, _ in item.sources:
        held = keys.in_buffer(plan, phase)
        apart = not item.payload.per_key and phase != 0  # a row is a receive
        rows = len(held) if apart else sum(map(len, held))
        if any(not 0 <= start < stop <= rows for start, stop in spans):
            raise PlanError(
                f"Rank {plan.rank}: a message with rank {item.peer} takes rows {[list(span) for span in spans]} of a "
                f"buffer of {rows} rows."
            )
        if apart:
            out += [held[row] for start, stop in spans for row in range(start, stop)]
        else:
            whole = np.concatenate(held)
            out += [whole[start:stop] for start, stop in spans]
    return [np.concatenate(out)] if item.payload.per_key else out


def verify_exchanges(
    name: str, exchanges: Sequence[Sequence[Exchange]], pairs: Pairs, groups: Sequence[Sequence[int]]
) -> Meets:
    """Checks that the exchanges of all ranks are what they are declared.

    Where one is declared to be a collective, a transport may have every rank of the group make one call of a library's
    in place of its messages. So one says it only if all others do, each has one message to and from every other rank
    of the group, and they all meet in the exchanges of one phase: nobody's call is missing, or meets messages or the
    call of another phase. As ranks run their exchanges in the order of phases, all make their calls in the same order,
    and one waits for those whose messages it would have waited for. In an all-gather each sends all others the same.

    Args:
        pairs: their messages, by `paired`.
        groups: of every rank, the group of which its exchanges may be collectives.

    Returns:
        For every exchange of every rank, the exchanges (rank, index) that its messages meet, first in, first out.

    Raises:
        PlanError: says which rank and exchange.
    """
    meets: Meets = [[[] for _ in own] for own in exchanges]
    for (sender, i, _), (receiver, j, _) in pairs:
        meets[sender][i].append((receiver, j))
        meets[receiver][j].append((sender, i))
    for rank, own in enumerate(exchanges):
        others = [peer for peer in groups[rank] if peer != rank]
        for index, exchange in enumerate(own):
            _verify_collective(name, rank, exchange, others, [exchanges[peer][j] for peer, j in meets[rank][index]])
    return meets


def _verify_collective(name: str, rank: int, exchange: Exchange, others: list[int], met: list[Exchange]) -> None:
    """Checks what one rank declares of an exchange; ``met`` are those of other ranks that its messages meet."""
    if exchange.collective is None:
        return
    said = f"{name}: rank {rank} declares the exchange of phase {exchange.phase} {WORDS[exchange.collective]}"
    for words, side in (("sends to", exchange.sends), ("receives from", exchange.receives)):
        if sorted(item.peer for item in side) != others:
            raise PlanError(f"{said} of ranks {[rank, *others]}, and {words} {[item.peer for item in side]}.")
    if exchange.collective == "all_gather" and len({item.content for item in exchange.sends}) > 1:
        raise PlanError(f"{said}, and does not send all others the same.")
    for other in met:
        if (other.phase, other.collective) != (exchange.phase, exchange.collective):
            theirs = WORDS[other.collective] if other.collective else "nothing"
            raise PlanError(f"{said}; it meets one of phase {other.phase} that is declared {theirs}.")


def _carry_the_same(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def _verify_content(name: str, plans: Sequence[Program], pairs: Pairs, keys: Keys) -> None:
    """Checks that every message carries what its receiver takes it for."""
    for (sender, i, send), (receiver, j, receive) in pairs:
        if (send.gradient, send.slice) != (receive.gradient, receive.slice) or not _carry_the_same(
            _positions(plans[sender], send, keys), _positions(plans[receiver], receive, keys)
        ):
            raise PlanError(
                f"{name}: rank {sender} sends {send.words} in its exchange {i} that are not the {receive.words} "
                f"rank {receiver} expects in its exchange {j}."
            )


def paired(name: str, exchanges: Sequence[Sequence[Exchange]]) -> Pairs:
    """Which message of the receiver each message is, first in, first out. Raises PlanError where one has no other."""
    pairs: Pairs = []
    queues: dict[tuple[int, int, bool], list[tuple[int, Item]]] = {}
    for rank, own in enumerate(exchanges):
        for index, exchange in enumerate(own):
            for item in exchange.sends:
                queues.setdefault((rank, item.peer, True), []).append((index, item))
            for item in exchange.receives:
                queues.setdefault((item.peer, rank, False), []).append((index, item))
    for sender, receiver in sorted({key[:2] for key in queues}):
        sends, receives = queues.get((sender, receiver, True), []), queues.get((sender, receiver, False), [])
        if len(sends) != len(receives):
            raise PlanError(
                f"{name}: rank {sender} sends {len(sends)} messages to rank {receiver}, "
                f"which receives {len(receives)} from it."
            )
        for (i, send), (j, receive) in zip(sends, receives, strict=True):
            pairs.append(((sender, i, send), (receiver, j, receive)))
    return pairs


def verify_progress(name: str, exchanges: Sequence[Sequence[int]], meets: Meets) -> None:
    """Checks that the exchanges of all ranks, named by their phases, come to an end.

    Runs them in order: one completes when every exchange it meets has been started. An exchange starts when the one
    before it on its rank has completed. Whoever is left cannot ever go on.
    """
    at = [0] * len(exchanges)
    ready = list(range(len(exchanges)))
    while ready:
        rank = ready.pop()
        while at[rank] < len(exchanges[rank]) and all(at[peer] >= j for peer, j in meets[rank][at[rank]]):
            # Whoever met this exchange may have been waiting for it to be started: it was, so look again later.
            at[rank] += 1
            if at[rank] < len(exchanges[rank]):
                ready += [peer for peer, _ in meets[rank][at[rank]] if peer != rank]
    stuck = [rank for rank, own in enumerate(exchanges) if at[rank] < len(own)]
    if stuck:
        lines = []
        for rank in stuck:
            waits = sorted({peer for peer, j in meets[rank][at[rank]] if at[peer] < j})
            lines.append(f"rank {rank} in the exchange of phase {exchanges[rank][at[rank]]} for rank {waits}")
        raise PlanError(f"{name}: the plans deadlock; in a circle wait " + ", ".join(lines) + ".")
