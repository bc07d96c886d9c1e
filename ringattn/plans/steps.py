"""Programs and their steps: what one rank computes, sends and receives, decided before anything runs.

A plan is a program that can be asked; a program is made of a few int64 arrays. *Phases* number the moves of all ranks
alike: the keys that a rank attends to in phase p are its own (p = 0), or arrived in the exchange of phase p. Ranks skip
the phases in which they have nothing to do, so steps differ from rank to rank, phases never do; since every rank's
exchanges run in the order of their phases, matched exchanges cannot wait for each other in a circle.

The backward pass is no schedule's business. It is the same plan transposed: keys and values are fetched again as
in the forward pass, and the gradients of the rows a phase has used go straight to their owner, which adds them
in the order of the phases: P - 1 sends, no chain, the same bits every time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TypeVar

import numpy as np

from ringattn import layouts
from ringattn.bands import Array, Regions
from ringattn.masks import Mask
from ringattn.payloads.base import Payload
from ringattn.plans import tiles
from ringattn.plans.shape import GradientWire, Shape
from ringattn.plans.tiles import NO_TILES, PARTIAL, Tiles

T = TypeVar("T")

RECV_PHASE, RECV_SENDER, RECV_ORIGIN, RECV_START, RECV_STOP, RECV_OFFSET = range(6)
SEND_PHASE, SEND_PEER, SEND_SOURCE, SEND_START, SEND_STOP = range(5)
GRAD_PHASE, GRAD_PEER, GRAD_START, GRAD_STOP = range(4)
PART_PHASE, PART_START, PART_STOP = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One message of an exchange.

    Attributes:
        peer: the other rank.
        payload: what travels, or whose gradients do.
        gradient: whether gradients travel.
        parts: ``(phase, start, stop)``, half-open row ranges in the order they travel: of the buffer of a phase, or of
            this rank's own rows in phase 0, of which what is not per key travels once for each range. What is received
            has one phase.
    """

    peer: int
    payload: Payload
    gradient: bool
    parts: Array

    @functools.cached_property
    def phases(self) -> set[int]:
        """The phases of whose buffers it has parts."""
        return {*self.parts[:, PART_PHASE].tolist()}

    @functools.cached_property
    def rows(self) -> int:
        """Rows that travel."""
        return sum(rows for _, _, rows in self.sources)

    @functools.cached_property
    def sources(self) -> tuple[tuple[int, list[tuple[int, int]], int], ...]:
        """What travels from one buffer after another: its phase, the ranges, and how many rows that are."""
        out = []
        for phase, parts in _groups(self.parts[:, PART_PHASE], self.parts):
            start, stop = parts[:, PART_START], parts[:, PART_STOP]
            rows = self.payload.rows(start, stop) if phase == 0 else stop - start
            out.append((phase, list(zip(start.tolist(), stop.tolist(), strict=True)), int(rows.sum())))
        return tuple(out)

    @functools.cached_property
    def is_run(self) -> bool:
        """Whether its parts lie behind one another in one buffer."""
        return len(self.phases) == 1 and bool((self.parts[1:, PART_START] == self.parts[:-1, PART_STOP]).all())

    def run_of(self, rows: T) -> T:
        """The item's rows in the buffer in which its parts lie behind one another."""
        return rows[int(self.parts[0, PART_START]) : int(self.parts[-1, PART_STOP])]  # type: ignore[index, no-any-return]

    @property
    def words(self) -> str:
        """What travels, such as ``12 rows of keys``."""
        return f"{self.rows} {'gradients' if self.gradient else 'rows'} of {self.payload.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """What a rank sends and receives at once: one message a peer, for the keys and for the gradients each."""

    phase: int
    sends: tuple[Item, ...] = ()
    receives: tuple[Item, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sends or self.receives)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The exchange is started, the tiles are computed over the buffer of ``phase``, the exchange is waited for.

    Either may be empty, and then is false.
    """

    exchange: Exchange
    phase: int
    tiles: Tiles


