"""Programs and their steps: what one rank computes, sends and receives, decided before anything runs.

A plan is a program that can be asked; a program is made of a few int64 arrays. *Phases* number the moves of all ranks
alike: the keys that a rank attends to in phase p are its own (p = 0), or arrived in the exchange of phase p. Ranks skip
the phases in which they have nothing to do, so steps differ from rank to rank, phases never do; since every rank's
exchanges run in the order of their phases, matched exchanges cannot wait for each other in a circle.

The backward pass is the same plan transposed: keys and values are fetched again as in the forward pass, and the
gradients of the rows a phase has used go home, straight to their owner if the schedule has no other way for them. They
travel in a later phase, alone or beside keys, and are added in the order of the phases: the same bits every time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from ringattn import layouts
from ringattn.bands import Array, Regions
from ringattn.declared import Collective
from ringattn.masks import Mask
from ringattn.payloads.base import Attended, Payload
from ringattn.plans import buffers, tiles
from ringattn.plans.exchanges import Exchange, Item, Step, grouped
from ringattn.plans.shape import GradientWire, Shape
from ringattn.plans.tiles import PARTIAL, Tiles
from ringattn.plans.walk import walk

RECV_PHASE, RECV_SENDER, RECV_ORIGIN, RECV_START, RECV_STOP, RECV_OFFSET = range(6)
SEND_PHASE, SEND_PEER, SEND_SOURCE, SEND_START, SEND_STOP = range(5)
GRAD_PHASE, GRAD_PEER, GRAD_BUFFER, GRAD_START, GRAD_STOP = range(5)


@dataclasses.dataclass(frozen=True)
class BufferRows:
    """How many rows of the payload each exchange buffer must hold.

    Attributes:
        received, gradients: of those that rows arrive in, and of those that accumulate their gradients; each serves
            phase after phase.
        staging: rows that are put together before they are sent.
        grad_staging: the same for gradients.
        grad_arrivals: gradients that have come and are added to this rank's own, or to those that it passes on.
    """

    received: tuple[int, ...]
    gradients: tuple[int, ...]
    staging: int
    grad_staging: int
    grad_arrivals: int


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One rank's part of one attention call, as data: see `plan.Plan` for what can be asked of it.

    Attributes:
        rank, size: this rank, of those that share the sequence.
        mask, regions, partial, q_spans, k_spans: what was asked for: the mask and its regions, who holds which
            queries and keys.
        description: mask, layouts and schedule, in words.
        payload: what travels. Where it is not per key, each receive is one row of its phase's buffer, and a tile of
            another rank's keys attends to one of them; only phase 0, this rank's own keys, is rows of keys then.
        tile_phases, tile_rows: every tile and its phase, sorted by phase; keys are rows of the phase's buffer.
        receives: ``(phase, sender, origin, start, stop, offset)``: rows of the origin's shard that arrive from the
            sender, and where they, or their summary, lie in the phase's buffer.
        sends: ``(phase, peer, source, start, stop)``: rows of the buffer of phase ``source`` that the peer receives
            in ``phase``.
        grad_sends: ``(phase, peer, buffer, start, stop)``: rows of the buffer of phase ``buffer`` whose gradient goes
            home, by way of the peer, in ``phase``.
        grad_receives: ``(phase, peer, buffer, start, stop)``: rows whose gradient comes from the peer: this rank's own
            in buffer 0, and of others those to whose gradients it is added before they go on.
        lookahead: 1 when the next exchange runs while this rank computes, 0 when it does not.
        gradient_wire: the dtype in which gradients of keys and values travel.
        collective: what every exchange is by which keys come: an all-gather, where every rank needs all keys of every
            other one. Their gradients then go home from all to all.
        slices: into how many slices of key heads, with the query heads that read them, everything is cut that is not of
            this rank's own keys. Where there are several, phase p is of slice p - 1, and its exchange brings no other.
        shape: heads, dims and dtype, where they were given.
        reason: why this schedule was taken, where ``auto`` chose it.
        node: how many neighbouring ranks share a node; None where all do, or it is not known.
    """

    rank: int
    size: int
    mask: Mask
    regions: Regions
    partial: Regions
    q_spans: Array
    k_spans: Array
    description: str
    payload: Payload
    tile_phases: Array
    tile_rows: Array
    receives: Array
    sends: Array
    grad_sends: Array
    grad_receives: Array
    lookahead: int
    gradient_wire: GradientWire
    collective: Collective | None = None
    slices: int = 1
    shape: Shape | None = None
    reason: str = ""
    node: int | None = None

    queries_travel: ClassVar[bool] = False
    """Whether queries go to the keys, and not keys to the queries: see `plans.passing`."""

    @property
    def moved(self) -> Program:
        """The program as the side that stays sees it, which is what is verified: itself, where keys travel."""
        return self

    @property
    def attended(self) -> Attended:
        """What travels, where it is attended to."""
        assert isinstance(self.payload, Attended)  # queries are not
        return self.payload

    @functools.cached_property
    def tokens(self) -> int:
        """Queries this rank holds."""
        return int(layouts.counts(self.q_spans, self.size)[self.rank])

    @functools.cached_property
    def key_tokens(self) -> int:
        """Keys this rank holds."""
        return int(layouts.counts(self.k_spans, self.size)[self.rank])

    @functools.cached_property
    def area(self) -> int:
        """Allowed pairs this rank computes, each counted once, whose heads may be computed in slices."""
        rows = self.tile_rows if self.slices == 1 else self.tile_rows[self.tile_phases <= 1]
        asked = rows[:, PARTIAL] != 0
        return Tiles(rows[~asked]).area + sum(tiles.partial_area(self.mask, row) for row in rows[asked].tolist())

    @functools.cached_property
    def tiles(self) -> dict[int, Tiles]:
        """The tiles of every phase that has some."""
        return {phase: Tiles(rows) for phase, rows in grouped(self.tile_phases, self.tile_rows)}

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The forward pass."""
        return self._walked(self._key_exchanges)

    @functools.cached_property
    def backward_steps(self) -> tuple[Step, ...]:
        """The backward pass: this plan transposed."""
        exchanges = dict(self._key_exchanges)
        going, coming = (dict(self._gradients(table)) for table in (self.grad_sends, self.grad_receives))
        for phase in going.keys() | coming.keys():
            # Alone, they are one message from each that got keys to each that sent them; beside keys, a second one.
            alone = self.collective == "all_gather" and phase not in exchanges
            x = exchanges.get(phase, Exchange(phase))
            exchanges[phase] = Exchange(
                phase,
                sends=(*x.sends, *going.get(phase, ())),
                receives=(*x.receives, *coming.get(phase, ())),
                collective="all_to_all" if alone else None,
            )
        return self._walked(exchanges)

    def _walked(self, exchanges: dict[int, Exchange]) -> tuple[Step, ...]:
        steps = walk(exchanges, self.tiles, self.lookahead)
        if self.slices == 1:
            return steps
        return tuple(
            dataclasses.replace(step, share=self._shares[self.slice_of(step.phase)] if step.phase else 1.0)
            for step in steps
        )

    def _gradients(self, table: Array) -> Iterator[tuple[int, tuple[Item, ...]]]:
        """The messages of gradients in each phase."""
        for phase, rows in grouped(table[:, GRAD_PHASE], table):
            peer, buffer, start, stop = rows[:, GRAD_PEER:].T
            yield phase, self._items(peer, start, stop, True, buffer, self.slice_of(phase - self.lag))

    @functools.cached_property
    def _key_exchanges(self) -> dict[int, Exchange]:
        exchanges: dict[int, Exchange] = {}
        for phase, rows in grouped(self.sends[:, SEND_PHASE], self.sends):
            start, stop, source = rows[:, [SEND_START, SEND_STOP, SEND_SOURCE]].T
            items = self._items(rows[:, SEND_PEER], start, stop, False, source, self.slice_of(phase))
            exchanges[phase] = Exchange(phase, sends=items)
        for phase, rows in grouped(self.receives[:, RECV_PHASE], self.receives):
            offset = rows[:, RECV_OFFSET]
            stop = offset + received_rows(self.payload, rows)
            items = self._items(rows[:, RECV_SENDER], offset, stop, False, phase, self.slice_of(phase))
            exchange = exchanges.get(phase, Exchange(phase))
            exchanges[phase] = dataclasses.replace(exchange, receives=items, collective=self.collective)
        return exchanges

    def _items(
        self, peers: Array, start: Array, stop: Array, gradient: bool, phases: int | Array, nth: int
    ) -> tuple[Item, ...]:
        parts = np.stack([np.broadcast_to(phases, start.shape), start, stop], axis=1)
        share = self._shares[nth]
        return tuple(Item(peer, self.payload, gradient, part, nth, share) for peer, part in grouped(peers, parts))

    @property
    def lag(self) -> int:
        """How many phases after its keys a gradient goes home that goes straight there: it is computed by then."""
        return 1 + self.lookahead

    def slice_of(self, phase: int) -> int:
        """The slice of heads that a phase is of."""
        return phase - 1 if self.slices > 1 else 0

    @functools.cached_property
    def _shares(self) -> tuple[float, ...]:
        """The part of the heads that each slice has; equal ones where the shape is not known."""
        heads = (1,) * self.slices if self.shape is None else self.shape.heads_of(self.slices)
        return tuple(each / sum(heads) for each in heads)

    @functools.cached_property
    def phase_rows(self) -> dict[int, int]:
        """Rows in the buffer of every phase, this rank's own in phase 0."""
        groups = grouped(self.receives[:, RECV_PHASE], self.receives)
        return {0: self.key_tokens, **{phase: int(received_rows(self.payload, rows).sum()) for phase, rows in groups}}

    @functools.cached_property
    def slots(self) -> dict[int, int]:
        """Which of the receive buffers each phase's keys lie in."""
        arrived = {phase: rows for phase, rows in self.phase_rows.items() if phase}
        return buffers.shared(arrived, *map(buffers.rows_live, (self.steps, self.backward_steps)))

    @functools.cached_property
    def grad_slots(self) -> dict[int, int]:
        """Which of the buffers for them each phase's gradients lie in."""
        lives = buffers.gradients_live(self.backward_steps)
        return buffers.shared({phase: self.phase_rows.get(phase, 0) for phase in lives}, lives)

    def packed(self, item: Item) -> bool:
        """Whether what an item sends must be copied together first; otherwise it travels from where it lies."""
        if item.gradient:
            return not item.is_run or self.gradient_wire == "input"
        return 0 in item.phases or not item.is_run

    @functools.cached_property
    def buffer_rows(self) -> BufferRows:
        """The size of each exchange buffer."""
        sent, returned, arriving = 0, 0, 0
        for exchange in (step.exchange for step in self.backward_steps if step.exchange):
            packed = {item.content: item for item in exchange.sends if self.packed(item)}.values()
            sent = max(sent, sum(item.rows for item in packed if not item.gradient))
            returned = max(returned, sum(item.rows for item in packed if item.gradient))
            arriving = max(arriving, sum(item.rows for item in exchange.receives if item.gradient))
        return BufferRows(self._largest(self.slots), self._largest(self.grad_slots), sent, returned, arriving)

    def _largest(self, slots: dict[int, int]) -> tuple[int, ...]:
        """The rows of each buffer: those of the largest phase that lies in it."""
        sizes = [0] * len({*slots.values()})
        for phase, slot in slots.items():
            sizes[slot] = max(sizes[slot], self.phase_rows.get(phase, 0))
        return tuple(sizes)

    @functools.cached_property
    def hash(self) -> str:
        """A fingerprint of everything the plan does, 16 hexadecimal digits."""
        parts = (self.tile_phases, self.tile_rows, self.receives, self.sends, self.grad_sends, self.grad_receives)
        h = hashlib.blake2b(digest_size=8)
        for part in (*parts, self.q_spans, self.k_spans):
            h.update(repr(part.shape).encode() + np.ascontiguousarray(part).tobytes())
        options = self.payload.name, self.lookahead, self.gradient_wire, self.collective, self.slices, self.shape
        h.update(repr((self.rank, self.size, *options)).encode())
        return h.hexdigest()


def received_rows(payload: Payload, receives: Array) -> Array:
    """The buffer rows of each receive."""
    return payload.rows(receives[:, RECV_START], receives[:, RECV_STOP])
