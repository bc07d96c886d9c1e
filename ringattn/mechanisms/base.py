"""The mechanism contract: a state, its merge, and the gradient of one block.

Shapes: B batch, Hq query heads, Hkv key heads (Hq a multiple of it), M queries and N keys of a block, D dims of a
query or key head, Dv of a value head.

A mechanism's *state* is a tuple of tensors of its own choosing, each with the queries in dim 2. Blocks are computed
in any order and merged; `finish` turns the state into the output and whatever else the backward pass needs. Nobody
but the mechanism, and kernels written for it, knows what a state is.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch

State = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is the same for every block of one call.

    Attributes:
        mechanism: the mechanism.
        batch, heads, kv_heads, dim, value_dim: B, Hq, Hkv, D, Dv.
        dtype, device: the inputs'.
        params: the mechanism's learned tensors.
        seed: for mechanisms that draw random numbers.
    """

    mechanism: Mechanism
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    params: State = ()
    seed: int = 0

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of states and gradient accumulators: float64 for float64 inputs, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def rows(self, heads: int, length: int, dim: int) -> torch.Tensor:
        """Zeros ``[B, heads, length, dim]`` of the accumulator's dtype, stored as [B, length, heads, dim].

        That is how PyTorch's flash kernels return their results, and adding equal strides is the fast case.
        """
        shape = (self.batch, length, heads, dim)
        return torch.zeros(shape, dtype=self.accumulator, device=self.device).transpose(1, 2)


class Mechanism(ABC):
    """An immutable, hashable value; its learned tensors are its `params`."""

    extras: tuple[str, ...] = ()
    """Names of what `finish` saves besides the output, such as ``lse``."""

    @property
    def params(self) -> State:
        """Learned tensors, which get gradients."""
        return ()

    @abstractmethod
    def empty(self, problem: Problem, length: int) -> State:
        """The identity of `merge` for this many queries."""

    @abstractmethod
    def tile(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None
    ) -> State:
        """One block's contribution.

        Args:
            q, k, v: ``[B, Hq, M, D]``, ``[B, Hkv, N, D]``, ``[B, Hkv, N, Dv]``, in the accumulator's dtype.
            allowed: bool ``[M, N]``; None when every pair is.
        """

    @abstractmethod
    def merge(self, into: State, part: State) -> None:
        """Merges ``part`` into ``into``, in place. Associative; `empty` is its identity."""

    @abstractmethod
    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        """The output ``[B, Hq, M, Dv]`` in the inputs' dtype, and the `extras`. May take over the state's tensors."""

    @abstractmethod
    def tile_grad(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        saved: State,
        dout: torch.Tensor,
        dextras: tuple[torch.Tensor | None, ...],
        allowed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]:
        """One block's contribution to the gradients.

        Args:
            saved: the output and the extras, for these queries, over *all* their keys.
            dout, dextras: the gradients that arrive at them; None for an extra nobody used.

        Returns:
            dq ``[B, Hq, M, D]``, dk ``[B, Hkv, N, D]``, dv ``[B, Hkv, N, Dv]``, and the gradients of the params.
        """
