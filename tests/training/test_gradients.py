"""Gradients: summed, measured, scaled and clipped, by wrappers of torch and by wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringattn
from ringattn.errors import AgreementError, InputError, UnsupportedError
from ringattn.training import clip_grad_norm, gradient_factor, scale_gradients, sum_gradients, total
from ringattn.training.gradients import BUCKET
from tests.workers import Workers


@pytest.mark.parametrize("ring", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_sum_over_ranks_is_in_rank_order(ring: int, count: int) -> None:
    values = torch.randn(ring, count)

    def add(mesh: ringattn.Mesh) -> Tensor:
        x = values[mesh.rank].clone()
        mesh.everyone.sum(x)
        return x

    expected = torch.zeros(count)
    for rank in range(ring):
        expected += values[rank]
    assert all(torch.equal(got, expected) for got in ringattn.simulate(add, ring=ring).results)


def test_gradients_of_every_kind_are_summed() -> None:
    """Several dtypes, a parameter that some ranks or none have a gradient of, a frozen one, several buckets."""

    def summed(mesh: ringattn.Mesh) -> list[Tensor | None]:
        model = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in (3, 5, 2, 4)])
        model.append(nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16)))
        model.append(nn.Parameter(torch.zeros(1), requires_grad=False))
        for i in (0, 1, 4):
            if not (i == 1 and mesh.rank == 0):
                model[i].grad = torch.full_like(model[i], mesh.rank + 1)
        sum_gradients(model, mesh)
        return [p.grad for p in model]

    for first, second, third, fourth, narrow, frozen in ringattn.simulate(summed, ring=3).results:
        assert first.tolist() == [6] * 3 and second.tolist() == [5] * 5 and narrow.tolist() == [[6] * 3] * 2
        assert third is fourth is frozen is None and narrow.dtype == torch.bfloat16


def test_long_gradients_travel_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringattn.training.gradients.BUCKET", 4)
    assert BUCKET > 4

    def summed(mesh: ringattn.Mesh) -> tuple[list[list[float]], int]:
        model = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in (3, 2, 2, 9)])
        for p in model:
            p.grad = torch.ones_like(p)
        sum_gradients(model, mesh)
        return [p.grad.tolist() for p in model if p.grad is not None], mesh.connected().counters.messages

    for sums, messages in ringattn.simulate(summed, ring=2).results:
        assert sums == [[2.0] * n for n in (3, 2, 2, 9)] and messages == 3 * 2


def test_ranks_that_train_other_parameters_all_hear_of_it() -> None:
    def told(mesh: ringattn.Mesh) -> None:
        model = nn.Linear(2, 2)
        model.bias.requires_grad_(mesh.rank != 1)
        with pytest.raises(AgreementError, match=r"differ in shapes .* Make the same model on all of them"):
            sum_gradients(model, mesh)

    ringattn.simulate(told, ring=3)


def test_a_share_is_summed_for_logging() -> None:
    def logged(mesh: ringattn.Mesh) -> float:
        share = torch.tensor(float(mesh.rank), requires_grad=True)
        assert not total(share, mesh).requires_grad
        return float(total(share, mesh))

    assert ringattn.simulate(logged, ring=4).results == [6.0] * 4


def plain(probe: nn.Module, x: Tensor) -> None:
    probe(x).backward()


def wrapped_by(
    scale: float, lost: tuple[int, ...] = ()
) -> Callable[[ringattn.Mesh], Callable[[nn.Module, Tensor], None]]:
    """A wrapper that sums, scales, and loses the gradients of some ranks."""

    def of(mesh: ringattn.Mesh) -> Callable[[nn.Module, Tensor], None]:
        def step(probe: nn.Module, x: Tensor) -> None:
            (probe(x) * (0.0 if mesh.rank in lost else scale)).backward()
            sum_gradients(probe, mesh)

        return step

    return of


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1.004 / 3, 0.4, 1 / 12])
def test_the_factor_of_a_wrapper_is_measured(scale: float) -> None:
    found = ringattn.simulate(lambda mesh: gradient_factor(wrapped_by(scale)(mesh), mesh), ring=3).results
    assert found == [pytest.approx(scale if scale in (1.0, 0.4, 1 / 12) else 1 / 3, rel=1e-6)] * 3
    assert scale == 0.4 or set(found) <= {1.0, 1 / 3, 1 / 12}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (wrapped_by(0.5, lost=(1,)), r"Rank \d gets times 0.5 those of rank 0, 2; not at all those of rank 1"),
        (lambda _: plain, r"Rank (0 gets times 1 those of rank 0; not at all those of rank 1, 2|\d gets)"),
        (wrapped_by(0.0), "not at all those of rank 0, 1, 2"),
    ],
    ids=["lost", "local", "none"],
)
def test_partial_sums_are_refused_on_every_rank(step: Any, said: str) -> None:
    def told(mesh: ringattn.Mesh) -> None:
        with pytest.raises(UnsupportedError, match=f"does not add up.*{said}.*these are partial sums"):
            gradient_factor(step(mesh), mesh)

    ringattn.simulate(told, ring=3)


def test_a_step_without_a_backward_pass_is_refused() -> None:
    with pytest.raises(InputError, match="left no gradient"):
        gradient_factor(lambda probe, x: None, ringattn.init())
    with pytest.raises(InputError, match=r"gradient, \[1\]; got \[2\]"):
        gradient_factor(lambda probe, x: torch.zeros(2), ringattn.init())
    assert gradient_factor(lambda probe, x: x * 0.5, ringattn.init()) == 0.5
    assert gradient_factor(lambda probe, x: [loss := probe(x), loss.backward()][0], ringattn.init()) == 1


def test_a_step_that_fails_on_one_rank_fails_on_all() -> None:
    def step(probe: nn.Module, x: Tensor) -> None:
        if x[1] != 0:
            raise ZeroDivisionError("planted")
        probe(x).backward()

    def told(mesh: ringattn.Mesh) -> None:
        expected, said = (
            (ZeroDivisionError, "planted") if mesh.rank == 1 else (UnsupportedError, "failed on rank 1 of 3")
        )
        with pytest.raises(expected, match=said):
            gradient_factor(step, mesh)

    ringattn.simulate(told, ring=3)


def test_clipping_and_scaling_are_those_of_torch() -> None:
    torch.manual_seed(0)
    for norm in (0.5, 100.0):
        ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = torch.randn_like(b)
            a.grad = b.grad / 8
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), norm)
        torch.testing.assert_close(clip_grad_norm(ours, norm, factor=0.125), expected)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    narrow = nn.ParameterList([nn.Parameter(torch.zeros(999, dtype=torch.bfloat16)) for _ in range(400)])
    for p in narrow:
        p.grad = torch.randn_like(p)
    exact = torch.cat([p.grad.double() for p in narrow if p.grad is not None]).norm()
    assert float(clip_grad_norm(narrow, 1.0)) == pytest.approx(float(exact), rel=1e-6)
    scale_gradients(ours, 2)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad / 2)  # type: ignore[operator]
    assert clip_grad_norm(nn.Linear(2, 2), 1.0) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [6e4, 300.7, 1e-5])
def test_a_norm_of_half_precision_has_the_range_and_digits_of_float32(dtype: torch.dtype, size: float) -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
    parameter.grad = torch.tensor([size, 0], dtype=dtype)
    before = parameter.grad.double().norm()
    assert abs(clip_grad_norm([parameter], 1.0) / before - 1) < 1e-6
    torch.testing.assert_close(parameter.grad.double().norm(), before.clamp(max=1), rtol=8e-3, atol=0)


def test_what_zero_holds_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.zeros(2, 2)
    model.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="gradient_clipping"):
        clip_grad_norm(model, 1.0)
    with pytest.raises(UnsupportedError, match="Divide the loss"):
        scale_gradients(model, 0.5)
    with pytest.raises(UnsupportedError, match="leave sum_gradients out"):
        sum_gradients(model, ringattn.init())


def _of_torch(mesh: ringattn.Mesh) -> dict[str, Any]:
    """What torch's wrappers do on two replicas of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    mesh = ringattn.Mesh.from_device_mesh(whole, ring="cp", data="dp")
    devices = mesh.device_mesh()

    def fsdp(on: Any, summed: bool = False) -> Callable[[nn.Module, Tensor], None]:
        def step(probe: nn.Module, x: Tensor) -> None:
            fully_shard(probe, mesh=on)
            if summed and isinstance(probe, FSDPModule):
                probe.set_gradient_divide_factor(1.0)
                probe.set_force_sum_reduction_for_comms(True)
            probe(x).backward()

        return step

    def ddp(group: Any) -> Callable[[nn.Module, Tensor], None]:
        def step(probe: nn.Module, x: Tensor) -> None:
            wrapped = DistributedDataParallel(probe, process_group=group)
            wrapped(x).backward()

        return step

    steps = {
        "ddp": ddp(None),
        "fsdp flat": fsdp(mesh.device_mesh(flat=True)),
        "fsdp hsdp": fsdp(devices["data", "ring"]),
        "fsdp summed": fsdp(mesh.device_mesh(flat=True), summed=True),
        "fsdp on replicas": fsdp(devices["data"]),
        "ddp on replicas": ddp(mesh.data_group),
        "ddp on the ring": ddp(devices.get_group("ring")),
    }
    found: dict[str, Any] = {}
    for name, step in steps.items():
        try:
            found[name] = gradient_factor(step, mesh)
        except UnsupportedError as error:
            found[name] = str(error)

    torch.manual_seed(0)
    plain, sharded = nn.Linear(7, 5), nn.Linear(7, 5)
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=devices["data", "ring"])
    x = torch.randn(4, 7)[mesh.rank : mesh.rank + 1]
    plain(x).square().sum().backward()
    sharded(x).square().sum().backward()
    sum_gradients(plain, mesh)
    norms = [float(clip_grad_norm(model, 1.5, factor=f)) for model, f in ((plain, 1.0), (sharded, 0.25))]
    clipped = [[p.grad for p in model.parameters() if p.grad is not None] for model in (plain, sharded)]
    found["norms"] = norms
    found["clipped"] = [float((a - b.full_tensor()).norm()) for a, b in zip(*clipped, strict=True)]
    return found


def test_wrappers_of_torch_are_measured_and_clipped(gloo: Workers) -> None:
    for found in gloo.run(4, _of_torch):
        assert [found[name] for name in ("ddp", "fsdp flat", "fsdp hsdp", "fsdp summed")] == [0.25, 0.25, 0.25, 1.0]
        assert all("partial sums" in found[name] for name in ("fsdp on replicas", "ddp on replicas", "ddp on the ring"))
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-6) and found["norms"][0] > 1.5
        assert max(found["clipped"]) < 1e-6
