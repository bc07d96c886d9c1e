"""Meshes of two axes on processes: their ranks and groups, attention, gradients and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ringattn
from ringattn import Mesh
from ringattn.conformance import Case, attend, errors, joined, oracle
from ringattn.training import Batch, checkpoint, gradient_factor, linear_cross_entropy, sum_gradients, total
from tests.workers import Workers

CASE = Case(61, ringattn.Documents([20, 1, 40]) & ringattn.Causal(), kv_heads=2, groups=2)
AXES = {"data": 1, "ring": 2, "ulysses": 2}, {"data": 2, "ring": 1, "ulysses": 2}, {"data": 1, "ring": 1, "ulysses": 4}


def _init(mesh: Mesh, ring: int, ulysses: int) -> Mesh:
    """By the workers' own launch, whichever it was."""
    assert mesh.transport is not None
    return ringattn.init(ring, ulysses, transport="mpi" if mesh.transport.name == "mpi" else "auto")


def _named(mesh: Mesh) -> list[tuple[Any, ...]]:
    """Of a DeviceMesh with each order of the names, and with one of them alone."""
    found: list[tuple[Any, ...]] = []
    for names in (("cp", "sp"), ("sp", "cp"), ("dp", "sp")):
        dims: dict[str, Any] = {
            axis: name for axis, name in (("ring", "cp"), ("ulysses", "sp"), ("data", "dp")) if name in names
        }
        own = Mesh.from_device_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=names), **dims)
        devices = own.device_mesh()
        groups = [devices.get_group(axis) for axis in ("data", "ring", "ulysses")]
        members = [sorted(dist.get_process_group_ranks(group)) for group in (*groups, own.data_group)]
        found.append((own.axes, own.rank, devices.mesh.tolist(), members))
    only = Mesh.from_device_mesh(init_device_mesh("cpu", (4,), mesh_dim_names=("sp",)), ulysses="sp")
    return [*found, (only.axes, only.rank, only.device_mesh().mesh.tolist(), only.device_mesh(flat=True).mesh.tolist())]


def test_a_device_mesh_of_two_dimensions_of_sequence_ranks(gloo: Workers) -> None:
    for rank, found in enumerate(gloo.run(4, _named)):
        row, column = divmod(rank, 2)
        rows, columns = [2 * row, 2 * row + 1], [column, column + 2]
        assert found == [
            (AXES[0], rank, [[[0, 1], [2, 3]]], [[rank], columns, rows, [rank]]),
            (AXES[0], 2 * column + row, [[[0, 2], [1, 3]]], [[rank], rows, columns, [rank]]),
            (AXES[1], rank, [[[0, 1]], [[2, 3]]], [columns, [rank], rows, columns]),
            (AXES[2], rank, [[[0, 1, 2, 3]]], [0, 1, 2, 3]),
        ]


def _attends(mesh: Mesh, ring: int, ulysses: int) -> tuple[dict[str, int], dict[str, int], bytes]:
    own = _init(mesh, ring, ulysses)
    return own.axes, own.coordinates, pickle.dumps(attend(own, CASE))


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("launched", ["gloo", "mpi"])
def test_init_of_two_axes_and_replicas_beside_them(
    request: pytest.FixtureRequest, launched: str, axes: dict[str, int]
) -> None:
    workers: Workers = request.getfixturevalue(launched)
    ring, ulysses = axes["ring"], axes["ulysses"]
    found = workers.run(4, _attends, ring, ulysses)
    for rank, (sizes, place, _) in enumerate(found):
        assert sizes == axes
        assert place == {
            "data": rank // (ring * ulysses),
            "ring": rank // ulysses % ring,
            "ulysses": rank % ulysses,
        }
    case = dataclasses.replace(CASE, ranks=ring * ulysses)
    for replica in range(axes["data"]):
        parts = [pickle.loads(part) for _, place, part in found if place["data"] == replica]
        assert max(errors(joined(case, parts), oracle(case)).values()) <= 1e-6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(256, 32), nn.Linear(32, 256, bias=False)

    def loss(self, batch: Batch) -> Tensor:
        q = self.embed(batch.tokens).unflatten(-1, (4, 8)).transpose(1, 2)
        x = batch.attend(q, q[:, :2], q[:, 2:]).transpose(1, 2).flatten(2)
        return linear_cross_entropy(x, self.head.weight, batch)


def _trained(mesh: Mesh, folder: str, save: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of two samples; with weights that are saved, or those that were."""
    model = Model()
    if save:
        model.embed.weight.data.mul_(1.5)
        checkpoint.save(folder, model=model, step=1, mesh=mesh)
    else:
        checkpoint.load(folder, model=model, mesh=mesh)
    samples = [torch.randint(256, (1, 29), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mine = samples if mesh.data == 1 else samples[mesh.coordinates["data"] :][:1]
    batches = [Batch(sample, mesh, documents=[9, 20]) for sample in mine]
    loss = sum((model.loss(batch) / (2 // mesh.data) for batch in batches), torch.zeros(()))
    loss.backward()
    sum_gradients(model, mesh)
    return float(total(loss.detach(), mesh)), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def _trains(mesh: Mesh, ring: int, ulysses: int, folder: str, save: bool) -> Any:
    return _trained(_init(mesh, ring, ulysses), folder, save)


def test_training_on_two_axes_is_that_of_one_process(gloo: Workers, tmp_path: Path) -> None:
    """Batches, losses, sums of gradients, and checkpoints of one mesh loaded on another."""
    found = gloo.run(4, _trains, 2, 2, str(tmp_path), True) + gloo.run(4, _trains, 1, 2, str(tmp_path), False)
    loss, gradients = _trained(Mesh.local(), str(tmp_path), False)
    for other, theirs in found:
        assert other == pytest.approx(loss, rel=1e-6)
        for name, x in gradients.items():
            assert float((theirs[name] - x).norm() / x.norm()) <= 1e-6, name


def _step(part: DeviceMesh, probe: nn.Module, x: Tensor) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(probe, mesh=part)
    probe(x).backward()


def _factors(mesh: Mesh) -> list[float | str]:
    own = ringattn.init(1, 2)  # two replicas
    devices = own.device_mesh()
    found: list[float | str] = []
    for part in (own.device_mesh(flat=True), devices["data", "ulysses"], devices["data", "ring"], devices["data"]):
        try:
            found.append(gradient_factor(functools.partial(_step, part), own))
        except ringattn.UnsupportedError as error:
            found.append(str(error))
    return found


def test_wrappers_over_some_axes_alone_are_refused(gloo: Workers) -> None:
    for flat, hybrid, *others in gloo.run(4, _factors):
        assert (flat, hybrid) == (0.25, 0.25)
        assert all("partial sums" in str(said) for said in others)
