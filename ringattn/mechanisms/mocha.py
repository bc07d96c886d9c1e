"""Monotonic chunkwise attention (Chiu and Raffel, arXiv 1712.05382): softmax over the keys where a search stops.

With a the expected monotonic alignment (see `ordered`) and u a second energy, equations 10 to 23 give

    out_i = sum_n a_in sum_l softmax(u_i,n-w+1 .. u_in)_l v_l        l from n - w + 1 to n, from 0 at the start

so that the weight of value l gathers what the w searches give that stop at l or up to w - 1 keys behind it. The
softmaxes are taken as they stand, each against the largest energy of its own window: nothing overflows, and energies
that differ by thousands cost no digits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from ringattn.checking import finite, integer
from ringattn.errors import InputError
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.ordered import Ordered, over_heads, over_rows


@dataclasses.dataclass(frozen=True, eq=False)
class MoChA(Ordered):
    """Soft attention over the ``width`` keys that end where a monotonic search stops; time grows with the width.

    The paper's two energies are two dot products: give queries and keys dims for both, one behind the other, and say by
    ``chunk_dim`` how many of them, from the last on, make the second. With 0, one product makes both.

    Attributes:
        width: keys of a window, 1 or more; 1 is `Monotonic`.
        chunk_dim: how many of the dims of queries and keys make the chunk energies, and those alone.
        chunk_scale: of the chunk energies; None for 1 / sqrt of the dims that make them.
    """

    width: int = 2
    chunk_dim: int = 0
    chunk_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "width", integer(self.width, "MoChA's width", least=1, needed="a number of keys"))
        object.__setattr__(self, "chunk_dim", integer(self.chunk_dim, "MoChA's chunk_dim", needed="a number of dims"))
        if self.chunk_scale is not None:
            object.__setattr__(self, "chunk_scale", finite(self.chunk_scale, "MoChA's chunk_scale"))

    def check(self, problem: Problem, queries: int, keys: int) -> None:
        super().check(problem, queries, keys)
        if self.chunk_dim >= problem.dim:
            raise InputError(
                f"MoChA's chunk_dim leaves some of the {problem.dim} dims of queries and keys to the monotonic "
                f"energies; got {self.chunk_dim}."
            )

    @property
    def reach(self) -> int:
        return self.width - 1

    def monotonic_dims(self, problem: Problem) -> int:
        return problem.dim - self.chunk_dim

    def spread(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, alignment: torch.Tensor) -> torch.Tensor:
        energies = self._chunk_energies(problem, q, k)
        weights = torch.zeros_like(energies)
        for ends, keys, share in self._shares(energies, alignment.shape[3]):
            weights[..., keys] += alignment[..., ends] * share
        return weights

    def spread_grad(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, alignment: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        energies = self._chunk_energies(problem, q, k)
        dalignment, denergies = torch.zeros_like(alignment), torch.zeros_like(energies)
        for ends, keys, share in self._shares(energies, alignment.shape[3]):
            dalignment[..., ends] += share * grad[..., keys]
        for ends, keys, share in self._shares(energies, alignment.shape[3]):
            denergies[..., keys] += alignment[..., ends] * share * (grad[..., keys] - dalignment[..., ends])
        dims, scale = self._chunk_dims(problem), self._scale_of_chunks(problem)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        dq[..., -dims:] = over_heads(denergies, k[..., -dims:]) * scale
        dk[..., -dims:] = over_rows(denergies, q[..., -dims:], problem.kv_heads) * scale
        return dalignment, dq, dk

    def _chunk_energies(self, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """``[B, Hq, M, R + N]``."""
        dims = self._chunk_dims(problem)
        return over_heads(q[..., -dims:], k[..., -dims:].transpose(-1, -2)) * self._scale_of_chunks(problem)

    def _shares(self, energies: torch.Tensor, ends: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """For each place in the windows: the keys at which windows end, those at that place, and their softmax."""
        places = list(self._places(energies.shape[3], ends))
        most = energies.new_full((*energies.shape[:3], ends), -math.inf)
        for at, keys in places:
            most[..., at] = torch.maximum(most[..., at], energies[..., keys])
        total = torch.zeros_like(most)
        for at, keys in places:
            total[..., at] += torch.exp(energies[..., keys] - most[..., at])
        for at, keys in places:
            yield at, keys, torch.exp(energies[..., keys] - most[..., at]) / total[..., at]

    def _places(self, keys: int, ends: int) -> Iterator[tuple[slice, slice]]:
        """By how far a key lies before the end of its window: those ends that have one, and these keys."""
        before = keys - ends
        for distance in range(min(self.width, keys)):
            first = max(0, distance - before)
            yield slice(first, ends), slice(before + first - distance, keys - distance)

    def _chunk_dims(self, problem: Problem) -> int:
        return self.chunk_dim or problem.dim

    def _scale_of_chunks(self, problem: Problem) -> float:
        return 1 / math.sqrt(self._chunk_dims(problem)) if self.chunk_scale is None else self.chunk_scale
