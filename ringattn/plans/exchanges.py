"""Exchanges: the messages that a rank sends and receives at once, and the steps that hide them behind tiles."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TypeVar

import numpy as np

from ringattn.bands import Array
from ringattn.declared import Collective
from ringattn.payloads.base import Payload
from ringattn.plans.tiles import Tiles

T = TypeVar("T")

PART_PHASE, PART_START, PART_STOP = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One message of an exchange.

    Attributes:
        peer: the other rank.
        payload: what travels, or whose gradients do.
        gradient: whether gradients travel.
        parts: ``(phase, start, stop)``, half-open row ranges in the order they travel: of the buffer of a phase, or of
            this rank's own rows in phase 0, of which what is not per key travels once for each range. Rows that are
            received have one phase; gradients are added to what lies in these ranges.
        slice: of which slice of heads, where these travel apart.
        share: which part of the heads that a rank computes travels.
    """

    peer: int
    payload: Payload
    gradient: bool
    parts: Array
    slice: int = 0
    share: float = 1.0

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
        for phase, parts in grouped(self.parts[:, PART_PHASE], self.parts):
            start, stop = parts[:, PART_START], parts[:, PART_STOP]
            rows = self.payload.rows(start, stop) if phase == 0 else stop - start
            out.append((phase, list(zip(start.tolist(), stop.tolist(), strict=True)), int(rows.sum())))
        return tuple(out)

    @functools.cached_property
    def content(self) -> tuple[bool, int, bytes]:
        """What travels: equal where the same does."""
        return self.gradient, self.slice, self.parts.tobytes()

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
    """What a rank sends and receives at once: one message a peer, for the keys and for the gradients each.

    Attributes:
        collective: what it is of all ranks that share the sequence, or of a group of them, which `verification` holds
            it to, so that a transport may use its library's own in place of messages; None where it is not known to be.
    """

    phase: int
    sends: tuple[Item, ...] = ()
    receives: tuple[Item, ...] = ()
    collective: Collective | None = None

    def __bool__(self) -> bool:
        return bool(self.sends or self.receives)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The exchange is started, the tiles are computed over the buffer of ``phase``, the exchange is waited for.

    Either may be empty, and then is false. This rank's own tiles, of phase 0, may be those of several steps.

    Attributes:
        share: for which part of the heads that a rank computes the tiles are.
    """

    exchange: Exchange
    phase: int
    tiles: Tiles
    share: float = 1.0

    @property
    def area(self) -> float:
        """Pairs of its tiles; of a part of the heads as much less as there are fewer of them."""
        return self.tiles.area * self.share if self.tiles else 0.0


def grouped(keys: Array, rows: Array) -> list[tuple[int, Array]]:
    """The runs of rows with equal keys."""
    if not len(keys):
        return []
    edges = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
    return [(int(keys[start]), rows[start:stop]) for start, stop in itertools.pairwise(edges)]
