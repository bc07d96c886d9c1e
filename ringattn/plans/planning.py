"""`plan` and `plan_all`: a mask, a sharding and a schedule made into plans."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

from ringattn import bands
from ringattn.bands import Array
from ringattn.checking import instance
from ringattn.errors import InputError, UnsupportedError
from ringattn.layouts import Layout
from ringattn.masks import Mask, checked
from ringattn.mechanisms.base import Mechanism, Summarising
from ringattn.mechanisms.ordered import Ordered
from ringattn.mesh import Mesh
from ringattn.payloads.queries import Queries
from ringattn.plans.assembly import assemble
from ringattn.plans.choice import (
    along_ring,
    best_schedule,
    chosen_schedule,
    dealt_heads,
    named_schedule,
    serving,
)
from ringattn.plans.deal import deal
from ringattn.plans.demand import Demand
from ringattn.plans.passing import PassPlan
from ringattn.plans.plan import Plan
from ringattn.plans.shape import Shape
from ringattn.plans.shaping import shape_of, shaped
from ringattn.plans.slices import in_slices
from ringattn.plans.swap import Swap
from ringattn.plans.ulysses import UlyssesPlan, composed
from ringattn.readable import shortened
from ringattn.schedules import Schedule, Scheme, Ulysses
from ringattn.sharding import Sharding

MAX_PLANS = 1 << 17  # at once: half a minute


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
        schedule: a schedule, its name, or ``auto``: the one by which all ranks together receive fewer positions; where
            the shape is known, on two axes, several nodes, or with keys of another sharding the quickest by estimate.
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
    shape = shape_of(heads, head_dims, dtype, batch, mechanism)
    asked, reason = _resolved(schedule, mask, (sharding, kv), heads, mechanism, shape)
    if isinstance(asked, Ulysses):
        along = along_ring(asked, sharding.mesh, heads)
        inner = flat_plan(mask, sharding.grouped, along, kv.grouped, mechanism)
        made: Plan = _composed(asked, inner, (sharding, kv), heads)
    else:
        made = flat_plan(mask, sharding, asked, kv, mechanism)
    return _told(made, reason, shape, mechanism)


def _resolved(
    schedule: Scheme | str,
    mask: Mask,
    shardings: tuple[Sharding, Sharding],
    heads: tuple[int, int] | None,
    mechanism: Mechanism | None,
    shape: Shape | None,
) -> tuple[Scheme | None, str]:
    """The schedule, as asked for or by ``auto``, which the sharding keeps, and why; None for ring, route or scan."""
    asked, (sharding, kv) = named_schedule(schedule, heads), shardings
    if asked is not None:
        return asked, ""
    key = (mask, _other(sharding, kv), shape, None if mechanism is None else mechanism.text)
    if key not in sharding.plans:
        sharding.plans.keep(key, _auto(mask, sharding, kv, mechanism, shape))
    found: tuple[Scheme | None, str] = sharding.plans[key]
    return found


def _told(made: Plan, reason: str, shape: Shape | None, mechanism: Mechanism | None) -> Plan:
    """A plan that knows its shape, and why its schedule was taken."""
    return shaped(dataclasses.replace(made, reason=reason or made.reason), shape, mechanism)


def _auto(
    mask: Mask, sharding: Sharding, kv: Sharding, mechanism: Mechanism | None, shape: Shape | None
) -> tuple[Scheme | None, str]:
    """What ``auto`` takes, and why, where there is more to choose than by which keys travel; else None."""
    mesh = sharding.mesh
    if shape is None or mesh.sequence_size == 1 or not (mesh.crosses_nodes or mesh.ulysses > 1 or kv != sharding):
        return None, ""
    grouped = _demand(mask, sharding.grouped, kv.grouped) if mesh.ulysses > 1 else None
    return best_schedule(_demand(mask, sharding, kv), grouped, shape, mechanism, mesh)


def flat_plan(
    mask: Mask, sharding: Sharding, schedule: Scheme | None, kv: Sharding, mechanism: Mechanism | None = None
) -> Plan:
    """This rank's plan by a schedule over all ranks of the mesh, or None for ``auto``, of any shape."""
    demand, words = _demand(mask, sharding, kv), _words(mask, sharding, kv)
    check_causal(demand, mechanism)
    taken, reason = chosen_schedule(schedule, demand, mechanism, sharding.mesh.links)
    return _build(demand, sharding.mesh.sequence_rank, taken, words, reason)


