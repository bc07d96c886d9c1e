"""`plan` and `plan_all`: a mask, a sharding and a schedule made into plans."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch

from ringattn import bands
from ringattn.bands import Array
from ringattn.checking import dtype as checked_dtype
from ringattn.checking import instance, integer, pair
from ringattn.errors import InputError, UnsupportedError
from ringattn.layouts import Layout
from ringattn.masks import Mask, checked
from ringattn.mechanisms.base import Mechanism, Problem, Summarising
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.softmax import Softmax
from ringattn.mesh import Mesh
from ringattn.naming import named
from ringattn.payloads.queries import Queries, Trips
from ringattn.plans.assembly import assemble
from ringattn.plans.deal import deal
from ringattn.plans.demand import Demand
from ringattn.plans.links import MOST, ROW_BYTES, Links
from ringattn.plans.passing import PassPlan
from ringattn.plans.plan import Plan
from ringattn.plans.shape import Shape
from ringattn.plans.slices import in_slices
from ringattn.plans.swap import Swap
from ringattn.plans.tiles import K_RANK
from ringattn.plans.ulysses import UlyssesPlan, composed
from ringattn.readable import dtype_name, readable_seconds, shortened
from ringattn.schedules import MEMBERS, Ring, Route, Scan, Schedule, Scheme, Ulysses
from ringattn.schedules.wave import Wave
from ringattn.sharding import Sharding

CLOSE = 0.02  # of two schedules' seconds, which differ by less for no reason
MAX_PLANS = 1 << 17  # at once: half a minute


def named_schedule(schedule: Any, heads: tuple[int, int] | None = None) -> Scheme | None:
    """The schedule itself or the one of this name; None for ``auto``, which `plan` resolves by the demand.

    Args:
        heads: query and key heads, where they are known, for which it is made.
    """
    if isinstance(schedule, Wave) or (isinstance(schedule, str) and schedule == "wave"):
        raise UnsupportedError(
            "wave hands blocks of queries from rank to rank, for mechanisms that walk the keys in order, such as "
            "Monotonic. Use ring, route or auto."
        )
    if isinstance(schedule, str) and schedule == "auto":
        return None
    found = named("schedule", schedule, Scheme, MEMBERS, also=("auto",))
    return found.for_heads(checked_heads(heads)[1]) if heads is not None and isinstance(found, Schedule) else found


def plan(
    mask: Mask,
    sharding: Sharding,
    schedule: Scheme | str = "auto",
    kv_sharding: Sharding | None = None,
    *,
    heads: tuple[int, int] | None = None,
    head_dims: tuple[int, int] | None = None,
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    mechanism: Mechanism | None = None,
) -> Plan:
    """This rank's plan.

    Args:
        mask: the allowed pairs, in global positions.
        sharding: who holds the queries.
        schedule: a schedule, its name, or ``auto``: the one by which all ranks together receive fewer positions.
        kv_sharding: who holds the keys and values, where they are another sequence.
        heads: query and key heads, (Hq, Hkv). With heads, head_dims and dtype the plan knows its bytes; `Ulysses`
            deals heads, and needs to know them.
        head_dims: dims of a query-key head and of a value head, (D, Dv).
        dtype: the inputs' dtype.
        batch: sequences at once.
        mechanism: what will attend. ``auto`` takes `Scan` where the mechanism's keys can be summed up; None stands
            for one that needs the keys.

    Raises:
        InputError: the mask does not fit the lengths, or the shardings are not of one mesh.
        UnsupportedError: the schedule asked for cannot serve the mechanism, or the mask and sharding.
    """
    instance(sharding, Sharding, "sharding", "a ringattn.Sharding")
    kv = sharding if kv_sharding is None else instance(kv_sharding, Sharding, "kv_sharding", "a ringattn.Sharding")
    _check_mechanism(mechanism)
    asked, shape = named_schedule(schedule, heads), shape_of(heads, head_dims, dtype, batch, mechanism)
    if isinstance(asked, Ulysses):
        along = _along_ring(asked, sharding.mesh, heads)
        inner = flat_plan(mask, sharding.grouped, along, kv.grouped, mechanism)
        return _shaped(_composed(asked, inner, (sharding, kv), heads), shape, mechanism)
    return _shaped(flat_plan(mask, sharding, asked, kv, mechanism), shape, mechanism)


def flat_plan(
    mask: Mask, sharding: Sharding, schedule: Scheme | None, kv: Sharding, mechanism: Mechanism | None = None
) -> Plan:
    """This rank's plan by a schedule over all ranks of the mesh, or None for ``auto``, of any shape."""
    demand, words = _demand(mask, sharding, kv), _words(mask, sharding, kv)
    check_causal(demand, mechanism)
    taken, reason = _taken(schedule, demand, mechanism, sharding.mesh.links)
    return _build(demand, sharding.mesh.sequence_rank, taken, words, reason)


