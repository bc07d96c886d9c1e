"""What is measured: shapes, masks and their inputs, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ringattn import conformance, masks
from ringattn.readable import dtype_name


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
        return f"{dtype_name(self.dtype)} {'forward+backward' if self.backward else 'forward'}"

    @cached_property
    def call(self) -> conformance.Case:
        """The attention call: what it is given, and what must come out."""
        return conformance.Case(
            length=self.length,
            mask=masks.parse(self.mask_name),
            kv_heads=self.heads,
            dim=self.dim,
            value_dim=self.dim,
            dtype=self.dtype,
            seed=self.length,
            backward=self.backward,
        )

    @property
    def mask(self) -> masks.Mask:
        return self.call.mask

    def rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Rows start to stop of the boolean mask [stop − start, length]."""
        return self.call.rows(start, stop)

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of the output, [1, heads, length, dim], rounded to the dtype."""
        return list(self.call.inputs()[:4])


def documents(count: int, length: int, seed: int = 0) -> list[int]:
    """`count` heavy-tailed document lengths (Pareto, exponent 1.1) that fill `length` tokens."""
    weights = 1.0 + np.random.default_rng(seed).pareto(1.1, count)
    lengths = np.maximum(1, (weights / weights.sum() * length).astype(int))
    lengths[np.argmax(lengths)] += length - lengths.sum()
    return [int(n) for n in lengths]


GENERATORS = ("pareto", "lognormal", "giant")


def packed(generator: str, length: int, seed: int) -> list[int]:
    """Lengths of packed documents, drawn until they fill `length` tokens, the last one cut, then shuffled.

    Args:
        generator: ``pareto``, heavy-tailed with exponent 1.1 from 256 tokens up to a quarter of all; ``lognormal``, of
            median 2,000; ``giant``, one document of half of all, and lognormal ones of median 1,000.
        length: tokens in all.
        seed: of all draws, the shuffle's too.
    """
    rng = np.random.default_rng(seed)
    lengths = [length // 2] if generator == "giant" else []
    while sum(lengths) < length:
        if generator == "pareto":
            drawn = min(256 * (1 + rng.pareto(1.1)), length / 4)
        else:
            median, sigma = (2000, 1.6) if generator == "lognormal" else (1000, 1.0)
            drawn = np.clip(rng.lognormal(np.log(median), sigma), 32, length)
        lengths.append(min(int(drawn), length - sum(lengths)))
    rng.shuffle(lengths)
    return lengths


def prefixed(lengths: list[int]) -> masks.Mask:
    """Causal documents, each of which also sees its own first quarter from every token.

    That quarter is the first of two runs of keys a document; the second one is paired with no queries.
    """
    quarters = [n // 4 for n in lengths]
    queries = [n for length in lengths for n in (length, 0)]
    keys = [n for length, quarter in zip(lengths, quarters, strict=True) for n in (quarter, length - quarter)]
    return (masks.Documents(lengths) & masks.Causal()) | masks.Documents(queries, keys)
