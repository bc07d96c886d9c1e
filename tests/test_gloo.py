"""What passes on virtual ranks passes unchanged on Gloo: results, bytes, agreement, join."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import Mesh
from ringattn.conformance import Case, attend, errors, joined, oracle, simulated
from ringattn.conformance.drawing import SCHEDULES
from ringattn.errors import InputError
from ringattn.groups import Groups
from ringattn.schedules.base import Schedule
from tests.workers import Workers

CASES = [
    Case(29, ringattn.Causal(), batch=2, kv_heads=2, groups=2, value_dim=12, use_lse=True),
    Case(257, ringattn.Documents([100, 1, 156]) & ringattn.Causal(), layout="contiguous", groups=3),
    Case(200, ringattn.Window(20) | ringattn.SinkTokens(3), layout="striped", dtype=torch.bfloat16),
    Case(64, ringattn.Full(), layout="zigzag", dtype=torch.float64),
    Case(2, ringattn.Causal(), layout="contiguous"),
    Case(0, ringattn.Full()),
    Case(50, ~ringattn.Full()),
]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_gloo_gives_the_bits_of_the_simulator(gloo: Workers, ranks: int, schedule: Schedule) -> None:
    for case in CASES:
        case = dataclasses.replace(case, ranks=ranks, schedule=schedule)
        found = joined(case, gloo.run(ranks, attend, case))
        virtual = simulated(case)
        assert all(torch.equal(found[name], virtual[name]) for name in found)
        if case.dtype != torch.bfloat16:
            assert max(errors(found, oracle(case)).values()) <= 1e-6


def _count_bytes(mesh: ringattn.Mesh, case: Case) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """What the transport counted in one forward and backward, and what the plan says."""
    sharding = ringattn.Sharding(case.length, mesh, case.layout, case.mask)
    assert mesh.transport is not None
    before = dataclasses.replace(mesh.transport.counters)
    attend(mesh, case)
    after = mesh.transport.counters
    heads = (case.kv_heads * case.groups, case.kv_heads)
    plan = ringattn.plan(
        case.mask,
        sharding,
        case.schedule,
        heads=heads,
        head_dims=(case.dim, case.value_dim),
        dtype=case.dtype,
        batch=case.batch,
    )
    t = plan.traffic()
    assert t.sent_bytes is not None and t.backward_sent_bytes is not None
    assert t.received_bytes is not None and t.backward_received_bytes is not None
    counted = (
        after.sent_bytes - before.sent_bytes,
        after.received_bytes - before.received_bytes,
        after.messages - before.messages,
    )
    return counted, (
        t.sent_bytes + t.backward_sent_bytes,
        t.received_bytes + t.backward_received_bytes,
        t.messages + t.backward_messages,
    )


@pytest.mark.parametrize("schedule", [*SCHEDULES, ringattn.Route(gradient_wire="input")], ids=repr)
def test_bytes_on_the_wire_are_the_plans_to_the_byte(gloo: Workers, schedule: Schedule) -> None:
    for case in CASES:
        case = dataclasses.replace(case, schedule=schedule)
        for counted, planned in gloo.run(4, _count_bytes, case):
            assert counted == planned


def _disagree(mesh: ringattn.Mesh, what: str) -> str:
    """Rank 1 calls with something else than the others; the error every rank gets."""
    odd = mesh.rank == 1
    length, mask = (24, ringattn.Causal()) if what != "mask" or not odd else (24, ringattn.Full())
    sharding = ringattn.Sharding(length, mesh, "striped" if odd and what == "layout" else "contiguous")
    heads = 4 if odd and what == "shapes" else 2
    if what == "explicit":
        runs = [[(0, 8)], [(8, 16)], [(16, 24)]]
        sharding = ringattn.Sharding(24, mesh, ringattn.Explicit(runs[::-1] if odd else runs))
    dtype = torch.bfloat16 if odd and what == "dtype" else torch.float32
    q, k, v = (torch.randn(1, heads, sharding.count, 8, dtype=dtype) for _ in range(3))
    q.requires_grad_(not (odd and what == "gradients"))
    schedule = ringattn.Ring() if odd and what == "schedule" else ringattn.Route()
    scale = 0.5 if odd and what == "mechanism" else None
    if odd and what == "refused":
        q = q[:, :, :1]
    if odd and what == "nothing":
        q = None  # type: ignore[assignment]
    try:
        if odd and what == "transformed":
            torch.func.vmap(lambda x: ringattn.attention(x, k, v, mask, sharding=sharding))(q[None])
        out = ringattn.attention(
            q,
            k,
            v,
            mask,
            sharding=sharding,
            schedule=schedule,
            mechanism=ringattn.Softmax(scale),
            kernel="sdpa" if odd and what == "kernel" else "onednn" if what == "kernel" else "auto",
        )
        if what == "call":
            _ = sharding.join(out, 2) if odd else out.sum().backward()
    except ringattn.RingAttentionError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


REFUSALS = {
    "refused": "InputError: Rank 1 holds 8 of the 24 queries",
    "nothing": "InputError: q must be a tensor; got NoneType",
    "transformed": "UnsupportedError: ringattn.attention cannot be called inside torch.func",
}


@pytest.mark.parametrize(
    "what",
    [
        "shapes",
        "dtype",
        "mask",
        "layout",
        "explicit",
        "schedule",
        "mechanism",
        "kernel",
        "gradients",
        "call",
        "refused",
        "nothing",
        "transformed",
    ],
)
def test_ranks_that_disagree_all_learn_who_differs_in_what(gloo: Workers, what: str) -> None:
    for run in (gloo.run(3, _disagree, what), ringattn.simulate(_disagree, what, ring=3).results):
        if what in REFUSALS:
            assert run[1].startswith(REFUSALS[what])
            assert all(said.startswith("AgreementError: Rank 1 refused this call") for said in (run[0], run[2]))
            continue
        field = "layout" if what == "explicit" else what
        assert all(said.startswith("AgreementError") and f"{field} (rank 0, 2: " in said for said in run), run
        assert all("; rank 1: " in said for said in run)


def _another_order(mesh: ringattn.Mesh) -> str:
    """Two equal calls; rank 1 runs their backward passes in another order than the others."""
    sharding = ringattn.Sharding(24, mesh)
    xs = [torch.randn(1, 2, sharding.count, 8, requires_grad=True) for _ in range(2)]
    outs = [ringattn.attention(x, x, x, ringattn.Causal(), sharding=sharding) for x in xs]
    try:
        for out in outs if mesh.rank == 1 else outs[::-1]:
            out.sum().backward()
    except ringattn.AgreementError as error:
        return str(error)
    return "no error"


def test_backward_in_another_order_is_a_disagreement(gloo: Workers) -> None:
    for run in (gloo.run(3, _another_order), ringattn.simulate(_another_order, ring=3).results):
        assert all("they differ in call (rank 0, 2: bwd " in said for said in run), run


def _join(mesh: ringattn.Mesh, length: int) -> bool:
    sharding = ringattn.Sharding(length, mesh, "zigzag")
    full = torch.randn(3, length, 2, generator=torch.Generator().manual_seed(0))
    part = sharding.split(full, 1).requires_grad_()
    joined = sharding.join(part, 1)
    (joined * full).sum().backward()
    assert part.grad is not None
    return torch.equal(joined, full) and torch.allclose(part.grad, mesh.size * sharding.split(full, 1))


@pytest.mark.parametrize("length", [0, 1, 3, 2999])
def test_join(gloo: Workers, length: int) -> None:
    assert all(gloo.run(4, _join, length))
    assert all(ringattn.simulate(_join, length, ring=7).results)


def _groups(mesh: Mesh) -> tuple[Any, ...]:
    from torch.distributed.device_mesh import init_device_mesh

    own = mesh.device_mesh()
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "dp"))
    named = Mesh.from_device_mesh(whole, ring="cp", data="dp")
    within = Mesh.from_device_mesh(whole["dp"], ring="dp")
    return (
        own.mesh.tolist(),
        own.mesh_dim_names,
        mesh.device_mesh(flat=True).mesh.tolist(),
        dist.get_process_group_ranks(mesh.data_group),
        named.device_mesh().mesh.tolist(),
        dist.get_process_group_ranks(named.data_group),
        dist.get_process_group_ranks(named.device_mesh().get_group("ring")),
        named.device_mesh(flat=True).mesh.tolist(),
        within.device_mesh().mesh.tolist(),
    )


def test_device_meshes_and_groups_of_replicas(gloo: Workers) -> None:
    for rank, found in enumerate(gloo.run(4, _groups)):
        cp, dp = divmod(rank, 2)
        assert found == (
            [[[0], [1], [2], [3]]],
            ("data", "ring", "ulysses"),
            [0, 1, 2, 3],
            [rank],
            [[[0], [2]], [[1], [3]]],
            [2 * cp, 2 * cp + 1],
            [dp, 2 + dp],
            [0, 1, 2, 3],
            [[[2 * cp], [2 * cp + 1]]],
        )


def _in_another_number_of_groups(mesh: Mesh) -> list[int]:
    """These ranks are: the first is in the groups of two and three ranks too, and torch names groups by that."""
    ranks = torch.arange(4).flip(0).view(4, 1, 1)
    replicas = dataclasses.replace(
        mesh, ring=1, data=4, transport=None, groups=Groups(ranks, mesh.device_mesh().get_group("data"))
    )
    return dist.get_process_group_ranks(replicas.data_group)


def test_groups_of_ranks_that_are_in_different_numbers_of_groups(gloo: Workers) -> None:
    assert gloo.run(4, _in_another_number_of_groups) == [[3, 2, 1, 0]] * 4


def test_a_mesh_without_processes_has_no_groups() -> None:
    with pytest.raises(InputError, match="no process groups"):
        ringattn.init().device_mesh()
