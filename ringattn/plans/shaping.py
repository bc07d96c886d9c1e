"""Shapes of calls: what heads, dims and dtypes that are asked for come to, and plans of them."""

from __future__ import annotations

import dataclasses

import torch

from ringattn.checking import dtype as checked_dtype
from ringattn.checking import integer, pair
from ringattn.errors import InputError
from ringattn.mechanisms.base import Mechanism, Problem, Summarising
from ringattn.mechanisms.softmax import Softmax
from ringattn.payloads.base import Payload
from ringattn.payloads.queries import Queries, Trips
from ringattn.plans.plan import Plan
from ringattn.plans.shape import GradientWire, Shape
from ringattn.readable import dtype_name


def shape_of(
    heads: tuple[int, int] | None = None,
    head_dims: tuple[int, int] | None = None,
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    mechanism: Mechanism | None = None,
) -> Shape | None:
    """The shape of these sizes; None where none is given."""
    integer(batch, "batch", least=1)
    heads = None if heads is None else checked_heads(heads)
    if head_dims is None and dtype is None:
        return None  # some schedules want to know the heads alone
    if heads is None or head_dims is None or dtype is None:
        raise InputError("A plan knows its bytes when heads, head_dims and dtype are all given; give all or none.")
    head_dims = pair(head_dims, "head_dims", "two numbers, of dims of a query-key head and of a value head")
    kind = checked_dtype(dtype)
    summary = mechanism.summary_size(*head_dims) if isinstance(mechanism, Summarising) else None
    dim, value_dim = head_dims
    kept = max(kind.itemsize, 4)
    if mechanism is not None:
        dim, kind = mechanism.summed_shape(dim, kind)
        kept = _kept(Problem(mechanism.summed, 1, *heads, dim, value_dim, kind, torch.device("meta")))
    return Shape(batch, *heads, dim, value_dim, dtype_name(kind), kind.itemsize, summary, kept=kept)


def _kept(problem: Problem) -> int:
    """Bytes that a pass gives beside the output, for each query and head."""
    return sum(x.nbytes for x in problem.results_like(1)) // problem.heads


def checked_heads(heads: object) -> tuple[int, int]:
    """Query and key heads, or an InputError."""
    queries, keys = pair(heads, "heads", "two numbers, of query and key heads")
    if queries % keys:
        raise InputError(f"Query heads must be a multiple of key heads; got heads={(queries, keys)}.")
    return queries, keys


def shaped(plan: Plan, shape: Shape | None, mechanism: Mechanism | None) -> Plan:
    """The plan of this shape."""
    made = None if shape is None else of_payload(plan.payload, plan.gradient_wire, shape, mechanism)
    return dataclasses.replace(plan, shape=made)


def of_payload(payload: Payload, gradient_wire: GradientWire, shape: Shape, mechanism: Mechanism | None) -> Shape:
    """The shape with what travels of a query, where queries do. Without a mechanism, as of softmax."""
    if not isinstance(payload, Queries):
        return shape
    mechanism = (Softmax() if mechanism is None else mechanism).summed
    kind, device = checked_dtype(shape.dtype), torch.device("meta")
    problem = Problem(
        mechanism, shape.batch, shape.heads, shape.kv_heads, shape.dim, shape.value_dim, kind, device, mechanism.params
    )
    trips, rows = Trips.of(problem, narrow=gradient_wire == "input"), shape.batch * shape.heads
    before = None if trips.before is None else (trips.wire(rows, before=0), trips.wire(rows, before=1))
    return dataclasses.replace(shape, queries=trips.wire(rows), before=before)
