"""Plans: what one rank computes, sends and receives, decided before anything runs.

A plan is made of a few int64 arrays. *Phases* number the moves of all ranks alike: the keys that a rank attends to
in phase p are its own (p = 0), or arrived in the exchange of phase p. Ranks skip the phases in which they have
nothing to do, so steps differ from rank to rank, phases never do; since every rank's exchanges run in the order of
their phases, matched exchanges cannot wait for each other in a circle.

The backward pass is no schedule's business. It is the same plan transposed: keys and values are fetched again as
in the forward pass, and the gradients of the rows a phase has used go straight home to their owner, which adds them
in the order of the phases: P - 1 sends, no chain, the same bits every time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Literal

import numpy as np

from ringattn import accounting, layouts
from ringattn.accounting import Memory, Shape, Traffic
from ringattn.bands import Array, Regions
from ringattn.tiles import NO_TILES, Tiles

GradientWire = Literal["float32", "input"]

HOLD_PHASE, HOLD_SENDER, HOLD_ORIGIN, HOLD_START, HOLD_STOP, HOLD_OFFSET = range(6)
SEND_PHASE, SEND_PEER, SEND_SOURCE, SEND_START, SEND_STOP = range(5)
HOME_PHASE, HOME_PEER, HOME_START, HOME_STOP = range(4)


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One message of an exchange.

    Attributes:
        peer: the other rank.
        what: ``kv`` for keys and values, ``dkv`` for their gradients.
        phase: the buffer: 0 for this rank's own rows, p for those of phase p.
        spans: half-open row ranges ``[n, 2]`` of that buffer, in the order they travel.
    """

    peer: int
    what: Literal["kv", "dkv"]
    phase: int
    spans: Array

    @functools.cached_property
    def rows(self) -> int:
        """Rows that travel."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


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


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One rank's part of one attention call.

    Attributes:
        rank, size: this rank, of those that share the sequence.
        regions, q_spans, k_spans: what was asked for: the mask's regions, who holds which queries and keys.
        description: mask, layouts and schedule, in words.
        tile_phases, tile_rows: every tile and its phase, sorted by phase; keys are rows of the phase's buffer.
        holds: ``(phase, sender, origin, start, stop, offset)``: rows of the origin's shard that arrive from the
            sender, and where they lie in the phase's buffer.
        sends: ``(phase, peer, source, start, stop)``: rows of the buffer of phase ``source`` that the peer is to hold
            in ``phase``.
        home_sends: ``(phase, peer, start, stop)``: rows of the phase's buffer whose gradient goes to their owner.
        home_receives: ``(phase, peer, start, stop)``: own rows whose gradient comes from the peer.
        lookahead: 1 when the next phase's exchange runs while this one computes, 0 when it does not.
        gradient_wire: the dtype in which gradients of keys and values travel.
        shape: heads, dims and dtype, where they were given.
        reason: why this schedule was taken, where ``auto`` chose it.
    """

    rank: int
    size: int
    regions: Regions
    q_spans: Array
    k_spans: Array
    description: str
    tile_phases: Array
    tile_rows: Array
    holds: Array
    sends: Array
    home_sends: Array
    home_receives: Array
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
        return Tiles(self.tile_rows).area

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
            return {
                phase: _items(rows[:, HOME_PEER], rows[:, HOME_START : HOME_STOP + 1], "dkv", 0 if own else phase)
                for phase, rows in _groups(table[:, HOME_PHASE], table)
            }

        sends, receives = items(self.home_sends, own=False), items(self.home_receives, own=True)
        homes = {x: Exchange(x, sends.get(x, ()), receives.get(x, ())) for x in {*sends, *receives}}
        return self._with_own_tiles_last(self._steps(self._key_exchanges, homes))

    def _with_own_tiles_last(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        """Keeps some of this rank's own tiles for the last step: the last gradients go home behind them.

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
            # A rank sends from one buffer in a phase: its own, or the one it relays.
            items = _items(rows[:, SEND_PEER], rows[:, SEND_START : SEND_STOP + 1], "kv", int(rows[0, SEND_SOURCE]))
            exchanges[phase] = Exchange(phase, sends=items)
        for phase, rows in _groups(self.holds[:, HOLD_PHASE], self.holds):
            offset = rows[:, HOLD_OFFSET]
            spans = np.stack([offset, offset + rows[:, HOLD_STOP] - rows[:, HOLD_START]], axis=1)
            items = _items(rows[:, HOLD_SENDER], spans, "kv", phase)
            exchange = exchanges.get(phase, Exchange(phase))
            exchanges[phase] = dataclasses.replace(exchange, receives=items)
        return exchanges

    def _steps(self, keys: dict[int, Exchange], homes: dict[int, Exchange]) -> tuple[Step, ...]:
        """Keys of phase x travel with gradients of phase x - 1 - lookahead, which are ready by then on every rank."""
        lag = 1 + self.lookahead
        exchanges = dict(keys)
        for phase, home in homes.items():
            both = exchanges.get(phase + lag, Exchange(phase + lag))
            exchanges[phase + lag] = Exchange(phase + lag, both.sends + home.sends, both.receives + home.receives)
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
        return {int(phase): nth % 2 for nth, phase in enumerate(np.unique(self.holds[:, HOLD_PHASE]))}

    @functools.cached_property
    def held_rows(self) -> dict[int, int]:
        """Rows in the buffer of every phase, this rank's own in phase 0."""
        groups = _groups(self.holds[:, HOLD_PHASE], self.holds)
        return {0: self.key_tokens, **{phase: int((t[:, HOLD_STOP] - t[:, HOLD_START]).sum()) for phase, t in groups}}

    def held_positions(self, phase: int) -> Array:
        """The global position of every row in the buffer of a phase."""
        if phase == 0:
            return layouts.positions(self.k_spans, self.rank)
        first, last = np.searchsorted(self.holds[:, HOLD_PHASE], [phase, phase + 1])
        parts = [
            layouts.positions(self.k_spans, origin)[start:stop]
            for _, _, origin, start, stop, _ in self.holds[first:last].tolist()
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def packed(self, item: Item) -> bool:
        """Whether what an item sends must be copied together first; otherwise it travels from where it lies."""
        if item.what == "kv":
            return item.phase == 0 or len(item.spans) > 1
        return len(item.spans) > 1 or self.gradient_wire == "input"

    @functools.cached_property
    def buffer_rows(self) -> dict[str, int]:
        """Rows of keys and values that each exchange buffer must hold, by the buffer's name.

        ``keys 0`` and ``keys 1`` receive keys in turn, ``gradients 0`` and ``1`` accumulate their gradients; the
        stagings are packed before they are sent; ``home arrivals`` are added to this rank's own gradients.
        """
        rows = dict.fromkeys(("keys 0", "keys 1", "gradients 0", "gradients 1"), 0)
        for phase, slot in self.slots.items():
            for name in (f"keys {slot}", f"gradients {slot}"):
                rows[name] = max(rows[name], self.held_rows[phase])
        rows.update(dict.fromkeys(("key staging", "home staging", "home arrivals"), 0))
        for exchange in (step.exchange for step in self.backward_steps if step.exchange):
            packed = [item for item in exchange.sends if self.packed(item)]
            for name, items in (
                ("key staging", [item for item in packed if item.what == "kv"]),
                ("home staging", [item for item in packed if item.what == "dkv"]),
                ("home arrivals", [item for item in exchange.receives if item.what == "dkv"]),
            ):
                rows[name] = max(rows[name], sum(item.rows for item in items))
        return rows

    @functools.cached_property
    def hash(self) -> str:
        """A fingerprint of everything the plan does, 16 hexadecimal digits."""
        parts = (self.tile_phases, self.tile_rows, self.holds, self.sends, self.home_sends, self.home_receives)
        h = hashlib.blake2b(digest_size=8)
        for part in (*parts, self.q_spans, self.k_spans):
            h.update(repr(part.shape).encode() + np.ascontiguousarray(part).tobytes())
        h.update(repr((self.rank, self.size, self.lookahead, self.gradient_wire, self.shape)).encode())
        return h.hexdigest()

    def verify(self) -> None:
        """Checks this rank's part: see `verification.verify_rank`. Raises PlanError."""
        from ringattn.verification import verify_rank

        verify_rank(self)

    def traffic(self) -> Traffic:
        """What this rank moves: key positions, messages and, where the shape is known, bytes."""
        return accounting.traffic(self)

    def memory(self) -> Memory:
        """Every buffer of forward and backward, in bytes. Needs the shape."""
        return accounting.memory(self)

    def explain(self) -> str:
        """The plan in words, a line a step."""
        return accounting.explain(self)


def _groups(keys: Array, rows: Array) -> list[tuple[int, Array]]:
    """The runs of rows with equal keys; keys are sorted."""
    if not len(keys):
        return []
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return [(int(keys[i]), part) for i, part in zip(first, np.split(rows, first[1:]), strict=True)]


def _items(peers: Array, spans: Array, what: Literal["kv", "dkv"], phase: int) -> tuple[Item, ...]:
    return tuple(Item(peer, what, phase, part) for peer, part in _groups(peers, spans))
