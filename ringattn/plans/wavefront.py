"""Wavefronts: which rank works on which block of queries at which step, what is handed over for it, and what is right.

Forward, blocks of queries begin at rank 0 and end at the last one, in order; backward they begin at the last rank, the
last block first. At every step a rank does its exchange, then its block. Everything that travels is a *parcel* of one
block: its queries and what flows out of the block on one rank into the block on the next, its outputs to the rank that
holds its queries. The keys before a rank's own that its queries may see (`Ordered.reach`) come by an ordinary plan.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from ringattn.checking import sequence
from ringattn.errors import PlanError
from ringattn.plans.plan import Plan
from ringattn.plans.shape import Shape
from ringattn.plans.verification import verify, verify_progress

What = Literal[
    "queries",
    "left",
    "partial outputs",
    "outputs",
    "output gradients",
    "left gradients",
    "partial query gradients",
    "query gradients",
]
"""What a parcel holds: ``left`` is what flows into a block from the left."""


@dataclasses.dataclass(frozen=True)
class Way:
    """What travels in one pass.

    Attributes:
        brought: from the rank that holds a block's queries to the one that begins.
        handed: from each rank to the next.
        result: from the one that ends to the rank that holds the queries.
    """

    name: str
    brought: tuple[What, ...]
    handed: tuple[What, ...]
    result: What


FORWARD = Way("forward", ("queries",), ("queries", "left", "partial outputs"), "outputs")
BACKWARD = Way(
    "backward",
    ("queries", "output gradients"),
    ("queries", "output gradients", "left gradients", "partial query gradients"),
    "query gradients",
)


@dataclasses.dataclass(frozen=True, order=True)
class Parcel:
    """One message: what there is of a block, to or from a peer."""

    peer: int
    what: What
    block: int


@dataclasses.dataclass(frozen=True)
class WaveStep:
    """The exchange, then the block, if there is one."""

    number: int
    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]
    block: int | None


@dataclasses.dataclass(frozen=True)
class QueryBlock:
    """Rows of one rank's queries."""

    home: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Of the rank that holds them."""
        return slice(self.start, self.stop)

    @property
    def count(self) -> int:
        """How many they are."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, eq=False)
