"""The schedule contract: in which phase each pair of ranks meets, and what moves for it.

A schedule decides for the forward pass only; the backward pass is the plan's transpose. To add one, write one file
here with `phases`, `moves` and `received_tokens`, and its line in ``ringattn/__init__.py``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar

from ringattn.bands import Array
from ringattn.checking import shown
from ringattn.errors import InputError
from ringattn.mechanisms.base import Mechanism
from ringattn.payloads.base import Payload
from ringattn.payloads.keys import Keys
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.shape import GradientWire


class Scheme(ABC):
    """Whatever may be asked for as the schedule of a call, an immutable value: a `Schedule`, or one of another form."""

    @classmethod
    def serves(cls, mechanism: Mechanism) -> bool:  # noqa: ARG003 (most serve all)
        """Whether some call of the mechanism may go by it."""
        return True

    @property
    def asks_for_nodes(self) -> bool:
        """Whether it is for meshes that know which ranks share a node."""
        return False

    @abstractmethod
    def __str__(self) -> str:
        """Its name."""


@dataclasses.dataclass(frozen=True)
class Schedule(Scheme):
    """Keys, or what stands for them, travel to queries along one axis of ranks.

    Attributes:
        lookahead: 1 starts the exchange of the next phase before this phase's tiles are computed; 0 waits for it
            first, which saves nothing and is there to measure against.
        gradient_wire: the dtype in which gradients of keys and values travel: ``float32`` (float64 for float64
            inputs), or ``input`` for the inputs' own, half the bytes of bfloat16 at an error of 2^-9 a contribution.
    """

    payload: ClassVar[Payload] = Keys()
    """What travels."""

    lookahead: int = 1
    gradient_wire: GradientWire = "float32"

    @classmethod
    def serves(cls, mechanism: Mechanism) -> bool:
        return cls.payload.refusal(mechanism) is None

    def __post_init__(self) -> None:
        if isinstance(self.lookahead, bool) or not isinstance(self.lookahead, int) or self.lookahead not in (0, 1):
            raise InputError(f"lookahead is 0 or 1 phases; got {shown(self.lookahead)}.")
        check_wire(self.gradient_wire)

    def refusal(self, demand: Demand) -> str | None:
        """Why the schedule cannot serve a mask and sharding, in words; None when it can."""
        return None

    @property
    def head_slices(self) -> int:
        """Into how many slices of key heads what travels is cut, whose plans are one in phases of their own."""
        return 1

    def for_heads(self, kv_heads: int) -> Schedule:
        """The same for so many key heads."""
        return self

    @abstractmethod
    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        """The phase in which each of these ranks' queries meets the keys of the other; 0 for a rank's own.

        Args:
            q_ranks, k_ranks: ranks, ``[n]`` each, elementwise.
        """

    @abstractmethod
    def moves(self, demand: Demand, rank: int) -> Moves:
        """What one rank receives and sends in each phase."""

    @abstractmethod
    def received_tokens(self, requested: Array, size: int) -> int:
        """Key positions of some owners that all ranks together receive.

        Args:
            requested: all key rows of these owners that queries use: ``(q_rank, k_rank, start, stop)``.
            size: ranks that share the sequence.
        """


def check_wire(wire: object) -> None:
    """Raises InputError where this is no dtype in which gradients could travel."""
    if not isinstance(wire, str) or wire not in ("float32", "input"):
        raise InputError(f"gradient_wire is 'float32' or 'input'; got {shown(wire)}.")
