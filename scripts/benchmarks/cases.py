"""What is measured: shapes, masks and their inputs, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ringattn import masks


@dataclass(frozen=True)
class Case:
    """One cell of the table: q, k, v of [1, heads, length, dim] under a mask, forward with or without backward."""

    mask_name: str  # an expression for ringattn.masks.parse
    length: int
    dtype: torch.dtype
    backward: bool
    heads: int = 4
    dim: int = 64

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {'forward+backward' if self.backward else 'forward'}"

    @cached_property
    def mask(self) -> masks.Mask:
        return masks.parse(self.mask_name)

    def rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Rows start to stop of the boolean mask [stop − start, length]."""
        dense = self.mask.dense(torch.arange(start, stop), torch.arange(self.length))
        return np.asarray(dense)

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output, [1, heads, length, dim], rounded to the dtype."""
        generator = torch.Generator().manual_seed(self.length)
        shape = (1, self.heads, self.length, self.dim)
        return [torch.randn(shape, generator=generator).to(self.dtype) for _ in range(4)]


def documents(count: int, length: int, seed: int = 0) -> list[int]:
    """`count` heavy-tailed document lengths (Pareto, exponent 1.1) that fill `length` tokens."""
    weights = 1.0 + np.random.default_rng(seed).pareto(1.1, count)
    lengths = np.maximum(1, (weights / weights.sum() * length).astype(int))
    lengths[np.argmax(lengths)] += length - lengths.sum()
    return [int(n) for n in lengths]
