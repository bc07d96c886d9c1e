"""The masks made of blocks: given as a bitmap, or found by asking a function."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from ringattn import bands
from ringattn.bands import INF, Regions
from ringattn.checking import shown, tokens
from ringattn.errors import InputError, UnsupportedError
from ringattn.masks.base import Allowed, Mask, Positions

MAX_EVALUATED = 32_768  # tokens of a sequence that a predicate is asked about: a thousand million pairs
BLOCK = 256  # queries and keys of a block of them


@dataclasses.dataclass(frozen=True, init=False)
class Blocks(Mask):
    """Block-sparse attention: block (i, j) of ``size`` queries and keys is allowed where ``bitmap[i, j]`` is.

    ``bitmap`` is a boolean matrix with a row for every ``size`` queries and a column for every ``size`` keys; the last
    ones may be cut short by the sequence's end.

    >>> Blocks([[1, 0], [1, 1]], 2).dense(range(3), range(3)).int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    spelled: ClassVar[str] = "blocks"
    arguments: ClassVar[str] = "SIZE/ROW/ROW/… of 0s and 1s"

    shape: tuple[int, int]
    size: int
    bits: bytes = dataclasses.field(repr=False)

    def __init__(self, bitmap: Any, size: int) -> None:
        try:
            grid = np.asarray(bitmap.detach().cpu().bool() if isinstance(bitmap, torch.Tensor) else bitmap)
        except Exception as error:  # whatever arrays and tensors raise
            raise InputError(f"Blocks needs a matrix of booleans, all rows of one length: {error}") from error
        if grid.ndim != 2 or not (grid.dtype == np.bool_ or np.isin(grid, (0, 1)).all()):
            raise InputError(f"Blocks needs a matrix of booleans; got {grid.dtype} of shape {list(grid.shape)}.")
        size = tokens(size, "Blocks' size", least=1)
        for name, value in (
            ("shape", grid.shape),
            ("size", size),
            ("bits", np.packbits(grid.astype(bool)).tobytes()),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_text(cls, text: str) -> Blocks:
        size, *rows = text.split("/")
        return cls([[int(cell) for cell in row] for row in rows], int(size))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def extents(self) -> tuple[int, int]:
        return self.shape[0] * self.size, self.shape[1] * self.size

    @functools.cached_property
    def bitmap(self) -> Allowed:
        """The boolean matrix."""
        flat = np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.shape[0] * self.shape[1])
        return flat.astype(bool).reshape(self.shape)

    def regions(self, q_length: int, k_length: int) -> Regions:
        needed = -(-q_length // self.size), -(-k_length // self.size)
        if self.shape != needed:
            raise InputError(
                f"Blocks of {self.size} tokens need a bitmap of {needed[0]} x {needed[1]} for {q_length} queries and "
                f"{k_length} keys; got {self.shape[0]} x {self.shape[1]}."
            )
        return _rectangles(self.bitmap, self.size, q_length, k_length)

    def allows(self, q: Positions, k: Positions) -> Allowed:
        q, k = self.within(q, "queries"), self.within(k, "keys")  # a negative index would read from behind
        allowed: Allowed = self.bitmap[q // self.size, k // self.size]
        return allowed

    def __str__(self) -> str:
        if len(self.bits) > 64:
            digest = hashlib.blake2b(self.bits, digest_size=8).hexdigest()
            return f"blocks:{self.size},{self.shape[0]}x{self.shape[1]}#{digest}"
        rows = ("".join("01"[cell] for cell in row) for row in self.bitmap.astype(int).tolist())
        return "/".join((f"blocks:{self.size}", *rows))


@dataclasses.dataclass(frozen=True)
class Predicate(Mask):
    """The pairs for which a function says so, in sequences of at most 32,768 tokens.

    ``fn(q, k)`` gets int64 tensors of global positions, ``[M, 1]`` and ``[1, N]``, and returns the boolean ``[M, N]``.
    It must be a pure function and the same on every rank. It is asked for every pair when a plan is made, which finds
    blocks that are allowed as a whole or not at all; only of the others are pairs asked for again when they are
    attended to, by the reference kernel. Whatever bands or `Blocks` can say, they say without all that.

    >>> Predicate(lambda q, k: (q - k) % 2 == 0).dense(range(3), range(3)).int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    _classified: dict[tuple[int, int], tuple[Regions, Regions]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    has_partial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise InputError(f"Predicate needs a function of query and key positions; got {shown(self.fn)}.")
        try:
            hash(self.fn)
        except TypeError as error:
            raise InputError(f"Predicate's function must be hashable, as plans are kept by mask: {error}.") from error

    def regions(self, q_length: int, k_length: int) -> Regions:
        return self.classify(q_length, k_length)[0]

    def allows(self, q: Positions, k: Positions) -> Allowed:
        try:
            found = self.fn(torch.from_numpy(np.ascontiguousarray(q)), torch.from_numpy(np.ascontiguousarray(k)))
        except Exception as error:
            raise InputError(f"{self}'s function failed on int64 positions: {type(error).__name__}: {error}") from error
        if not isinstance(found, torch.Tensor) or found.dtype != torch.bool:
            what = f"a tensor of {found.dtype}" if isinstance(found, torch.Tensor) else repr(found)
            raise InputError(f"{self}'s function must return a boolean tensor; it returned {what}.")
        try:
            return np.broadcast_to(found.cpu().numpy(), np.broadcast_shapes(q.shape, k.shape)).copy()
        except ValueError as error:
            shape = list(found.shape)
            raise InputError(f"{self}'s function must return a value a pair; it returned shape {shape}.") from error

    def classify(self, q_length: int, k_length: int) -> tuple[Regions, Regions]:
        """What is allowed block by block, and the blocks that hold both kinds of pairs."""
        if max(q_length, k_length) > MAX_EVALUATED:
            raise UnsupportedError(
                f"A Predicate is asked for every pair, so it takes sequences of at most {MAX_EVALUATED} tokens; got "
                f"{q_length} queries and {k_length} keys. Say the same with bands (Window, Documents, …) or Blocks."
            )
        key = q_length, k_length
        if key not in self._classified:
            edges = np.arange(0, k_length, BLOCK)
            some, every = (np.zeros((-(-q_length // BLOCK), len(edges)), dtype=bool) for _ in range(2))
            k = np.arange(k_length)[None, :]
            for row, first in enumerate(range(0, q_length if k_length else 0, BLOCK)):
                allowed = self.allows(np.arange(first, min(first + BLOCK, q_length))[:, None], k)
                some[row] = np.logical_or.reduceat(allowed.any(axis=0), edges)
                every[row] = np.logical_and.reduceat(allowed.all(axis=0), edges)
            kinds = every, some & ~every
            self._classified[key] = tuple(_rectangles(kind, BLOCK, *key) for kind in kinds)  # type: ignore[assignment]
        return self._classified[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"fn": self.fn, "_classified": {}}

    def __str__(self) -> str:
        return f"predicate:{getattr(self.fn, '__qualname__', type(self.fn).__qualname__)}"


def _rectangles(grid: Allowed, size: int, q_length: int, k_length: int) -> Regions:
    """Regions of the true blocks of a grid: a row's neighbours are joined, and rows that are alike."""
    differs = np.concatenate([[True], (grid[1:] != grid[:-1]).any(axis=1)])[: len(grid)]
    top = np.flatnonzero(differs)
    bottom = np.append(top[1:], len(grid))
    change = np.diff(np.pad(grid[top].astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (row, left), (_, right) = np.nonzero(change == 1), np.nonzero(change == -1)
    q0, q1, k0, k1 = (
        np.minimum(x * size, n)
        for x, n in zip((top[row], bottom[row], left, right), (q_length, q_length, k_length, k_length), strict=True)
    )
    far = np.full(len(row), INF)
    return bands.tighten(np.stack([q0, q1, k0, k1, -far, far], axis=1))[0]
