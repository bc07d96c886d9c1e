"""The mask contract, and masks made of masks.

A mask is an immutable, hashable value that knows two things: the regions it allows in a sequence of given lengths
(`Mask.regions`, what plans are made of) and whether single pairs are allowed (`Mask.allows`, what tests compare with).
The two are written independently of each other. Masks combine with ``&``, ``|`` and ``~``, and ``str(mask)`` is the
text that `parse` reads, where the mask has one: a name (`Mask.spelled`) and its numbers (`Mask.arguments`).

A mask that can only be asked pair by pair divides all pairs into three: allowed (`Mask.regions`), *partial*
(`Mask.partial`), and the others. Combinations of such masks follow Kleene's three-valued logic.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from ringattn import bands
from ringattn.bands import Regions
from ringattn.checking import MAX_TOKENS, choice, instance, tokens
from ringattn.checking import positions as checked_positions
from ringattn.errors import InputError
from ringattn.handles import Handled
from ringattn.readable import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Positions = npt.NDArray[np.int64]
Allowed = npt.NDArray[np.bool_]
Side = Literal["queries", "keys"]

ROWS = 256  # queries asked for at once
PIXELS = 600  # positions drawn, a side
MAX_DEPTH = 200  # masks of masks: each level takes some of Python's own stack


class Mask(Handled, ABC):
    """Which query may attend to which key, by global position."""

    spelled: ClassVar[str] = ""
    """The name in texts. A class without one of its own, as outside the package, is spelled ``module:Name``."""

    arguments: ClassVar[str] = ""
    """What follows the name and a colon in texts, for help and errors, such as ``LEFT[,RIGHT]``."""

    @classmethod
    def from_text(cls, text: str) -> Mask:
        """The mask of these arguments, as ``str`` writes them after the name: integers, unless the class says more.

        Raises:
            ValueError, TypeError: they are not those of this mask.
        """
        return cls(*(int(word) for word in text.split(","))) if text else cls()

    @abstractmethod
    def regions(self, q_length: int, k_length: int) -> Regions:
        """Disjoint banded rectangles of the allowed pairs of ``q_length`` queries and ``k_length`` keys.

        Raises:
            InputError: the mask does not fit these lengths.
        """

    @abstractmethod
    def allows(self, q: Positions, k: Positions) -> Allowed:
        """Whether each pair of the (broadcast) positions is allowed."""

    has_partial: ClassVar[bool] = False
    """Whether some pairs can only be known by asking `allows`."""

    def classify(self, q_length: int, k_length: int) -> tuple[Regions, Regions]:
        """`regions` and `partial` together."""
        return self.regions(q_length, k_length), bands.empty()

    def partial(self, q_length: int, k_length: int) -> Regions:
        """Regions apart from `regions` of whose pairs `allows` must be asked: those of predicates."""
        return self.classify(q_length, k_length)[1]

    @property
    def extents(self) -> tuple[int, int]:
        """Queries and keys that the mask knows of: positions are below; without documents or blocks, any are."""
        return MAX_TOKENS, MAX_TOKENS

    def within(self, positions: Positions, side: Side) -> Positions:
        """The positions of queries or keys, unless they are out of the mask's range."""
        end = self.extents[side == "keys"]
        if positions.size and not (positions.min() >= 0 and positions.max() < end):
            wrong = positions.min() if positions.min() < 0 else positions.max()
            what = "key" if side == "keys" else "query"
            raise InputError(f"{shortened(str(self))} ends at {what} position {end}; got {wrong}.")
        return positions

    def local(self, positions: Positions, side: Side) -> Positions:
        """The position of each query or key within its document; without documents, the position itself."""
        return positions

    def row_areas(self, q_length: int, k_length: int) -> Positions:
        """The number of allowed keys of every query, ``[q_length]``."""
        rows = bands.row_areas(self.regions(q_length, k_length), q_length)
        for q, band, allowed in self._evaluated(q_length, k_length):
            rows[q] += (band & allowed).sum(axis=1)
        return rows

    def signature(self, q_length: int, k_length: int) -> str:
        """The mask's text and, where it must be asked, a digest of its answers: equal for equal masks alone."""
        text = str(self)
        if not self.has_partial:
            return text
        h = hashlib.blake2b(digest_size=8)
        for regions in self.classify(q_length, k_length):
            h.update(repr(regions.shape).encode() + np.ascontiguousarray(regions).tobytes())
        for _, band, allowed in self._evaluated(q_length, k_length):
            h.update(np.packbits(band & allowed).tobytes())
        return f"{text}#{h.hexdigest()}"

    def _evaluated(self, q_length: int, k_length: int) -> Iterator[tuple[slice, Allowed, Allowed]]:
        """The partial pairs, some rows at a time: rows, the pairs of the region's band, the pairs allowed."""
        for q0, q1, k0, k1, lo, hi in self.partial(q_length, k_length).tolist():
            k = np.arange(k0, k1)[None, :]
            for first in range(q0, q1, ROWS):
                q = np.arange(first, min(first + ROWS, q1))[:, None]
                yield slice(first, first + len(q)), (lo <= q - k) & (q - k <= hi), self.allows(q, k)

    def describe(self, length: int, kv_length: int | None = None) -> str:
        """The mask in a line, for sequences of these lengths.

        >>> from ringattn.masks import Causal, Window
        >>> (Causal() & Window(2)).describe(8)
        'causal&window:2: 21 of 8 x 8 pairs (32.8 %), 2.62 keys a query'
        """
        length, keys = _lengths(length, kv_length)
        pairs = bands.area(self.regions(length, keys))
        pairs += sum(int((band & allowed).sum()) for _, band, allowed in self._evaluated(length, keys))
        possible = max(length * keys, 1)
        return (
            f"{shortened(str(self))}: {pairs:,} of {length:,} x {keys:,} pairs ({pairs / possible:.1%}), "
            f"{pairs / max(length, 1):,.2f} keys a query"
        ).replace("%)", " %)")

    def draw(self, axes: Axes, length: int, kv_length: int | None = None) -> None:
        """Draws the mask into matplotlib axes: queries down, keys across, allowed pairs dark.

        Of long sequences at most 600 positions a side are drawn, evenly spaced.
        """
        length, keys = _lengths(length, kv_length)
        if not self.has_partial:
            self.regions(length, keys)  # refuses lengths that are not the mask's
        q, k = (np.unique(np.linspace(0, max(n - 1, 0), min(n, PIXELS)).astype(np.int64)) for n in (length, keys))
        shown = np.broadcast_to(self.allows(q[:, None], k[None, :]), (len(q), len(k)))
        axes.imshow(shown, cmap="Blues", vmin=0, vmax=1.3, extent=(0, keys, length, 0), interpolation="nearest")
        axes.set(xlabel="key position", ylabel="query position", title=shortened(str(self), 60))

    def dense(self, q_positions: Any, k_positions: Any) -> torch.Tensor:
        """The boolean matrix ``[len(q_positions), len(k_positions)]``, for tests and small drawings.

        Raises:
            InputError: positions are not integers, or out of the mask's range.

        >>> from ringattn.masks import Causal
        >>> Causal().dense([0, 1, 2], [0, 1, 2]).int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
        """
        q = self.within(checked_positions(q_positions, "q_positions"), "queries")
        k = self.within(checked_positions(k_positions, "k_positions"), "keys")
        if q.ndim != 1 or k.ndim != 1:
            raise InputError(f"dense takes two rows of positions; got {q.ndim} and {k.ndim} dimensions.")
        q, k = q[:, None], k[None, :]
        return torch.from_numpy(np.broadcast_to(self.allows(q, k), (q.shape[0], k.shape[1])).copy())

    def local_positions(self, positions: Any, side: Side = "queries") -> torch.Tensor:
        """The position of each token within its document, int64, as rotary embeddings of packed data need it.

        Args:
            positions: global positions, of any shape.
            side: whose they are: of ``queries`` or of ``keys``, whose documents may have other lengths.

        Raises:
            InputError: positions are not integers, or out of the mask's range.

        >>> from ringattn.masks import Documents
        >>> mask = Documents([3, 2], kv_lengths=[1, 4])
        >>> mask.local_positions([0, 1, 2, 3, 4]).tolist(), mask.local_positions([0, 1, 2, 3, 4], side="keys").tolist()
        ([0, 1, 2, 0, 1], [0, 0, 1, 2, 3])
        """
        choice(side, "side", ("queries", "keys"))
        return torch.from_numpy(np.array(self.local(self.within(checked_positions(positions), side), side)))

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __str__(self) -> str:
        """The mask's name and fields: the text that `parse` reads, where they are integers. Equal for equal masks."""
        name = vars(type(self)).get("spelled") or f"{type(self).__module__}:{type(self).__qualname__}"
        values = vars(self)
        if dataclasses.is_dataclass(self):
            values = {field.name: values[field.name] for field in dataclasses.fields(self) if field.init}
        if not values:
            return name
        if all(type(value) is int for value in values.values()):
            return f"{name}:{','.join(map(str, values.values()))}"
        return f"{name}({', '.join(f'{field}={value!r}' for field, value in values.items())})"


