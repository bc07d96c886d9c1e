"""Shapes: the heads of a call, by which the rows of a plan become bytes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ringattn.payloads.base import Attended, Payload, Wire

GradientWire = Literal["float32", "input"]
"""The dtype in which gradients of keys and values travel: that of the accumulators, or of the inputs."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The heads of a call: what turns rows into bytes.

    Attributes:
        summary: numbers in the summary of one key head, for mechanisms that have summaries.
        queries: bytes of a query that travels, where queries do; and `before` of the passes over keys alone that go
            before, the first and those after it.
        kept: bytes that a pass gives beside the output for each query and head: of softmax, its log-sum-exp.
    """

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: str
    itemsize: int
    summary: int | None = None
    queries: Wire | None = None
    before: tuple[Wire, Wire] | None = None
    kept: int = 4

    @property
    def accumulator(self) -> int:
        """Bytes of an accumulated number: float64 for float64 inputs, else float32."""
        return max(self.itemsize, 4)

    def heads_of(self, slices: int) -> tuple[int, ...]:
        """The key heads of so many slices, larger ones first."""
        return heads_of(self.kv_heads, slices)

    def of_heads(self, heads: int, kv_heads: int) -> Shape:
        """The shape of some of the heads."""

        def part(wire: Wire) -> Wire:
            return Wire(*(getattr(wire, x.name) * heads // self.heads for x in dataclasses.fields(wire)))

        queries = None if self.queries is None else part(self.queries)
        before = None if self.before is None else (part(self.before[0]), part(self.before[1]))
        return dataclasses.replace(self, heads=heads, kv_heads=kv_heads, queries=queries, before=before)

    def wire(self, payload: Payload, gradient_wire: GradientWire) -> Wire:
        """The bytes of one row of a payload."""
        if not isinstance(payload, Attended):
            assert self.queries is not None  # by `plans.planning`
            return self.queries
        row = self.batch * self.kv_heads * payload.size(self)
        there = row * (self.accumulator if payload.accumulated else self.itemsize)
        back = row * (self.itemsize if gradient_wire == "input" else self.accumulator)
        return Wire(there, 0, there, back, held=row * self.accumulator)


def heads_of(heads: int, slices: int) -> tuple[int, ...]:
    """How many of so many heads each slice has, larger ones first."""
    each, more = divmod(heads, slices)
    return tuple(each + (nth < more) for nth in range(slices))
