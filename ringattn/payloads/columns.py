"""Columns: tensors of any dtypes side by side in rows of bytes, by which several of them travel in one message.

What lies in a row is read and written where it lies, bit for bit, as the tensors' own dtypes: each column begins where
its numbers may, wide ones first, and a row ends where the next one may begin.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch

Field = tuple[torch.dtype, tuple[int, ...]]
"""Of a tensor ``[..., *shape]`` its dtype and shape, the row's own dims apart."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """An immutable value.

    Attributes:
        fields: the tensors, in the order in which they are given and got.
        multiple: bytes of which a row's are a multiple.
    """

    fields: tuple[Field, ...]
    multiple: int = 1

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], lead: int = 0, multiple: int = 1) -> Columns:
        """Those of tensors whose first ``lead`` dims are the rows'."""
        return cls(tuple((x.dtype, tuple(x.shape[lead:])) for x in tensors), multiple)

    @functools.cached_property
    def size(self) -> int:
        """Bytes in a row."""
        widest = max((dtype.itemsize for dtype, _ in self.fields), default=1)
        return _up(sum(map(_bytes, self.fields)), math.lcm(widest, self.multiple))

    @functools.cached_property
    def _starts(self) -> list[int]:
        starts, at = [0] * len(self.fields), 0
        for nth in sorted(range(len(self.fields)), key=lambda nth: -self.fields[nth][0].itemsize):
            starts[nth] = at
            at += _bytes(self.fields[nth])
        return starts

    def views(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors ``[..., *shape]`` that lie in bytes ``[..., size]``, whose last dim is contiguous."""
        found = []
        for field, start in zip(self.fields, self._starts, strict=True):
            numbers = rows[..., start : start + _bytes(field)].view(field[0])
            found.append(numbers.unflatten(-1, field[1]) if field[1] else numbers.squeeze(-1))
        return tuple(found)

    def packed(self, tensors: Sequence[torch.Tensor], lead: Sequence[int]) -> torch.Tensor:
        """Bytes ``[*lead, size]`` of such tensors."""
        (first, *_) = tensors
        rows = torch.zeros(*lead, self.size, dtype=torch.uint8, device=first.device)
        for into, x in zip(self.views(rows), tensors, strict=True):
            into.copy_(x)
        return rows


def _bytes(field: Field) -> int:
    return math.prod(field[1]) * field[0].itemsize


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
