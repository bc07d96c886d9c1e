"""The table of wrappers, some cells of it, and that it sees a wrong one."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from scripts.benchmarks import wrappers
from scripts.benchmarks.teams import Worker
from scripts.benchmarks.wrappers import Case, Trace
from tests.workers import Workers

TORCH = ("plain", "DDP", "FSDP2, flat", "FSDP2, HSDP")
CASES = [
    *(Case(name, 2, 2, 3, "one without labels") for name in TORCH),
    *(Case(name, 1, 4, 1, "uneven") for name in TORCH),
    Case("plain", 4, 1, 1, "one without labels"),
    *(Case(name, 2, 1, 1, "uneven", ulysses=2) for name in ("plain", "FSDP2, HSDP")),
    Case("FSDP2, HSDP", 1, 2, 1, "one without labels", ulysses=2),
]


def wrong(model: nn.Module, mesh: ringattn.Mesh, _: Case) -> wrappers.Step:
    """DDP whose average is taken for the sum."""
    return wrappers.torch_loop(nn.parallel.DistributedDataParallel(model), 1.0)


def cells(mesh: ringattn.Mesh) -> list[Trace | None]:
    worker = Worker(mesh.rank, mesh.size)
    devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    replicas = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "cp"))
    meshes = {(1, 4, 1): mesh}
    meshes |= {
        (d.size(0), d.size(1), 1): ringattn.Mesh.from_device_mesh(d, ring="cp", data="dp") for d in (devices, replicas)
    }
    meshes |= {(2, 1, 2): ringattn.init(1, 2), (1, 2, 2): ringattn.init(2, 2)}
    wrappers.WRAPPERS["wrong"] = wrong
    found = []
    for case in [*CASES, Case("wrong", 1, 4, 1, "uneven")]:
        worker.kept["mesh"] = meshes[case.mesh]
        found.append(wrappers.train(worker, case))
    return found


def test_wrappers_of_torch_train_as_one_process(gloo: Workers) -> None:
    *found, planted = gloo.run(4, cells)[0]
    for case, trace in zip(CASES, found, strict=True):
        expected = wrappers.one_process(case)
        assert trace is not None
        assert wrappers.difference(trace, expected).largest <= wrappers.ALLOWED, case
    assert planted is not None
    assert wrappers.difference(planted, expected_of(planted)).largest > 100 * wrappers.ALLOWED


def expected_of(_: Trace) -> Trace:
    return wrappers.one_process(Case("", 1, 4, 1, "uneven"))