def checked(value: object) -> Mask:
    """The mask, or an error where something else was given."""
    return instance(value, Mask, "mask", "a ringattn mask, such as ringattn.Causal()")


def _lengths(length: object, kv_length: object) -> tuple[int, int]:
    queries = tokens(length, "A sequence's length")
    return queries, queries if kv_length is None else tokens(kv_length, "kv_length")


class Combination(Mask):
    """A mask made of masks, up to a depth of `MAX_DEPTH`."""

    def __post_init__(self) -> None:
        depth = 1 + max(getattr(checked(part), "depth", 0) for part in self.parts)
        if depth > MAX_DEPTH:
            raise InputError(
                f"Masks may be combined {MAX_DEPTH} deep; got more. Combine them in pairs, as a tree, or say the same "
                f"with one Documents or Blocks."
            )
        object.__setattr__(self, "depth", depth)

    @property
    def extents(self) -> tuple[int, int]:
        queries, keys = zip(*(part.extents for part in self.parts), strict=True)
        return min(queries), min(keys)

    @property
    @abstractmethod
    def parts(self) -> tuple[Mask, ...]:
        """The masks it is made of."""

    @property
    def has_partial(self) -> bool:  # type: ignore[override]
        return any(part.has_partial for part in self.parts)

    def regions(self, q_length: int, k_length: int) -> Regions:
        return self.classify(q_length, k_length)[0]

    @abstractmethod
    def classify(self, q_length: int, k_length: int) -> tuple[Regions, Regions]: ...

    @classmethod
    def from_text(cls, text: str) -> Mask:
        raise ValueError(f"{cls.__name__} is written with an operator; got {text!r}.")

    def local(self, positions: Positions, side: Side) -> Positions:
        least: Positions = np.minimum.reduce([part.local(positions, side) for part in self.parts])
        return least


