"""Folding: what every rank has becomes one, along a tree of ranks, and all ranks get it, the same bits on each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ringattn.mechanisms.base import State
from ringattn.plans.tree import Tree
from ringattn.transports.base import Transport

Merge = Callable[[State, State], None]
"""Folds what comes from later ranks into what is there, in place."""


def fold(transport: Transport, own: State, merge: Merge, label: str) -> None:
    """Replaces every rank's tensors by the fold of all ranks', in the order of the ranks. All ranks call it together.

    Args:
        own: contiguous tensors, of the same shapes and dtypes on every rank.
        merge: associative; it need not be commutative.
    """
    tree = Tree.of(transport.rank, transport.size)
    packed = _Packed(own)
    for child in tree.children:
        arrived = packed.room()
        transport.exchange([], [(child, arrived)], label=f"{label}, up").wait()
        merge(own, packed.unpacked(arrived))
    if tree.parent is not None:
        transport.exchange([(tree.parent, packed.bytes())], [], label=f"{label}, up").wait()
        result = packed.room()
        transport.exchange([], [(tree.parent, result)], label=f"{label}, down").wait()
        for x, found in zip(own, packed.unpacked(result), strict=True):
            x.copy_(found)
    if tree.children:
        result = packed.bytes()
        transport.exchange([(child, result) for child in tree.children], [], label=f"{label}, down").wait()


def add(into: State, part: State) -> None:
    """The merge of a sum."""
    for total, x in zip(into, part, strict=True):
        total += x


class _Packed:
    """Some tensors as the bytes of one message."""

    def __init__(self, tensors: State) -> None:
        self._tensors = tensors
        self._sizes = [x.nbytes for x in tensors]

    def bytes(self) -> torch.Tensor:
        """The tensors' bytes behind one another."""
        return torch.cat([x.reshape(-1).view(torch.uint8) for x in self._tensors])

    def room(self) -> torch.Tensor:
        """A buffer for as many."""
        return torch.empty(sum(self._sizes), dtype=torch.uint8, device=self._tensors[0].device)

    def unpacked(self, message: torch.Tensor) -> State:
        """Tensors like these of a message."""
        # copied, as those of wide numbers may begin at an odd byte
        parts = (part.clone() for part in message.split(self._sizes))
        return tuple(part.view(x.dtype).view(x.shape) for part, x in zip(parts, self._tensors, strict=True))
