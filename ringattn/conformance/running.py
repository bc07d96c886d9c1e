"""A case run on the ranks of a mesh, and its parts put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ringattn.checking import instance
from ringattn.conformance.case import Case, checked_case
from ringattn.errors import InputError, PlanError
from ringattn.functional import attention
from ringattn.masks import Causal
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.total import Total
from ringattn.mesh import Mesh
from ringattn.plans.cost import Traffic
from ringattn.plans.plan import Plan
from ringattn.plans.planning import plan
from ringattn.plans.ulysses import verify
from ringattn.plans.wave import plan_wave
from ringattn.plans.wavefront import verify_waves
from ringattn.runtime.agreement import gathered
from ringattn.schedules.base import Scheme
from ringattn.sharding import Sharding
from ringattn.simulator import simulate

Results = dict[str, torch.Tensor]
"""By name: ``out``, ``lse`` where the mechanism has one, and with a backward pass ``dq``, ``dk``, ``dv`` and ``d`` and
the name of each learned tensor."""

NODE = 2
"""Neighbouring virtual ranks that share a node, for schedules that look at it; the last may be alone in its own."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One rank's results, and the positions of its queries and keys."""

    q_positions: torch.Tensor
    k_positions: torch.Tensor
    results: Results


def shardings(case: Case, mesh: Mesh) -> tuple[Sharding, Sharding]:
    """Who holds the queries, and who the keys."""
    own = Sharding(case.length, mesh, case.layout, case.mask if case.kv_length is None else None)
    return own, own if case.kv_length is None else Sharding(case.kv_length, mesh, case.kv_layout)


def attend(
    mesh: Mesh,
    case: Case,
    inputs: Sequence[torch.Tensor] | None = None,
    device: str | torch.device = "cpu",
    extras: bool = True,
) -> Part:
    """The call on this rank of a mesh, whose ranks count and not the case's number of them.

    Args:
        inputs: of the whole sequence, if not those that the case draws.
        device: where it is computed. The results are on the CPU.
        extras: whether the log-sum-exp is asked for, where there is one; by some schedules it travels then.
    """
    own, kv = shardings(checked_case(case), _on_axes(mesh, case.ulysses))
    pieces = zip((own, kv, kv, own, own), case.inputs() if inputs is None else inputs, strict=True)
    q, k, v, dout, dlse = (sharding.split(x, 2).clone().to(device) for sharding, x in pieces)
    mechanism = case.attends
    params = {
        name: (own.split(x, mechanism.sharded[name]) if name in mechanism.sharded else x).detach().clone().to(device)
        for name, x in mechanism.params.items()
    }
    leaves = {"q": q, "k": k, "v": v, **({} if case.deterministic else params)}
    for leaf in leaves.values():
        leaf.requires_grad_(case.backward)
    mechanism = dataclasses.replace(mechanism, **params) if params else mechanism
    found: Results = {}
    call: dict[str, Any] = {"sharding": own, "kv_sharding": kv, "mechanism": mechanism}
    call |= {"schedule": case.schedule, "kernel": case.kernel, "deterministic": case.deterministic}
    if extras and "lse" in mechanism.extras:
        found["out"], found["lse"] = attention(q, k, v, case.mask, return_lse=True, **call)
    else:
        found["out"] = attention(q, k, v, case.mask, **call)
    if case.backward:
        loss = (found["out"] * dout).sum()
        if case.use_lse:
            loss = loss + (found["lse"].masked_fill(~found["lse"].isfinite(), 0) * dlse).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return Part(own.positions, kv.positions, {name: x.detach().cpu() for name, x in found.items()})


