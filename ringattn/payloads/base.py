"""The cargo contract: what travels forward to be attended to, and how its gradients travel home.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch

from ringattn.mechanisms.base import OutputGrad, Params, Problem, State
from ringattn.plans.steps import Exchange, Step
from ringattn.transports.base import Message


class Traveller(ABC):
    """What has messages in exchanges."""

    @abstractmethod
    def sends(self, exchange: Exchange) -> list[Message]:
        """What leaves in this exchange."""

    @abstractmethod
    def receives(self, exchange: Exchange) -> list[Message]:
        """Where what arrives in it goes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """The query side of a backward pass; ``dq`` and ``dparams`` are accumulators."""

    q: torch.Tensor
    output_grad: OutputGrad
    dq: torch.Tensor
    dparams: Params


class Gradients(Traveller):
    """The gradients of a cargo, accumulated where it was attended to and sent home.

    Attributes:
        own: the gradients of this rank's keys and values, accumulated.
    """

    def __init__(self, problem: Problem, length: int) -> None:
        dk, dv = (problem.rows(problem.kv_heads, length, dim) for dim in (problem.dim, problem.value_dim))
        self.own = dk, dv

    @abstractmethod
    def compute(self, step: Step, queries: Queries) -> None:
        """Adds what the step's tiles contribute to every gradient."""

    @abstractmethod
    def add_arrived(self, exchange: Exchange) -> None:
        """Adds what came home to this rank's own gradients, in the order of the exchange's items."""


class Cargo(Traveller):
    """Keys and values, or what stands for them."""

    @abstractmethod
    def compute(self, step: Step, q: torch.Tensor, state: State | None) -> State:
        """Merges what the step's tiles contribute into the state, or makes one where there is none yet."""

    @abstractmethod
    def gradients(self) -> Gradients:
        """The accumulators of a backward pass over this cargo."""
