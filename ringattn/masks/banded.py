"""The masks made of bands: closed formulas in positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set
from typing import Any, ClassVar

import numpy as np
import torch

from ringattn import bands
from ringattn.bands import INF, Regions
from ringattn.checking import shown, tokens
from ringattn.errors import InputError
from ringattn.masks.base import Allowed, Mask, Positions, Side


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every pair is allowed."""

    spelled: ClassVar[str] = "full"

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, k_length, -INF, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return np.broadcast_to(np.True_, np.broadcast_shapes(q.shape, k.shape))


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query attends to keys at its own position and before: ``k <= q``."""

    spelled: ClassVar[str] = "causal"

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, k_length, 0, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return k <= q


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A sliding window: ``q - left <= k <= q + right``, flash attention's ``window_size``.

    A Hugging Face ``sliding_window`` of w tokens is ``Window(w - 1)``. For a side without limit, combine with
    nothing: ``Causal()`` is the window without limit to the left.
    """

    spelled: ClassVar[str] = "window"
    arguments: ClassVar[str] = "LEFT[,RIGHT]"

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        tokens(self.left, "Window's left")
        tokens(self.right, "Window's right")

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, k_length, -self.right, self.left)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return (q - self.left <= k) & (k <= q + self.right)

    def __str__(self) -> str:
        return f"{self.spelled}:{self.left}" + (f",{self.right}" if self.right else "")


def _counts(lengths: Any, name: str) -> tuple[int, ...]:
    """Numbers of tokens, from anything that has an order."""
    try:
        listed = lengths.tolist() if isinstance(lengths, (torch.Tensor, np.ndarray)) else lengths
        if not isinstance(listed, Iterable) or isinstance(listed, (str, bytes, Mapping, Set)):
            raise TypeError("it has no order")
    except Exception as error:  # a tensor without data has one of its own
        raise InputError(f"Documents takes a list of lengths; got {shown(lengths)} as {name}: {error}.") from error
    return tuple(tokens(n, "A document's length") for n in listed)


@dataclasses.dataclass(frozen=True, init=False)
class Documents(Mask):
    """Packed documents: a query attends to the keys of its own document.

    ``lengths`` must sum to the sequence's length. With ``kv_lengths``, document i's keys are the i-th run of a
    key sequence of another length (packed cross-attention).
    """

    spelled: ClassVar[str] = "documents"
    arguments: ClassVar[str] = "N,N,…[/KV,KV,…]"

    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]

    def __init__(self, lengths: Any, kv_lengths: Any = None) -> None:
        own = _counts(lengths, "lengths")
        other = own if kv_lengths is None else _counts(kv_lengths, "kv_lengths")
        if len(own) != len(other):
            raise InputError(f"Documents needs as many kv_lengths as lengths; got {len(other)} and {len(own)}.")
        object.__setattr__(self, "lengths", own)
        object.__setattr__(self, "kv_lengths", other)

    def regions(self, q_length: int, k_length: int) -> Regions:
        q, k = self._edges(self.lengths), self._edges(self.kv_lengths)
        for edges, length, what in ((q, q_length, "query"), (k, k_length, "key")):
            if edges[-1] != length:
                raise InputError(
                    f"Documents' lengths must sum to the {what} sequence's length; they sum to {edges[-1]}, the "
                    f"sequence has {length}. Add a last document for the remaining tokens, or correct the lengths."
                )
        rows = np.empty((len(q) - 1, 6), dtype=np.int64)
        rows.T[:] = np.broadcast_arrays(q[:-1], q[1:], k[:-1], k[1:], -INF, INF)
        return bands.tighten(rows)[0]

    def allows(self, q: Positions, k: Positions) -> Allowed:
        own, other = self._edges(self.lengths), self._edges(self.kv_lengths)
        return np.asarray(np.searchsorted(own, q, side="right") == np.searchsorted(other, k, side="right"))

    @classmethod
    def from_text(cls, text: str) -> Documents:
        return cls(*([int(n) for n in group.split(",") if n or group] for group in text.split("/", 1)))

    @property
    def extents(self) -> tuple[int, int]:
        return sum(self.lengths), sum(self.kv_lengths)

    def local(self, positions: Positions, side: Side) -> Positions:
        edges = self._edges(self.lengths if side == "queries" else self.kv_lengths)
        return positions - edges[np.searchsorted(edges, positions, side="right") - 1]

    @staticmethod
    def _edges(lengths: tuple[int, ...]) -> Positions:
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __str__(self) -> str:
        own = "documents:" + ",".join(map(str, self.lengths))
        return own if self.lengths == self.kv_lengths else own + "/" + ",".join(map(str, self.kv_lengths))


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Every query attends to the first ``n`` keys. ``Prefix(n) | Causal()`` is the prefix-LM mask."""

    spelled: ClassVar[str] = "prefix"
    arguments: ClassVar[str] = "N"

    n: int

    def __post_init__(self) -> None:
        tokens(self.n, "Prefix's n")

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, min(self.n, k_length), -INF, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return np.broadcast_to(k < self.n, np.broadcast_shapes(q.shape, k.shape))


@dataclasses.dataclass(frozen=True)
class SinkTokens(Mask):
    """The first ``n`` keys, causally: ``Window(w) | SinkTokens(4)`` is StreamingLLM's mask (arXiv 2309.17453)."""

    spelled: ClassVar[str] = "sinks"
    arguments: ClassVar[str] = "N"

    n: int

    def __post_init__(self) -> None:
        tokens(self.n, "SinkTokens' n")

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, min(self.n, k_length), 0, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return (k < self.n) & (k <= q)