@dataclasses.dataclass(frozen=True)
class And(Combination):
    """The pairs that both masks allow."""

    left: Mask
    right: Mask

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.left, self.right

    def classify(self, q_length: int, k_length: int) -> tuple[Regions, Regions]:
        return _combined(bands.intersect, *(side.classify(q_length, k_length) for side in self.parts))

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return self.left.allows(q, k) & self.right.allows(q, k)

    def __str__(self) -> str:
        return "&".join(f"({side})" if isinstance(side, Or) else str(side) for side in (self.left, self.right))


@dataclasses.dataclass(frozen=True)
class Or(Combination):
    """The pairs that either mask allows."""

    left: Mask
    right: Mask

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.left, self.right

    def classify(self, q_length: int, k_length: int) -> tuple[Regions, Regions]:
        return _combined(bands.union, *(side.classify(q_length, k_length) for side in self.parts))

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return self.left.allows(q, k) | self.right.allows(q, k)

    def __str__(self) -> str:
        return f"{self.left}|{self.right}"


@dataclasses.dataclass(frozen=True)
class Not(Combination):
    """The pairs that the mask does not allow."""

    mask: Mask

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def classify(self, q_length: int, k_length: int) -> tuple[Regions, Regions]:
        certain, partial = self.mask.classify(q_length, k_length)
        return bands.complement(np.concatenate([certain, partial]), q_length, k_length), partial

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return ~self.mask.allows(q, k)

    def __str__(self) -> str:
        return f"~({self.mask})" if isinstance(self.mask, (And, Or)) else f"~{self.mask}"


@dataclasses.dataclass(frozen=True)
class Transposed(Mask):
    """The same pairs with queries for keys: the mask of a pass in which queries travel to the keys."""

    mask: Mask

    @property
    def has_partial(self) -> bool:  # type: ignore[override]
        return self.mask.has_partial

    @property
    def extents(self) -> tuple[int, int]:
        queries, keys = self.mask.extents
        return keys, queries

    def regions(self, q_length: int, k_length: int) -> Regions:
        return self.classify(q_length, k_length)[0]

    def classify(self, q_length: int, k_length: int) -> tuple[Regions, Regions]:
        certain, partial = self.mask.classify(k_length, q_length)
        return bands.transpose(certain), bands.transpose(partial)

    def allows(self, q: Positions, k: Positions) -> Allowed:
        return np.transpose(self.mask.allows(np.transpose(k), np.transpose(q)))

    def __str__(self) -> str:
        return f"({self.mask}) transposed"


def _combined(
    combine: Callable[[Regions, Regions], Regions], left: tuple[Regions, Regions], right: tuple[Regions, Regions]
) -> tuple[Regions, Regions]:
    """What two divided masks together are sure of, and what of the possible pairs they are not."""
    certain = combine(left[0], right[0])
    if not len(left[1]) and not len(right[1]):
        return certain, bands.empty()
    return certain, bands.difference(combine(np.concatenate(left), np.concatenate(right)), certain)