class Wavefront:
    """One rank's part of one call, as data: see `wave.WavePlan` for what can be asked of it.

    Attributes:
        rank, size: this rank, of those that share the sequences.
        blocks: all blocks of queries, in order.
        key_counts: how many keys each rank holds, in order.
        description: layouts and schedule, in words.
        forward, backward: the steps of both passes.
        window: by which keys that precede a rank's own come to it, and their gradients return; None where none do.
        shape: heads, dims and dtype, where they were given.
    """

    rank: int
    size: int
    blocks: tuple[QueryBlock, ...]
    key_counts: tuple[int, ...]
    description: str
    forward: tuple[WaveStep, ...]
    backward: tuple[WaveStep, ...]
    window: Plan | None
    shape: Shape | None = None

    @property
    def tokens(self) -> int:
        """Queries this rank holds."""
        return sum(block.count for block in self.blocks if block.home == self.rank)

    @property
    def queries(self) -> int:
        """Queries of all ranks."""
        return sum(block.count for block in self.blocks)

    @property
    def key_tokens(self) -> int:
        """Keys this rank holds."""
        return self.key_counts[self.rank]

    @property
    def first_key(self) -> int:
        """The position of the first of them."""
        return sum(self.key_counts[: self.rank])

    @property
    def steps(self) -> int:
        """Steps in which some rank works on a block, in either pass."""
        return len(self.blocks) + self.size - 1 if self.blocks else 0

    @property
    def waiting(self) -> float:
        """The share of the steps in which a rank has no block."""
        return (self.size - 1) / self.steps if self.steps else 0.0

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The position of the first query of each block."""
        return tuple(np.cumsum([0, *(block.count for block in self.blocks[:-1])]).tolist())

    @functools.cached_property
    def before(self) -> int:
        """How many keys come from the ranks before."""
        return 0 if self.window is None else self.window.traffic().received_tokens

    @functools.cached_property
    def hash(self) -> str:
        """A fingerprint of everything the plan does, 16 hexadecimal digits."""
        does = self.rank, self.size, self.blocks, self.key_counts, self.forward, self.backward, self.shape
        text = repr((*does, self.window and self.window.hash))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def steps_of(rank: int, size: int, blocks: Sequence[QueryBlock], way: Way) -> Iterator[WaveStep]:
    """A rank's steps of a pass: what is computed at a step travels in the exchange of the next one."""
    chain, order = _order(size, len(blocks), way)
    place, last = chain.index(rank), size - 1
    for number in range(len(blocks) + size):

        def at(of: int, number: int = number) -> int | None:
            """The block on which the rank at a place of the chain works in this step."""
            return order[number - of] if 0 <= number - of < len(order) else None

        sends, receives = [], []
        beginning, done, mine, ended = at(0), at(place + 1), at(place), at(size)
        if beginning is not None and place and blocks[beginning].home == rank:
            sends += [Parcel(chain[0], what, beginning) for what in way.brought]
        if done is not None and place < last:
            sends += [Parcel(chain[place + 1], what, done) for what in way.handed]
        elif done is not None and blocks[done].home != rank:
            sends.append(Parcel(blocks[done].home, way.result, done))
        if mine is not None and place:
            receives += [Parcel(chain[place - 1], what, mine) for what in way.handed]
        elif mine is not None and blocks[mine].home != rank:
            receives += [Parcel(blocks[mine].home, what, mine) for what in way.brought]
        if ended is not None and place < last and blocks[ended].home == rank:
            receives.append(Parcel(chain[last], way.result, ended))
        if sends or receives or mine is not None:
            yield WaveStep(number, tuple(sends), tuple(receives), mine)


def _order(size: int, blocks: int, way: Way) -> tuple[list[int], list[int]]:
    """The ranks and the blocks in the order of a pass."""
    ranks, numbers = list(range(size)), list(range(blocks))
    return (ranks, numbers) if way is FORWARD else (ranks[::-1], numbers[::-1])


# -- verification ----------------------------------------------------------------------------------------------------


def verify_waves(plans: Sequence[Wavefront]) -> None:
    """Checks every rank's plan, that together they match, that no rank waits in a circle, and the number of steps.

    Raises:
        InputError: ``plans`` is no list of plans, or empty.
        PlanError: says which pass, ranks and parcels.
    """
    sequence(plans, Wavefront, "plans", "every rank's plan, in order, as plan_wave makes them")
    first = plans[0]
    if [x.rank for x in plans] != list(range(len(plans))) or {x.size for x in plans} != {len(plans)}:
        raise PlanError(f"verify_waves takes every rank's plan, in order; got ranks {[x.rank for x in plans]}.")
    for each in plans:
        if (each.blocks, each.key_counts) != (first.blocks, first.key_counts):
            raise PlanError(f"Rank {each.rank} and rank 0 planned for other blocks of queries, or other keys.")
        verify_wave(each)
    for name in ("forward", "backward"):
        steps = [[step for step in getattr(x, name) if step.sends or step.receives] for x in plans]
        verify_progress(name, [[step.number for step in own] for own in steps], _meetings(name, steps))
    windows = [each.window for each in plans if each.window is not None]
    if windows:
        verify(windows)