def _on_axes(mesh: Mesh, ulysses: int) -> Mesh:
    """The ranks of a mesh, with so many of those of a sequence along the ulysses axis if there are to be several."""
    if ulysses == 1 or instance(mesh, Mesh, "mesh", "a ringattn.Mesh").ulysses == ulysses:
        return mesh
    if mesh.sequence_size % ulysses:
        raise InputError(f"ulysses is a divisor of the ranks; got {ulysses} of {mesh.sequence_size}.")
    return dataclasses.replace(mesh, ring=mesh.sequence_size // ulysses, ulysses=ulysses)


def joined(case: Case, parts: Sequence[Part]) -> Results:
    """The whole results: the ranks' parts in order of position, and of replicated tensors their sum, in float64.

    Raises:
        PlanError: the ranks' positions are not each of the sequence's, once, ascending on every rank: a layout's fault.
    """
    orders = [
        _order(case, [part.q_positions for part in parts], case.length),
        _order(case, [part.k_positions for part in parts], case.keys),
    ]
    whole, mechanism = {}, case.attends
    for name in parts[0].results:
        every = [part.results[name] for part in parts]
        if name[1:] in mechanism.params and name[1:] not in mechanism.sharded:
            whole[name] = torch.stack([x.double() for x in every]).sum(dim=0)
        else:
            dim = mechanism.sharded.get(name[1:], 2)
            whole[name] = torch.cat(every, dim=dim).index_select(dim, orders[name in ("dk", "dv")])
    return whole


def _order(case: Case, parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    positions = torch.cat(list(parts))
    ascending = all(bool((part[1:] > part[:-1]).all()) for part in parts)
    if not ascending or sorted(positions.tolist()) != list(range(length)):
        raise PlanError(f"The layout {case.layout} does not give each of {length} positions to one rank, ascending.")
    return positions.argsort()


def simulated(case: Case, inputs: Sequence[torch.Tensor] | None = None) -> Results:
    """The whole results of the case on virtual ranks."""
    return run(None, case, inputs)[0]


def run(mesh: Mesh | None, case: Case, inputs: Sequence[torch.Tensor] | None = None) -> tuple[Results, list[int]]:
    """The whole results of the case, and the bytes of payload that each rank has received for them.

    Args:
        mesh: the ranks of this process and others, which all make the same call; None for virtual ones.
    """
    if mesh is None:
        simulation = simulate(attend, case, inputs, ring=case.ranks, node=_node(case))
        return joined(case, simulation.results), [counters.received_bytes for counters in simulation.traffic]
    counters = mesh.connected().counters
    before = counters.received_bytes
    part = attend(mesh, case, inputs, mesh.connected().device)
    said = gathered(mesh.connected(), (part, counters.received_bytes - before), "conformance")
    return joined(case, [part for part, _ in said]), [moved for _, moved in said]


def _node(case: Case) -> int | None:
    """`NODE` for schedules that ask for nodes; others would do otherwise on ranks that know of none."""
    asks = isinstance(case.schedule, Scheme) and case.schedule.asks_for_nodes
    return NODE if asks else None


def planned_traffic(mesh: Mesh | None, case: Case) -> list[tuple[Traffic, tuple[int, int]]]:
    """What the plan of every rank moves, and receives in passes over keys alone, the first and each after it.

    All have been verified. ``mesh`` as for `run`.
    """
    mechanism, heads, dims = case.attends, (case.heads, case.kv_heads), (case.dim, case.value_dim)
    summed = mechanism.to_sum(*case.inputs()[:3])
    shape: dict[str, Any] = {"heads": heads, "head_dims": dims, "dtype": case.dtype, "batch": case.batch}
    node = _node(case) if mesh is None else mesh.node
    ulysses = case.ulysses if mesh is None else _on_axes(mesh, case.ulysses).ulysses
    meshes = [Mesh.virtual(case.ranks // ulysses, ulysses, rank, node) for rank in range(case.ranks)]
    every = [shardings(case, mesh) for mesh in meshes]
    if isinstance(mechanism, Ordered):
        waves = [plan_wave(own, kv, mechanism=mechanism, mask=case.mask, **shape) for own, kv in every]
        verify_waves(waves)
        return [(each.traffic(), (0, 0)) for each in waves]
    made = [plan(case.mask, own, case.schedule, kv, mechanism=mechanism, **shape) for own, kv in every]
    verify(made)
    traffic = [each.traffic() for each in made]
    if summed is not None:
        shape |= {"heads": (case.kv_heads, case.kv_heads), "head_dims": (1, summed.shape[3]), "dtype": summed.dtype}
        sums = [plan(Causal(), own, "auto", own, mechanism=Total(), **shape) for own, _ in every]
        verify(sums)
        traffic = [_together(one, other.traffic()) for one, other in zip(traffic, sums, strict=True)]
    return [(x, _before(each)) for x, each in zip(traffic, made, strict=True)]


def _before(plan: Plan) -> tuple[int, int]:
    first, later = (x.traffic().received_bytes or 0 for x in (plan.over_keys, plan.over_keys_again))
    return first, later


def _together(one: Traffic, other: Traffic) -> Traffic:
    """The first with the bytes that are received by both."""
    received = (one.received_bytes or 0) + (other.received_bytes or 0)
    returned = (one.backward_received_bytes or 0) + (other.backward_received_bytes or 0)
    return dataclasses.replace(one, received_bytes=received, backward_received_bytes=returned)
