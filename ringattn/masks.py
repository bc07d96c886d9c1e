"""The masks: which (query, key) pairs are allowed, in global positions.

A mask is an immutable, hashable value that knows two things: the regions it allows in a sequence of given
lengths (`Mask.regions`, what plans are made of) and whether single pairs are allowed (`Mask.allows`, what tests
compare with). The two are written independently of each other. Masks combine with ``&``, ``|`` and ``~``, and
``str(mask)`` is the spelling that `parse` reads.

To add a mask, write one class here with these two methods and its line in ``ringattn/__init__.py``.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ringattn import bands
from ringattn.bands import INF, Regions
from ringattn.errors import InputError

Positions = npt.NDArray[np.int64]
Allowed = npt.NDArray[np.bool_]


def _positions(positions: Any) -> Positions:
    return np.asarray(positions, dtype=np.int64)


class Mask(ABC):
    """Which query may attend to which key, by global position."""

    @abstractmethod
    def regions(self, q_length: int, k_length: int) -> Regions:
        """Disjoint banded rectangles of the allowed pairs of ``q_length`` queries and ``k_length`` keys.

        Raises:
            InputError: the mask does not fit these lengths.
        """

    @abstractmethod
    def allows(self, q: Positions, k: Positions) -> Allowed:
        """Whether each pair of the (broadcast) positions is allowed."""

    def local(self, positions: Positions) -> Positions:
        """The position of each token within its document; without documents, the position itself."""
        return positions

    def dense(self, q_positions: Any, k_positions: Any) -> torch.Tensor:
        """The boolean matrix ``[len(q_positions), len(k_positions)]``, for tests and small drawings.

        >>> Causal().dense([0, 1, 2], [0, 1, 2]).int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
        """
        q, k = _positions(q_positions)[:, None], _positions(k_positions)[None, :]
        return torch.from_numpy(np.broadcast_to(self.allows(q, k), (q.shape[0], k.shape[1])).copy())

    def local_positions(self, positions: Any) -> torch.Tensor:
        """The position of each token within its document, int64, as rotary embeddings of packed data need it.

        >>> Documents([3, 2]).local_positions([0, 1, 2, 3, 4]).tolist()
        [0, 1, 2, 0, 1]
        """
        return torch.from_numpy(self.local(_positions(positions)).copy())

    def __and__(self, other: Mask) -> Mask:
        return And(self, checked(other))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, checked(other))

    def __invert__(self) -> Mask:
        return Not(self)


def checked(value: object) -> Mask:
    """The mask, or an error where something else was given."""
    if not isinstance(value, Mask):
        raise InputError(f"mask must be a ringattn mask, such as ringattn.Causal(); got {value!r}.")
    return value


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < INF:
        raise InputError(f"{name} is a number of tokens, from 0 to below 2^40; got {value!r}.")
    return int(value)


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every pair is allowed."""

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, k_length, -INF, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return np.broadcast_to(np.True_, np.broadcast_shapes(q.shape, k.shape))

    def __str__(self) -> str:
        return "full"


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query attends to keys at its own position and before: ``k <= q``."""

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, k_length, 0, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return k <= q

    def __str__(self) -> str:
        return "causal"


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A sliding window: ``q - left <= k <= q + right``, flash attention's ``window_size``.

    A Hugging Face ``sliding_window`` of w tokens is ``Window(w - 1)``. For a side without limit, combine with
    nothing: ``Causal()`` is the window without limit to the left.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        _count(self.left, "Window's left")
        _count(self.right, "Window's right")

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, k_length, -self.right, self.left)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return (q - self.left <= k) & (k <= q + self.right)

    def __str__(self) -> str:
        return f"window:{self.left}" + (f",{self.right}" if self.right else "")


@dataclasses.dataclass(frozen=True, init=False)
class Documents(Mask):
    """Packed documents: a query attends to the keys of its own document.

    ``lengths`` must sum to the sequence's length. With ``kv_lengths``, document i's keys are the i-th run of a
    key sequence of another length (packed cross-attention).
    """

    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]

    def __init__(self, lengths: Any, kv_lengths: Any = None) -> None:
        own = tuple(_count(n, "A document's length") for n in lengths)
        other = own if kv_lengths is None else tuple(_count(n, "A document's length") for n in kv_lengths)
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

    def local(self, positions: Positions) -> Positions:
        edges = self._edges(self.lengths)
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

    n: int

    def __post_init__(self) -> None:
        _count(self.n, "Prefix's n")

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, min(self.n, k_length), -INF, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return np.broadcast_to(k < self.n, np.broadcast_shapes(q.shape, k.shape))

    def __str__(self) -> str:
        return f"prefix:{self.n}"


@dataclasses.dataclass(frozen=True)
class SinkTokens(Mask):
    """The first ``n`` keys, causally: ``Window(w) | SinkTokens(4)`` is StreamingLLM's mask (arXiv 2309.17453)."""

    n: int

    def __post_init__(self) -> None:
        _count(self.n, "SinkTokens' n")

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.regions([(0, q_length, 0, min(self.n, k_length), 0, INF)])

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return (k < self.n) & (k <= q)

    def __str__(self) -> str:
        return f"sinks:{self.n}"


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """The pairs that both masks allow."""

    left: Mask
    right: Mask

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.intersect(self.left.regions(q_length, k_length), self.right.regions(q_length, k_length))

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return self.left.allows(q, k) & self.right.allows(q, k)

    def local(self, positions: Positions) -> Positions:
        return np.minimum(self.left.local(positions), self.right.local(positions))

    def __str__(self) -> str:
        return "&".join(f"({side})" if isinstance(side, Or) else str(side) for side in (self.left, self.right))


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """The pairs that either mask allows."""

    left: Mask
    right: Mask

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.union(self.left.regions(q_length, k_length), self.right.regions(q_length, k_length))

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return self.left.allows(q, k) | self.right.allows(q, k)

    def local(self, positions: Positions) -> Positions:
        return np.minimum(self.left.local(positions), self.right.local(positions))

    def __str__(self) -> str:
        return f"{self.left}|{self.right}"


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """The pairs that the mask does not allow."""

    mask: Mask

    def regions(self, q_length: int, k_length: int) -> Regions:
        return bands.complement(self.mask.regions(q_length, k_length), q_length, k_length)

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return ~self.mask.allows(q, k)

    def local(self, positions: Positions) -> Positions:
        return self.mask.local(positions)

    def __str__(self) -> str:
        return f"~({self.mask})" if isinstance(self.mask, (And, Or)) else f"~{self.mask}"


