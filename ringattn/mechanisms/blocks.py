"""Which pairs a block of queries and keys is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch


def rows_at(at: slice) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes these rows, dim 2, of a tensor."""
    return lambda x: x[:, :, at]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Which pairs a block is of.

    Attributes:
        queries: rows of this rank's queries.
        q_at, k_at: the global positions of the block's queries and keys, both ascending.
        allowed: bool ``[M, N]``; None when every pair is.
    """

    queries: slice
    q_at: slice
    k_at: slice
    allowed: torch.Tensor | None = None

    def q_positions(self, device: torch.device) -> torch.Tensor:
        """Int64 ``[M]``."""
        return torch.arange(self.q_at.start, self.q_at.stop, self.q_at.step, device=device)

    def k_positions(self, device: torch.device) -> torch.Tensor:
        """Int64 ``[N]``."""
        return torch.arange(self.k_at.start, self.k_at.stop, self.k_at.step, device=device)