@dataclasses.dataclass(frozen=True)
class BufferRows:
    """How many rows of the payload each exchange buffer must hold.

    Attributes:
        turns: of the two that receive rows in turn, and of the two that accumulate their gradients.
        staging: rows that are put together before they are sent.
        grad_staging: the same for gradients.
        grad_arrivals: gradients that have come back and are added to this rank's own.
    """

    turns: tuple[int, int]
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
        grad_sends: ``(phase, peer, start, stop)``: rows of the phase's buffer whose gradient goes to their owner.
        grad_receives: ``(phase, peer, start, stop)``: own rows whose gradient comes from the peer.
        lookahead: 1 when the next phase's exchange runs while this one computes, 0 when it does not.
        gradient_wire: the dtype in which gradients of keys and values travel.
        shape: heads, dims and dtype, where they were given.
        reason: why this schedule was taken, where ``auto`` chose it.
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
    shape: Shape | None = None
    reason: str = ""

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
        """Allowed pairs this rank computes."""
        asked = self.tile_rows[:, PARTIAL] != 0
        return Tiles(self.tile_rows[~asked]).area + sum(
            tiles.partial_area(self.mask, row) for row in self.tile_rows[asked].tolist()
        )

    @functools.cached_property
    def tiles(self) -> dict[int, Tiles]:
        """The tiles of every phase that has some."""
        return {phase: Tiles(rows) for phase, rows in _groups(self.tile_phases, self.tile_rows)}

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The forward pass."""
        return self._steps(self._key_exchanges, {})

    @functools.cached_property
    def backward_steps(self) -> tuple[Step, ...]:
        """The backward pass: this plan transposed."""

        def items(table: Array, own: bool) -> dict[int, tuple[Item, ...]]:
            found = {}
            for phase, rows in _groups(table[:, GRAD_PHASE], table):
                _, peer, start, stop = rows.T
                found[phase] = self._items(peer, start, stop, True, 0 if own else phase)
            return found

        sends, receives = items(self.grad_sends, own=False), items(self.grad_receives, own=True)
        gradients = {x: Exchange(x, sends.get(x, ()), receives.get(x, ())) for x in {*sends, *receives}}
        return self._with_own_tiles_last(self._steps(self._key_exchanges, gradients))

    def _with_own_tiles_last(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        """Keeps some of this rank's own tiles for the last step: the last gradients travel behind them.

        Own keys need no exchange, so any step can compute them.
        """
        own = next((i for i, step in enumerate(steps) if step.tiles and step.phase == 0), None)
        last = steps[-1] if steps else None
        if not self.lookahead or own is None or last is None or last.tiles or self.area < 2:
            return steps
        first, second = self.tiles[0].halves
        out = list(steps)
        out[own] = dataclasses.replace(steps[own], tiles=first)
        out[-1] = Step(last.exchange, 0, second)
        return tuple(out)

    @functools.cached_property
    def _key_exchanges(self) -> dict[int, Exchange]:
        exchanges: dict[int, Exchange] = {}
        for phase, rows in _groups(self.sends[:, SEND_PHASE], self.sends):
            start, stop, source = rows[:, [SEND_START, SEND_STOP, SEND_SOURCE]].T
            exchanges[phase] = Exchange(phase, sends=self._items(rows[:, SEND_PEER], start, stop, False, source))
        for phase, rows in _groups(self.receives[:, RECV_PHASE], self.receives):
            offset = rows[:, RECV_OFFSET]
            stop = offset + received_rows(self.payload, rows)
            items = self._items(rows[:, RECV_SENDER], offset, stop, False, phase)
            exchange = exchanges.get(phase, Exchange(phase))
            exchanges[phase] = dataclasses.replace(exchange, receives=items)
        return exchanges

    def _items(self, peers: Array, start: Array, stop: Array, gradient: bool, phases: int | Array) -> tuple[Item, ...]:
        parts = np.stack([np.broadcast_to(phases, start.shape), start, stop], axis=1)
        return tuple(Item(peer, self.payload, gradient, part) for peer, part in _groups(peers, parts))

    def _steps(self, keys: dict[int, Exchange], gradients: dict[int, Exchange]) -> tuple[Step, ...]:
        """Keys of phase x travel with gradients of phase x - 1 - lookahead, which are ready by then on every rank."""
        lag = 1 + self.lookahead
        exchanges = dict(keys)
        for phase, returned in gradients.items():
            both = exchanges.get(phase + lag, Exchange(phase + lag))
            exchanges[phase + lag] = Exchange(
                phase + lag, both.sends + returned.sends, both.receives + returned.receives
            )
        steps = []
        for phase in sorted({*self.tiles, *(x - self.lookahead for x in exchanges)}):
            at = phase + self.lookahead
            exchange, step_tiles = exchanges.get(at, Exchange(at)), self.tiles.get(phase, NO_TILES)
            if self.lookahead:
                steps.append(Step(exchange, phase, step_tiles))
            else:
                steps += [Step(exchange, phase, NO_TILES), Step(Exchange(at), phase, step_tiles)]
        return tuple(step for step in steps if step.exchange or step.tiles)

    @functools.cached_property
    def slots(self) -> dict[int, int]:
        """Which of the two receive buffers each phase's keys lie in."""
        return {int(phase): nth % 2 for nth, phase in enumerate(np.unique(self.receives[:, RECV_PHASE]))}

    @functools.cached_property
    def phase_rows(self) -> dict[int, int]:
        """Rows in the buffer of every phase, this rank's own in phase 0."""
        groups = _groups(self.receives[:, RECV_PHASE], self.receives)
        return {0: self.key_tokens, **{phase: int(received_rows(self.payload, rows).sum()) for phase, rows in groups}}

    def packed(self, item: Item) -> bool:
        """Whether what an item sends must be copied together first; otherwise it travels from where it lies."""
        if item.gradient:
            return not item.is_run or self.gradient_wire == "input"
        return 0 in item.phases or not item.is_run

    @functools.cached_property
    def buffer_rows(self) -> BufferRows:
        """The size of each exchange buffer."""
        turns = [0, 0]
        for phase, slot in self.slots.items():
            turns[slot] = max(turns[slot], self.phase_rows[phase])
        sent, returned, arriving = 0, 0, 0
        for exchange in (step.exchange for step in self.backward_steps if step.exchange):
            packed = [item for item in exchange.sends if self.packed(item)]
            sent = max(sent, sum(item.rows for item in packed if not item.gradient))
            returned = max(returned, sum(item.rows for item in packed if item.gradient))
            arriving = max(arriving, sum(item.rows for item in exchange.receives if item.gradient))
        return BufferRows((turns[0], turns[1]), sent, returned, arriving)

    @functools.cached_property
    def hash(self) -> str:
        """A fingerprint of everything the plan does, 16 hexadecimal digits."""
        parts = (self.tile_phases, self.tile_rows, self.receives, self.sends, self.grad_sends, self.grad_receives)
        h = hashlib.blake2b(digest_size=8)
        for part in (*parts, self.q_spans, self.k_spans):
            h.update(repr(part.shape).encode() + np.ascontiguousarray(part).tobytes())
        h.update(
            repr((self.rank, self.size, self.payload.name, self.lookahead, self.gradient_wire, self.shape)).encode()
        )
        return h.hexdigest()


def received_rows(payload: Payload, receives: Array) -> Array:
    """The buffer rows of each receive."""
    return payload.rows(receives[:, RECV_START], receives[:, RECV_STOP])


def _groups(keys: Array, rows: Array) -> list[tuple[int, Array]]:
    """The runs of rows with equal keys."""
    if not len(keys):
        return []
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return [(int(keys[i]), part) for i, part in zip(first, np.split(rows, first[1:]), strict=True)]
