"""A call: everything about an attention call that is known before its tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

from ringattn.handles import number_of
from ringattn.kernels.base import Kernel
from ringattn.mechanisms.base import Problem
from ringattn.payloads.queries import Trip, Trips
from ringattn.plans.deal import Part
from ringattn.plans.passing import PassPlan
from ringattn.plans.plan import Plan
from ringattn.plans.swap import Swap
from ringattn.plans.wave import WavePlan
from ringattn.runtime import agreement, messages
from ringattn.runtime.gathering import Gathering
from ringattn.runtime.messages import Forms, Moves, Passes
from ringattn.transports.base import Transport


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What all ranks have been asked for alike.

    Attributes:
        fields: what they must agree on, for `agreement`.
    """

    problem: Problem
    transport: Transport
    fields: Mapping[str, str]

    def compare(self, name: str, seed: int) -> Callable[[], None]:
        """Compares the call with every other rank's before any payload; what it returns is called after all of it."""
        if not self.transport.agrees:
            return agreement.nothing
        return agreement.begin(self.transport, {**self.fields, "call": name, "seed": str(seed)})

    def returning(self, extras: Sequence[str]) -> Mapping[str, str]:
        """The fields where all ranks must agree on the mechanism's extras that are returned, too."""
        return {**self.fields, "mechanism": " with ".join((self.fields["mechanism"], *extras))}

    def problem_of(self, params: Sequence[torch.Tensor], seed: int) -> Problem:
        """The problem of one pass."""
        if not params and not seed:
            return self.problem
        named = dict(zip(self.problem.mechanism.params, params, strict=True))
        return dataclasses.replace(self.problem, params=named, seed=seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Call(Asked):
    """What is kept from call to call, as long as nothing but the tensors' content changes.

    Attributes:
        wanted: which of q, k, v and the params need gradients.
        spelling: the mechanism as compiled code holds it.
        handle: by which the ops find the call.
    """

    wanted: tuple[bool, ...]
    spelling: tuple[list[float], str]
    handle: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", number_of(self))


@dataclasses.dataclass(frozen=True, eq=False)
class TileCall(Call):
    """A call whose plan brings keys to queries, which are computed in tiles.

    Attributes:
        before: the passes over keys alone that go before it; None for most mechanisms.
        to_queries, to_keys: how keys and queries are gathered where the bits must not depend on the ranks; None where
            they may, or no gradient of keys or values is wanted.
    """

    plan: Plan
    kernel: Kernel
    before: TileCall | None = None
    to_queries: Gathering | None = None
    to_keys: Gathering | None = None

    @property
    def key_passes(self) -> Moves:
        """The exchanges of a pass over keys alone."""
        return self.transport.buffers.views(self, _key_passes)

    @property
    def passes(self) -> Passes:
        """The exchanges of both passes over the transport's buffers."""
        return self.transport.buffers.views(self, _passes)


@dataclasses.dataclass(frozen=True, eq=False)
class PassCall(Call):
    """A call whose plan brings queries to keys.

    Attributes:
        asked: which of the mechanism's extras are returned to the caller, on all ranks alike: others have no gradient.
    """

    plan: PassPlan
    kernel: Kernel
    asked: tuple[int, ...]

    @property
    def tours(self) -> Tours:
        """The exchanges of its passes over the transport's buffers."""
        return self.transport.buffers.views(self, _tours)


@dataclasses.dataclass(frozen=True)
class Tour:
    """A pass in which queries go to the keys, and something of them comes home."""

    trip: Trip
    moves: Moves


@dataclasses.dataclass(frozen=True)
class Tours:
    """The passes of a call; those over keys alone that go `before`, where it has some, the first and the ones after."""

    forward: Tour
    backward: Tour
    before: tuple[Tour, Tour] | None


@dataclasses.dataclass(frozen=True, eq=False)
class UlyssesCall(Call):
    """A call whose heads are dealt to the ranks of a group.

    Attributes:
        swap: what is exchanged before and after.
        parts: by slice, this rank's parts of the heads, each with its call along the ring.
        asked: which of the mechanism's extras are returned to the caller.
        aux: the shapes and dtypes of the extras and of what is kept by query, of this rank's queries and all heads.
    """

    swap: Swap
    parts: tuple[tuple[tuple[Part, Call], ...], ...]
    asked: tuple[int, ...]
    aux: tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class WaveCall(Call):
    """A call whose plan hands blocks of queries from rank to rank."""

    plan: WavePlan


def _tours(call: PassCall) -> Tours:
    trips = Trips.of(call.problem, narrow=call.plan.gradient_wire == "input")
    every = trips.forward, trips.backward, *(trips.before or ())
    forms = [Forms.of_columns(trip.there, trip.back, call.problem) for trip in every]
    moves = messages.round_trips(call.plan.moved, forms, call.transport.buffers)
    forward, backward, *before = itertools.starmap(Tour, zip(every, moves, strict=True))
    return Tours(forward, backward, (before[0], before[1]) if before else None)


def _key_passes(call: TileCall) -> Moves:
    return messages.gathering(call.plan, call.problem, call.transport.buffers)


def _passes(call: TileCall) -> Passes:
    return messages.passes(call.plan, call.problem, call.transport.buffers)
