"""Deals of heads: which of a call's heads each rank of a group computes.

Query heads are dealt in order, the first ranks getting one more where they do not divide: 6 on 4 ranks are 2, 2, 1, 1.
Each rank gets the key heads that its query heads read. A key head that several ranks' query heads read goes to each of
them, once. What a rank has got is cut into parts of which every key head is read by as many query heads, as in a call,
and into slices of whole key heads, whose exchanges are apart.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ringattn.errors import UnsupportedError
from ringattn.layouts.base import shares_of


class Part(NamedTuple):
    """Query heads from ``first`` to before ``stop``, and the key heads that they read, in equal groups."""

    first: int
    stop: int
    kv_first: int
    kv_stop: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.stop - self.first

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return self.kv_stop - self.kv_first


Deal = tuple[tuple[tuple[Part, ...], ...], ...]
"""The parts of every slice of every rank of a group."""


@functools.lru_cache(maxsize=64)
def deal(heads: int, kv_heads: int, ranks: int, slices: int = 1) -> Deal:
    """The deal of these heads to so many ranks, in so many slices, or as many as a rank has key heads.

    Raises:
        UnsupportedError: there are more ranks than query heads.

    >>> [parts for (parts,) in deal(8, 2, 3)]  # doctest: +NORMALIZE_WHITESPACE
    [(Part(first=0, stop=3, kv_first=0, kv_stop=1),),
     (Part(first=3, stop=4, kv_first=0, kv_stop=1), Part(first=4, stop=6, kv_first=1, kv_stop=2)),
     (Part(first=6, stop=8, kv_first=1, kv_stop=2),)]
    """
    if ranks > heads:
        raise UnsupportedError(
            f"Ulysses needs at least one query head a rank; got {heads} heads on {ranks} ranks. Use ulysses={heads} or "
            f"fewer, and a longer ring; or schedule='auto' or another, which runs over all ranks as one ring."
        )
    edges, group = shares_of(heads, ranks).tolist(), heads // kv_heads
    read = [_by_key_head(edges[rank], edges[rank + 1], group) for rank in range(ranks)]
    count = min(slices, max(map(len, read)))
    return tuple(tuple(_sliced(own, count)) for own in read)


def _by_key_head(first: int, stop: int, group: int) -> list[Part]:
    """These query heads, a part for each key head that they read."""
    parts = []
    while first < stop:
        kv = first // group
        last = min((kv + 1) * group, stop)
        parts.append(Part(first, last, kv, kv + 1))
        first = last
    return parts


def _sliced(parts: list[Part], count: int) -> list[tuple[Part, ...]]:
    edges = shares_of(len(parts), count).tolist()
    return [_joined(parts[edges[nth] : edges[nth + 1]]) for nth in range(count)]


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Neighbours whose key heads are read by as many query heads made one."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if last is not None and last.heads == part.heads * last.kv_heads:
            out[-1] = Part(last.first, part.stop, last.kv_first, part.kv_stop)
        else:
            out.append(part)
    return tuple(out)


def is_shared(part: Part, group: int) -> bool:
    """Whether other ranks read the key heads of a part too; ``group`` query heads read one in all."""
    return part.heads < group * part.kv_heads