def verified_plan(
    mask: Mask,
    sharding: Sharding,
    schedule: Scheme | str = "auto",
    kv_sharding: Sharding | None = None,
    *,
    mechanism: Mechanism | None = None,
    deterministic: bool = False,
    **shape: Any,
) -> Plan:
    """`plan`, verified and kept by the sharding: another shape, or mechanism that reads the same, needs no other.

    Args:
        deterministic: whether ``auto`` must bring keys to queries, all heads at once.

    Raises:
        PlanError: the plan is wrong.
    """
    kv = sharding if kv_sharding is None else kv_sharding
    heads, made = shape.get("heads"), shape_of(mechanism=mechanism, **shape)
    if deterministic:
        taken, reason = named_schedule(schedule, heads), ""
    else:
        taken, reason = _resolved(schedule, mask, (sharding, kv), heads, mechanism, made)
    if isinstance(taken, Ulysses):
        found: Plan = _verified_in_groups(mask, sharding, taken, kv, mechanism, heads)
    else:
        found = _verified(mask, sharding, taken, kv, mechanism)
    return _told(found, reason, made, mechanism)


def _verified_in_groups(
    mask: Mask,
    sharding: Sharding,
    schedule: Ulysses,
    kv: Sharding,
    mechanism: Mechanism | None,
    heads: tuple[int, int] | None,
) -> UlyssesPlan:
    """The plan in which heads are exchanged, verified and kept by the sharding."""
    inner = _verified(mask, sharding.grouped, along_ring(schedule, sharding.mesh, heads), kv.grouped, mechanism)
    key = (mask, _other(sharding, kv), schedule, inner.hash, heads)
    kept: UlyssesPlan | None = sharding.plans.get(key)
    if kept is None:
        kept = _composed(schedule, inner, (sharding, kv), heads)
        kept.verify()
        sharding.plans.keep(key, kept)
    return kept


def _verified(
    mask: Mask, sharding: Sharding, schedule: Scheme | None, kv: Sharding, mechanism: Mechanism | None
) -> Plan:
    """`flat_plan`, verified and kept by the sharding."""
    if schedule is not None:
        serving(schedule, mechanism)
    key = (
        mask,
        _other(sharding, kv),
        schedule,
        isinstance(mechanism, Summarising),
        mechanism is not None and mechanism.causal,
    )
    kept: Plan | None = sharding.plans.get(key)
    if kept is None:
        kept = flat_plan(mask, sharding, schedule, kv, mechanism)
        kept.verify()
        sharding.plans.keep(key, kept)
    return kept


def _other(sharding: Sharding, kv: Sharding) -> tuple[int, Layout] | None:
    """What tells the keys' sharding from that of the queries; None where it is the same."""
    return None if kv == sharding else (kv.length, kv.layout)


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
    words = f"{schedule}: on {queries.mesh.ring} x {queries.mesh.ulysses}, {inner.description}"
    made = composed(
        inner, swap, queries.mesh.sequence_size, queries.spans, keys.spans, words, queries.mesh.sequence_node
    )
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
        deal(*dealt_heads(heads), mesh.ulysses, schedule.slices),
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
    shape = shape_of(heads, head_dims, dtype, batch, mechanism)
    asked, reason = _resolved(schedule, mask, (sharding, kv_sharding), heads, mechanism, shape)
    if not isinstance(asked, Ulysses):
        plans = _all_flat(mask, sharding, asked, kv_sharding, mechanism)
        return [_told(x, reason, shape, mechanism) for x in plans]
    along = along_ring(asked, mesh, heads)
    rings = _all_flat(mask, sharding.grouped, along, kv_sharding.grouped, mechanism)
    shardings = sharding, kv_sharding
    made = (_composed(asked, rings[rank // ulysses], shardings, heads, rank) for rank in range(mesh.sequence_size))
    return [_told(x, reason, shape, mechanism) for x in made]


def _all_flat(
    mask: Mask, sharding: Sharding, schedule: Scheme | None, kv: Sharding, mechanism: Mechanism | None
) -> list[Plan]:
    demand = _demand(mask, sharding, kv).for_all_ranks()
    check_causal(demand, mechanism)
    taken, reason = chosen_schedule(schedule, demand, mechanism, None)
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