def parse(text: str) -> Mask:
    """The mask written in ``text``: names with numbers, combined by ``&``, ``|``, ``~`` and parentheses.

    >>> str(parse("documents:1500,1,1498 & causal"))
    'documents:1500,1,1498&causal'
    >>> parse("(window:4096|sinks:4)&causal")
    And(left=Or(left=Window(left=4096, right=0), right=SinkTokens(n=4)), right=Causal())
    """
    tokens = re.findall(r"[&|~()]|[^&|~()\s]+", text)
    mask, rest = _parse_or(tokens, text)
    if rest:
        raise InputError(f"A mask ends where {''.join(rest)!r} begins in {text!r}. Combine masks with & or |.")
    return mask


def _parse_or(tokens: list[str], text: str) -> tuple[Mask, list[str]]:
    mask, tokens = _parse_and(tokens, text)
    while tokens[:1] == ["|"]:
        right, tokens = _parse_and(tokens[1:], text)
        mask = mask | right
    return mask, tokens


def _parse_and(tokens: list[str], text: str) -> tuple[Mask, list[str]]:
    mask, tokens = _parse_one(tokens, text)
    while tokens[:1] == ["&"]:
        right, tokens = _parse_one(tokens[1:], text)
        mask = mask & right
    return mask, tokens


def _parse_one(tokens: list[str], text: str) -> tuple[Mask, list[str]]:
    if not tokens:
        raise InputError(f"A mask is missing at the end of {text!r}. {_SPELLINGS}")
    head, rest = tokens[0], tokens[1:]
    if head == "~":
        mask, rest = _parse_one(rest, text)
        return ~mask, rest
    if head == "(":
        mask, rest = _parse_or(rest, text)
        if rest[:1] != [")"]:
            raise InputError(f"A parenthesis is not closed in {text!r}.")
        return mask, rest[1:]
    return _parse_atom(head), rest


_SPELLINGS = (
    "Masks are full, causal, window:LEFT[,RIGHT], documents:N,N,…[/KV,KV,…], prefix:N, sinks:N, "
    "combined by &, |, ~ and parentheses."
)


def _parse_atom(word: str) -> Mask:
    name, _, argument = word.partition(":")
    try:
        groups = [[int(n) for n in group.split(",")] for group in argument.split("/")] if argument else []
        match name, [len(group) for group in groups]:
            case "full", []:
                return Full()
            case "causal", []:
                return Causal()
            case "window", [1 | 2]:
                return Window(*groups[0])
            case "documents", [] | [_] | [_, _]:
                return Documents(*groups) if groups else Documents([])
            case "prefix", [1]:
                return Prefix(*groups[0])
            case "sinks", [1]:
                return SinkTokens(*groups[0])
    except InputError:
        raise
    except ValueError:
        pass
    raise InputError(f"{word!r} is not a mask. {_SPELLINGS}")