def verified_plan(
    mask: Mask,
    sharding: Sharding,
    schedule: Scheme | str = "auto",
    kv_sharding: Sharding | None = None,
    *,
    mechanism: Mechanism | None = None,
    **shape: Any,
) -> Plan:
    """`plan`, verified and kept by the sharding: another shape, or mechanism that reads the same, needs no other.

    Raises:
        PlanError: the plan is wrong.
    """
    taken, kv = named_schedule(schedule, shape.get("heads")), sharding if kv_sharding is None else kv_sharding
    made = shape_of(mechanism=mechanism, **shape)
    if not isinstance(taken, Ulysses):
        return _shaped(_verified(mask, sharding, taken, kv, mechanism), made, mechanism)
    along = _along_ring(taken, sharding.mesh, shape.get("heads"))
    inner = _verified(mask, sharding.grouped, along, kv.grouped, mechanism)
    key = (mask, kv, taken, inner.hash, shape.get("heads"))
    kept: UlyssesPlan | None = sharding.plans.get(key)
    if kept is None:
        kept = _composed(taken, inner, (sharding, kv), shape.get("heads"))
        kept.verify()
        sharding.plans.keep(key, kept)
    return _shaped(kept, made, mechanism)


def _verified(
    mask: Mask, sharding: Sharding, schedule: Scheme | None, kv: Sharding, mechanism: Mechanism | None
) -> Plan:
    """`flat_plan`, verified and kept by the sharding."""
    if schedule is not None:
        _check_serves(schedule, mechanism)
    other = None if kv == sharding else (kv.length, kv.layout)
    key = (mask, other, schedule, isinstance(mechanism, Summarising), mechanism is not None and mechanism.causal)
    kept: Plan | None = sharding.plans.get(key)
    if kept is None:
        kept = flat_plan(mask, sharding, schedule, kv, mechanism)
        kept.verify()
        sharding.plans.keep(key, kept)
    return kept


def _along_ring(schedule: Ulysses, mesh: Mesh, heads: tuple[int, int] | None) -> Scheme | None:
    """The schedule along the ring, for as few key heads as some part of them has; None for ``auto``."""
    dealt = deal(*_dealt_heads(heads), mesh.ulysses, schedule.slices)
    fewest = min(part.kv_heads for own in dealt for parts in own for part in parts)
    return named_schedule(schedule.inner, (fewest, fewest))


def _dealt_heads(heads: tuple[int, int] | None) -> tuple[int, int]:
    if heads is None:
        raise InputError("Ulysses deals heads to ranks; give heads=(query heads, key heads) when planning.")
    return checked_heads(heads)


def _composed(
    schedule: Ulysses,
    inner: Plan,
    shardings: tuple[Sharding, Sharding],
    heads: tuple[int, int] | None,
    rank: int | None = None,
) -> UlyssesPlan:
    """The plan of a rank, this one or another, that does this as one of its ring."""
    queries, keys = shardings
    swap = swap_of(schedule, queries, keys, heads, rank)
    words = f"{schedule} on {queries.mesh.ring} x {queries.mesh.ulysses}: {inner.description}"
    made = composed(inner, swap, queries.mesh.sequence_size, queries.spans, keys.spans, words)
    return dataclasses.replace(made, reason=inner.reason)


def swap_of(
    schedule: Ulysses, queries: Sharding, keys: Sharding, heads: tuple[int, int] | None, rank: int | None = None
) -> Swap:
    """How a rank of the sequence, this one or another, exchanges heads.

    Raises:
        InputError: nobody said which heads.
        UnsupportedError: they cannot be dealt to so many ranks.
    """
    mesh = queries.mesh
    rank = mesh.sequence_rank if rank is None else rank
    group = rank // mesh.ulysses
    return Swap(
        rank,
        deal(*_dealt_heads(heads), mesh.ulysses, schedule.slices),
        _members_rows(queries, group),
        _members_rows(keys, group),
        schedule.keep,
        schedule.gradient_wire,
    )


def _members_rows(sharding: Sharding, group: int) -> Array:
    """Where the rows of every member of a group lie among the group's."""
    table, size = sharding.rows_in_groups, sharding.mesh.ulysses
    return table[slice(*np.searchsorted(table[:, 0], [group * size, (group + 1) * size]))]