def _meetings(name: str, steps: Sequence[Sequence[WaveStep]]) -> list[list[list[tuple[int, int]]]]:
    """For every exchange of every rank those, (rank, index), that its parcels meet, first in, first out."""
    queues: dict[tuple[int, int, bool], list[tuple[int, Parcel]]] = {}
    for rank, own in enumerate(steps):
        for index, step in enumerate(own):
            for parcel in step.sends:
                queues.setdefault((rank, parcel.peer, True), []).append((index, parcel))
            for parcel in step.receives:
                queues.setdefault((parcel.peer, rank, False), []).append((index, parcel))
    meets: list[list[list[tuple[int, int]]]] = [[[] for _ in own] for own in steps]
    for sender, receiver in sorted({key[:2] for key in queues}):
        sent, awaited = queues.get((sender, receiver, True), []), queues.get((sender, receiver, False), [])
        said = [[(parcel.what, parcel.block) for _, parcel in side] for side in (sent, awaited)]
        if said[0] != said[1]:
            differ = next((x for x in zip(*said, strict=False) if x[0] != x[1]), (len(sent), len(awaited)))
            raise PlanError(f"{name}: rank {sender} sends rank {receiver} {differ[0]}, which awaits {differ[1]}.")
        for (i, _), (j, _) in zip(sent, awaited, strict=True):
            meets[sender][i].append((receiver, j))
            meets[receiver][j].append((sender, i))
    return meets


def verify_wave(plan: Wavefront) -> None:
    """Checks one rank's part: every block once and in order, of which everything has come and goes on, once.

    Raises:
        PlanError: says which pass, rank and block.
    """
    for way, steps in ((FORWARD, plan.forward), (BACKWARD, plan.backward)):
        _verify_visits(plan, way, steps)
        _verify_parcels(plan, way, steps)
    if plan.window is not None:
        plan.window.verify()


def _verify_visits(plan: Wavefront, way: Way, steps: Sequence[WaveStep]) -> None:
    """Every block once, in the order of the pass, each no earlier than the wave can be here."""
    chain, order = _order(plan.size, len(plan.blocks), way)
    visited = [step.block for step in steps if step.block is not None]
    if visited != order:
        raise PlanError(f"Rank {plan.rank}, {way.name}: works on the blocks {visited}, not on {order}.")
    late = [step.number for step in steps if step.block is not None]
    if late != [nth + chain.index(plan.rank) for nth in range(len(order))]:
        raise PlanError(f"Rank {plan.rank}, {way.name}: works in the steps {late}, which is not the wavefront.")


def _verify_parcels(plan: Wavefront, way: Way, steps: Sequence[WaveStep]) -> None:
    """What a block needs has come by then; what comes of it leaves after it; everything once, nothing else."""
    chain, order = _order(plan.size, len(plan.blocks), way)
    place, rank = chain.index(plan.rank), plan.rank
    homes = [block.home for block in plan.blocks]
    needs = way.handed if place else way.brought
    source = {block: chain[place - 1] if place else homes[block] for block in order}
    if place < plan.size - 1:
        leaving = {Parcel(chain[place + 1], what, block) for block in order for what in way.handed}
    else:
        leaving = {Parcel(homes[block], way.result, block) for block in order}
    coming = {Parcel(source[block], what, block) for block in order for what in needs}
    ended = {Parcel(chain[-1], way.result, block) for block in order if homes[block] == rank}
    begun = {Parcel(chain[0], what, block) for block in order if homes[block] == rank for what in way.brought}
    done, have = set[int](), set[Parcel]()
    for step in steps:
        early = [x for x in step.sends if x in leaving and x.block not in done]
        if early:
            raise PlanError(f"Rank {rank}, {way.name}, step {step.number}: sends {early[0]} before it is computed.")
        have |= {*step.receives}
        if step.block is not None:
            asked = {Parcel(source[step.block], what, step.block) for what in needs}
            missing = {x for x in asked if x.peer != rank} - have
            if missing:
                raise PlanError(f"Rank {rank}, {way.name}, step {step.number}: works without {min(missing)}.")
            done.add(step.block)
    for side, expected in (("sends", [*leaving, *begun]), ("receives", [*coming, *ended])):
        found = sorted(x for step in steps for x in getattr(step, side))
        wanted = sorted(x for x in expected if x.peer != rank)
        if found != wanted:
            wrong = sorted({*found} ^ {*wanted}) or found
            raise PlanError(f"Rank {rank}, {way.name}: {side} {len(found)} parcels, not {len(wanted)}; see {wrong[0]}.")
