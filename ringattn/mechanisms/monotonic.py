"""Monotonic attention: the output is the value at which the search of a row stops, in expectation (see `ordered`).

Soft and exact, as it is trained: Raffel et al., arXiv 1704.00784; with many heads, each of which searches for itself,
Ma et al., arXiv 1909.12406. A search that stops at no key gives nothing, so that weights sum to 1 or less.
"""

from __future__ import annotations

import dataclasses

import torch

from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.ordered import Ordered


@dataclasses.dataclass(frozen=True, eq=False)
class Monotonic(Ordered):
    """The value where a search over the keys is expected to stop, which begins where that of the row before stopped.

    Fields as `Ordered` has them.
    """

    @property
    def reach(self) -> int:
        return 0

    def monotonic_dims(self, problem: Problem) -> int:
        return problem.dim

    def spread(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, alignment: torch.Tensor) -> torch.Tensor:
        return alignment

    def spread_grad(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, alignment: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return grad, torch.zeros_like(q), torch.zeros_like(k)
