"""The kernel contract: all the tiles of a step, into the state.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]`` are a rank's queries and one buffer of
keys and values, in any strides but the last, which is 1. Tiles index their dim 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ringattn.mechanisms.base import OutputGrad, Params, Problem, State
from ringattn.naming import name_of
from ringattn.plans.tiles import Tiles


class Kernel(ABC):
    """Computes tiles. Stateless; what it works out about tiles it keeps with them (`Tiles.memo`).

    Attributes:
        version: another number where the kernel's speed has changed, so that it is measured again.
    """

    version: ClassVar[int] = 1

    def __str__(self) -> str:
        """The kernel's name."""
        return name_of(type(self))

    @abstractmethod
    def supports(self, problem: Problem) -> bool:
        """Whether the kernel is written for this mechanism on this kind of device."""

    @abstractmethod
    def refusal(self, problem: Problem) -> str | None:
        """What of the problem the kernel cannot do, in words; None when it can.

        A kernel that is written for one mechanism lists the fields it knows and refuses what is `beyond` them, so that
        a term which the mechanism learns later is never dropped without a word.
        """

    @abstractmethod
    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        """Merges what the tiles contribute into the state, in place, or makes one where there is none yet."""

    @abstractmethod
    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dparams: Params,
    ) -> None:
        """Adds what the tiles contribute to the gradients of q, k, v (accumulators of their shapes) and the params.

        Those that `Problem.wants` says nobody asked for are left alone, and what only they need is not computed.
        """
