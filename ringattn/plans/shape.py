"""Shapes: the heads of a call, by which the rows of a plan become bytes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ringattn.payloads.base import Payload

GradientWire = Literal["float32", "input"]
"""The dtype in which gradients of keys and values travel: that of the accumulators, or of the inputs."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The heads of a call: what turns rows into bytes.

    Attributes:
        summary: numbers in the summary of one key head, for mechanisms that have summaries.
    """

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: str
    itemsize: int
    summary: int | None = None

    @property
    def accumulator(self) -> int:
        """Bytes of an accumulated number: float64 for float64 inputs, else float32."""
        return max(self.itemsize, 4)

    def row(self, payload: Payload) -> int:
        """Numbers in one row of a payload, all key heads."""
        return self.batch * self.kv_heads * payload.size(self)

    def payload_itemsize(self, payload: Payload) -> int:
        """Bytes of one number of a payload."""
        return self.accumulator if payload.accumulated else self.itemsize

    def grad_itemsize(self, gradient_wire: GradientWire) -> int:
        """Bytes of one number of its gradients, as they travel."""
        return self.itemsize if gradient_wire == "input" else self.accumulator
