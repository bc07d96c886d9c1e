"""The payload contract: what travels between ranks to be attended to, and what becomes of its gradients.

Whatever travels is rows ``[rows, B, Hkv, size]`` of a buffer. A plan says which rows go where, `runtime.messages` finds
them, and the engine moves them; what queries attend to makes rows of its rank's own keys, attends to rows that arrived,
and adds the gradients of its own rows that come back. To add one, write one file here and name it in a schedule.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ringattn.kernels.base import Kernel
from ringattn.mechanisms.base import Mechanism, OutputGrad, Params, Problem, State
from ringattn.plans.tiles import Tiles

Rows = npt.NDArray[np.int64]
Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, or their gradients."""


class Heads(Protocol):
    """What the size of a row depends on."""

    @property
    def dim(self) -> int: ...

    @property
    def value_dim(self) -> int: ...

    @property
    def summary(self) -> int | None: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Parcel:
    """Some of a rank's own keys, or their gradients, as they travel in one message.

    Attributes:
        spans: half-open ranges of the rank's keys, in the order they travel.
        rows: what stands for them, part of a buffer.
        slice: of which slice of heads.
    """

    spans: list[tuple[int, int]]
    rows: torch.Tensor
    slice: int = 0


@dataclasses.dataclass(frozen=True)
class Wire:
    """Bytes of one row as it travels, all heads.

    Attributes:
        there, back: in the forward pass; 0 where nothing comes back.
        backward_there, backward_back: in the backward pass.
        held: of what comes back, while it is made.
    """

    there: int
    back: int
    backward_there: int
    backward_back: int
    held: int


@dataclasses.dataclass(frozen=True)
class Payload(ABC):
    """An immutable value.

    Attributes:
        name: what travels, in a word.
        unit: what it is counted in.
        per_key: whether a row is one position; otherwise one row stands for a whole range of keys.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    per_key: ClassVar[bool]

    def rows(self, start: Rows, stop: Rows) -> Rows:
        """How many rows stand for each range of positions."""
        return stop - start if self.per_key else np.ones_like(start)

    def refusal(self, mechanism: Mechanism) -> str | None:
        """Why the mechanism cannot do with it, in words; None when it can."""
        return None


class Attended(Payload):
    """What travels to the queries and is attended to there, and whose gradients return.

    Attributes:
        accumulated: whether it travels in the accumulator's dtype, not the inputs'.
    """

    accumulated: ClassVar[bool]

    @abstractmethod
    def size(self, heads: Heads) -> int:
        """Numbers of one key head in a row.

        Raises:
            InputError: that depends on a mechanism which nobody named.
        """

    @abstractmethod
    def pack(self, problem: Problem, own: Pair, parcels: Sequence[Parcel]) -> None:
        """Writes the rows of all parcels that leave in one exchange, from this rank's keys and values."""

    @abstractmethod
    def attend(
        self, problem: Problem, kernel: Kernel, q: torch.Tensor, rows: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        """Merges what the tiles contribute over rows that arrived into the state, or makes one."""

    @abstractmethod
    def attend_grad(
        self,
        problem: Problem,
        kernel: Kernel,
        q: torch.Tensor,
        rows: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        dq: torch.Tensor,
        drows: torch.Tensor,
        dparams: Params,
    ) -> None:
        """Adds what the tiles contribute to the gradients of the queries, the rows and the params."""

    @abstractmethod
    def unpack_grad(self, problem: Problem, own: Pair, parcels: Sequence[Parcel], grads: Pair) -> None:
        """Adds the gradients of own rows that came back in one exchange to those of the keys and values."""