def plan_all(
    mask: Mask,
    length: int,
    layout: Layout | str = "auto",
    schedule: Scheme | str = "auto",
    ring: int = 1,
    ulysses: int = 1,
    *,
    kv_length: int | None = None,
    heads: tuple[int, int] | None = None,
    head_dims: tuple[int, int] | None = None,
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    mechanism: Mechanism | None = None,
    node: int | None = None,
) -> list[Plan]:
    """Every rank's plan, without any process. Arguments as for `plan`.

    ``node`` says how many neighbouring ranks share a node, whose links are faster; None that all do.

    >>> from ringattn.masks import Causal
    >>> [p.area for p in plan_all(Causal(), 8, "contiguous", ring=2)]
    [10, 26]
    """
    _check_mechanism(mechanism)
    mesh = Mesh.virtual(ring, ulysses, node=node)
    if mesh.sequence_size > MAX_PLANS:
        raise InputError(
            f"plan_all makes the plans of up to {MAX_PLANS} ranks; got {mesh.sequence_size}. Make those you need with "
            f"ringattn.plan and Mesh.virtual."
        )
    sharding = Sharding(length, mesh, layout, mask)
    kv_sharding = sharding if kv_length is None else Sharding(kv_length, mesh, sharding.layout)
    asked, shape = named_schedule(schedule, heads), shape_of(heads, head_dims, dtype, batch, mechanism)
    if not isinstance(asked, Ulysses):
        plans = _all_flat(mask, sharding, asked, kv_sharding, mechanism)
        return [_shaped(each, shape, mechanism) for each in plans]
    along = _along_ring(asked, mesh, heads)
    rings = _all_flat(mask, sharding.grouped, along, kv_sharding.grouped, mechanism)
    shardings = sharding, kv_sharding
    return [
        _shaped(_composed(asked, rings[rank // mesh.ulysses], shardings, heads, rank), shape, mechanism)
        for rank in range(mesh.sequence_size)
    ]


def _all_flat(
    mask: Mask, sharding: Sharding, schedule: Scheme | None, kv: Sharding, mechanism: Mechanism | None
) -> list[Plan]:
    demand = _demand(mask, sharding, kv).for_all_ranks()
    check_causal(demand, mechanism)
    taken, reason = _taken(schedule, demand, mechanism, None)
    words = _words(mask, sharding, kv)
    return [_build(demand, rank, taken, words, reason) for rank in range(demand.size)]


def _check_mechanism(mechanism: object) -> None:
    if mechanism is not None:
        instance(mechanism, Mechanism, "mechanism", "a ringattn mechanism, such as ringattn.Softmax(), or None")
    if isinstance(mechanism, Ordered):
        raise UnsupportedError(
            f"{type(mechanism).__name__} walks the keys in order, by plans of another kind. Use ringattn.plan_wave."
        )


def _demand(mask: Mask, sharding: Sharding, kv_sharding: Sharding) -> Demand:
    if sharding.mesh != kv_sharding.mesh:
        raise InputError(
            f"Queries and keys must be sharded over the same mesh; got {sharding.mesh} and {kv_sharding.mesh}."
        )
    lengths = sharding.length, kv_sharding.length
    mesh, spans = sharding.mesh, (sharding.spans, kv_sharding.spans)
    return Demand(mask, *checked(mask).classify(*lengths), *spans, mesh.sequence_size, mesh.sequence_node)


def _words(mask: Mask, sharding: Sharding, kv_sharding: Sharding) -> str:
    keys = "" if kv_sharding == sharding else f", {kv_sharding.length} keys {kv_sharding.layout}"
    return (
        f"{shortened(str(mask))}, {sharding.length} tokens {sharding.layout}{keys}, {sharding.mesh.sequence_size} ranks"
    )


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
        kept = _kept(Problem(mechanism, 1, *heads, dim, value_dim, kind, torch.device("meta")))
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


def _check_serves(schedule: Scheme, mechanism: Mechanism | None) -> Schedule:
    """The schedule, as one along one axis, or an error where it cannot serve the mechanism."""
    if not isinstance(schedule, Schedule):
        raise InputError(f"{schedule} is no schedule along one axis; use ring, route or auto.")
    wrong = None if mechanism is None else schedule.payload.refusal(mechanism)
    if wrong is not None:
        raise UnsupportedError(
            f"{schedule} exchanges {schedule.payload.unit}, and {wrong}. Use ring, route or auto, or a mechanism "
            f"whose keys can be summed up, such as Linear."
        )
    return schedule


def check_causal(demand: Demand, mechanism: Mechanism | None) -> None:
    """Raises UnsupportedError where a mask allows keys behind their query to a mechanism that knows of none."""
    if mechanism is None or not mechanism.causal:
        return
    rows, _ = bands.tighten(np.concatenate([demand.regions, demand.partial]))
    if len(rows) and rows[:, bands.LO].min() < 0:
        raise UnsupportedError(
            f"{mechanism} knows no key that comes after its query, but {shortened(str(demand.mask))} allows some. "
            f"Take a causal mask, such as Causal() or Documents(...) & Causal()."
        )


def _taken(
    schedule: Scheme | None, demand: Demand, mechanism: Mechanism | None, links: Links | None
) -> tuple[Schedule, str]:
    """The schedule, and why: on every rank the same, as it is chosen by what all ranks together receive.

    Args:
        links: where they were measured.
    """
    if schedule is not None:
        schedule = _check_serves(schedule, mechanism)
        refusal = schedule.refusal(demand)
        if refusal is not None:
            raise UnsupportedError(f"{refusal}.")
        return schedule, ""
    why = ""
    if isinstance(mechanism, Summarising):
        refusal = Scan().refusal(demand)
        if refusal is None:
            return Scan(), "auto took scan: sums over keys travel, and keys and values stay where they are"
        why = f"; not scan: {refusal}"
    taken, reason = _ring_or_route(demand) if links is None or links.size > MOST else _by_links(demand, links)
    return taken, reason + why


def _by_links(demand: Demand, links: Links) -> tuple[Schedule, str]:
    """That by which the busiest rank waits less, on these links; `_ring_or_route` where it does not matter."""
    every, ring, route = demand.for_all_ranks(), Ring(), Route()
    by_ring, by_route = (links.longest(x.moves(every, rank) for rank in range(demand.size)) for x in (ring, route))
    if math.isclose(by_ring, by_route, rel_tol=CLOSE):
        taken, reason = _ring_or_route(demand)
        return taken, f"{reason} (as long either way on the profile's links)"
    times = [readable_seconds(seconds) for seconds in sorted((by_ring, by_route))]
    taken, other = (ring, route) if by_ring < by_route else (route, ring)
    return taken, (
        f"auto took {taken}: on the profile's links the busiest rank receives for {times[0]} of {ROW_BYTES} bytes a "
        f"position, {times[1]} by {other}"
    )


def _ring_or_route(demand: Demand) -> tuple[Schedule, str]:
    """Route, unless all ranks together receive no more by ring, of any rank's keys, than the route that none betters.

    So the first keys of which they do decide, and no more of the mask than that is cut.
    """
    ring, route = Ring(), Route()
    same = "key positions either way, from neighbours only"
    by_ring = by_route = 0
    for requested in demand.keys_requested_from_all():
        by_ring += ring.received_tokens(requested, demand.size)
        by_route += route.received_tokens(requested, demand.size)
        if by_route < by_ring:
            last = int(requested[:, K_RANK].max())
            owners = "rank 0" if last == 0 else f"ranks 0 to {last}"
            return route, (
                f"auto took route: all ranks together receive {by_route} key positions of {owners}, {by_ring} by ring"
            )
        exact = ring.exact_tokens(demand)
        if exact is not None:
            return ring, f"auto took ring: all ranks together receive {exact} {same}"
    return ring, f"auto took ring: all ranks together receive {by_ring} {same}"


def _shaped(plan: Plan, shape: Shape | None, mechanism: Mechanism | None) -> Plan:
    """The plan of this shape, with what travels of a query, where queries do. Without a mechanism, as of softmax."""
    if shape is None or not isinstance(plan.payload, Queries):
        return dataclasses.replace(plan, shape=shape)
    mechanism = (Softmax() if mechanism is None else mechanism).summed
    kind, device = checked_dtype(shape.dtype), torch.device("meta")
    problem = Problem(
        mechanism, shape.batch, shape.heads, shape.kv_heads, shape.dim, shape.value_dim, kind, device, mechanism.params
    )
    trips, rows = Trips.of(problem, narrow=plan.gradient_wire == "input"), shape.batch * shape.heads
    before = None if trips.before is None else (trips.wire(rows, before=0), trips.wire(rows, before=1))
    return dataclasses.replace(plan, shape=dataclasses.replace(shape, queries=trips.wire(rows), before=before))


def _build(demand: Demand, rank: int, schedule: Schedule, words: str, reason: str) -> Plan:
    passed, mask = isinstance(schedule.payload, Queries), demand.mask
    demand = demand.transposed if passed else demand
    built = assemble(
        demand,
        rank,
        functools.partial(schedule.phases, demand),
        schedule.moves(demand, rank),
        description=f"{schedule}: {words}",
        payload=schedule.payload,
        lookahead=schedule.lookahead,
        gradient_wire=schedule.gradient_wire,
        shape=None,
    )
    built = in_slices(built, schedule.head_slices)
    return dataclasses.replace(PassPlan.of(built, mask) if passed else built, reason=reason)
