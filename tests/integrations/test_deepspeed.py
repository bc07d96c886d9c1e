"""DeepSpeed on a mesh: factors, the same steps as one process, refusals, its checkpoints, its attention module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from ringattn.errors import InputError, UnsupportedError
from ringattn.integrations.deepspeed import DistributedAttention, initialize
from ringattn.training import gradient_factor
from scripts.benchmarks import wrappers
from scripts.benchmarks.teams import Worker
from tests.workers import Workers

SMALL: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}


def replicas(of: int) -> ringattn.Mesh:
    """Replicas of two ranks each."""
    return ringattn.Mesh.from_device_mesh(
        init_device_mesh("cpu", (of, 2), mesh_dim_names=("dp", "cp")), ring="cp", data="dp"
    )


def started(mesh: ringattn.Mesh, config: dict[str, Any] | Path, seed: int = 0) -> tuple[Any, float]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    return initialize(model, mesh, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def factors(mesh: ringattn.Mesh, file: str) -> dict[str, Any]:
    import deepspeed.comm as comm

    pairs = replicas(2)
    found: dict[str, Any] = {}
    for stage in range(4):
        config = {**SMALL, "zero_optimization": {"stage": stage}}
        found[f"{stage}"] = started(mesh, config)[1]
        found[f"{stage}, replicas"] = started(pairs, {**config, "gradient_accumulation_steps": 3})[1]
        found[f"{stage}, bf16"] = started(pairs, {**config, "bf16": {"enabled": True}})[1]
    found["file"] = started(mesh, Path(file))[1]
    found["sum"] = started(mesh, {**SMALL, "gradient_allreduce_op": "sum"})[1]
    found["compiled"] = comm.comm.cdb.shm_comm_op
    return found


def test_the_factor_is_measured_and_nothing_is_compiled(gloo: Workers, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"train_batch_size": 6, "gradient_accumulation_steps": 2, **SMALL, SIZES[1]: 3}))
    for found in gloo.run(4, factors, str(file)):
        assert found.pop("compiled") is None
        assert found.pop("file") == 1 / 8 and found.pop("sum") == 1
        assert set(found.values()) == {1 / 4, 1 / 12}
        assert all((factor == 1 / 12) == name.endswith("replicas") for name, factor in found.items())


SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def cells(mesh: ringattn.Mesh) -> list[wrappers.Trace | None]:
    worker = Worker(mesh.rank, mesh.size)
    found = []
    for data, shards in ((1, "one without labels"), (2, "uneven")):
        worker.kept["mesh"] = replicas(2) if data == 2 else mesh
        for stage in range(4):
            found.append(wrappers.train(worker, wrappers.Case(f"ZeRO {stage}", data, 4 // data, 3, shards)))
    return found


def test_five_clipped_steps_are_those_of_one_process(gloo: Workers) -> None:
    found, *_ = gloo.run(4, cells)
    for i, (data, shards) in enumerate(((1, "one without labels"), (2, "uneven"))):
        expected = wrappers.one_process(wrappers.Case("", data, 4 // data, 3, shards))
        for trace in found[4 * i :][:4]:
            assert trace is not None
            assert wrappers.difference(trace, expected).largest <= wrappers.ALLOWED


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"sequence_parallel_size": 2}, {}, "'sequence_parallel_size' is not for a ringattn mesh.*partial sums"),
        ({"data_parallel_size": 2}, {}, "'data_parallel_size' is not.*partial sums"),
        ({"tensor_parallel": {"autotp_size": 2}}, {}, "'tensor_parallel' is not.*no parts of a layer"),
        ({"managed_gradient_accumulation": False}, {}, "'managed_gradient_accumulation' is not.*gradient_accum"),
        ({}, {"mpu": object()}, r"initialize\(mpu=...\) is not.*partial sums"),
        ({}, {"mesh_param": (2, 2)}, r"initialize\(mesh_param=...\) is not.*partial sums"),
        ({}, {"training_data": [1]}, "ringattn.training.Loader"),
        ({}, {"optimizer": None}, "trains with an optimizer"),
        ({SIZES[0]: 4, SIZES[1]: 2, SIZES[2]: 2}, {}, r"replicas, here 2 \* 2 \* 2; got 4"),
        ({SIZES[0]: 3}, {}, r"here 1 \* 1 \* 2; got 3"),
        ({SIZES[1]: 0}, {}, "train_micro_batch_size_per_gpu is"),
        ({SIZES[1]: "auto"}, {}, "train_micro_batch_size_per_gpu is"),
        ("/nowhere.json", {}, "cannot be read from /nowhere.json"),
        (3, {}, "got 3"),
        ({}, {}, "there are none; this mesh has 4"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_started(config: Any, options: Any, said: str) -> None:
    given = {"optimizer": torch.optim.SGD([torch.zeros(1)])} | options
    with pytest.raises(InputError, match=said):
        initialize(nn.Linear(1, 1), ringattn.Mesh(ring=2, data=2), config, **given)


def left_over(mesh: ringattn.Mesh) -> str:
    """What another engine of the process has told DeepSpeed about sequences, which DeepSpeed keeps."""
    from deepspeed.utils import groups

    groups.mesh_device = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "sequence_parallel"))
    try:
        started(replicas(2), {**SMALL, "zero_optimization": {"stage": 2}})
    except UnsupportedError as error:
        return str(error)
    finally:
        groups.mesh_device = None
    return "started"


def test_partial_sums_of_whatever_cause_are_refused(gloo: Workers) -> None:
    for said in gloo.run(4, left_over):
        assert "partial sums" in said


def told_of_the_sequence(mesh: ringattn.Mesh) -> dict[str, str]:
    worker = Worker(mesh.rank, mesh.size)
    worker.kept["mesh"] = replicas(2)
    return wrappers.partial_sums(worker)


def test_what_deepspeed_is_told_of_a_sequence_gives_partial_sums(gloo: Workers) -> None:
    """The table's list: where a later version sums all of them, the list, and what is refused, may be shorter."""
    for said in gloo.run(4, told_of_the_sequence):
        right = {name for name, text in said.items() if "not at all those of rank" not in text}
        assert right == {
            *(f"ZeRO {stage}, an mpu with sequence-data groups" for stage in range(3)),
            "ZeRO 3, mesh_param=(2, 2)",
            "ZeRO 3, sizes of sequences and replicas in its config",
        }


def by_hand(mesh: ringattn.Mesh) -> dict[str, float]:
    """The probe, around `deepspeed.initialize` itself."""
    found = {}
    for stage in range(4):
        found[f"{stage}"] = gradient_factor(wrappers.with_deepspeed(stage, {}), mesh)
    return found


def test_deepspeed_needs_no_word_of_the_sequence(gloo: Workers) -> None:
    gloo.run(4, _start)  # so that nothing is compiled
    for found in gloo.run(4, by_hand):
        assert set(found.values()) == {0.25}


def _start(mesh: ringattn.Mesh) -> None:
    started(mesh, SMALL)


def own_checkpoint(mesh: ringattn.Mesh, folder: str, stage: int) -> tuple[list[float], list[float], int]:
    config = {**SMALL, "zero_optimization": {"stage": stage}}
    engine, factor = started(mesh, config)
    losses = [_step(engine, factor, mesh, turn) for turn in range(2)]
    engine.save_checkpoint(folder, client_state={"turn": 2})
    losses += [_step(engine, factor, mesh, turn) for turn in range(2, 4)]
    other, factor = started(mesh, config, seed=1)
    _, state = other.load_checkpoint(folder)
    return losses[2:], [_step(other, factor, mesh, turn) for turn in range(2, 4)], state["turn"]


def _step(engine: Any, factor: float, mesh: ringattn.Mesh, turn: int) -> float:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * turn + mesh.rank))
    share = engine(x).square().sum() / (5 * mesh.size)
    engine.backward(share / factor)
    engine.step()
    return float(share.detach())


@pytest.mark.parametrize("stage", range(4))
def test_its_own_checkpoints_work(gloo: Workers, tmp_path: Path, stage: int) -> None:
    for expected, found, turn in gloo.run(4, own_checkpoint, str(tmp_path), stage):
        assert found == expected and turn == 2


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def attended(mesh: ringattn.Mesh, batch_dim: int) -> list[tuple[Tensor, ...]]:
    """DeepSpeed's module around PyTorch's attention, and ours: outputs and gradients."""
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention as Theirs

    torch.manual_seed(mesh.rank)
    shape = (2, 5, 4, 8) if batch_dim == 0 else (5, 2, 4, 8)
    inputs = [torch.randn(shape) for _ in range(3)]
    order = (0, 2, 1, 3) if batch_dim == 0 else (1, 2, 0, 3)
    back = (0, 2, 1, 3) if batch_dim == 0 else (2, 0, 1, 3)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(order) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(back).contiguous()

    assert deepspeed.comm.is_initialized()
    theirs = Theirs(local, dist.group.WORLD, scatter_idx=2, gather_idx=1 - batch_dim)
    ours = [
        DistributedAttention(mesh, ringattn.Causal()),
        DistributedAttention(local, _world(), scatter_idx=2, gather_idx=1 - batch_dim),
        DistributedAttention(local, mesh, 2, 1 - batch_dim, num_kv_heads=4),
    ]
    results = []
    for attend in (theirs, *ours):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, batch_dim)
        out.square().sum().backward()
        results.append((out.detach(), *(x.grad for x in leaves if x.grad is not None)))
    return results


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_its_attention_module_is_ours(gloo: Workers, batch_dim: int) -> None:
    gloo.run(4, _start)
    for theirs, *results in gloo.run(4, attended, batch_dim):
        for ours in results:
            assert len(theirs) == len(ours) == 4
            for a, b in zip(theirs, ours, strict=True):
                assert a.shape == b.shape and (a - b).norm() <= 2e-6 * a.norm()


def rotated(mesh: ringattn.Mesh) -> tuple[Tensor, Tensor]:
    """DeepSpeed's module and ours with a rotary embedding and an argument of the local attention."""
    from deepspeed.sequence.layer import DistributedAttention as Theirs

    def local(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()

    angles = torch.arange(20.0).view(20, 1, 1, 1) * torch.linspace(0.1, 1, 4).repeat(2)
    torch.manual_seed(mesh.rank)
    q, k, v = (torch.randn(1, 5, 4, 8) for _ in range(3))
    theirs, ours = (kind(local, _world(), 2, 1) for kind in (Theirs, DistributedAttention))
    return tuple(layer(q, k, v, 0, (angles.cos(), angles.sin()), 0.3) for layer in (theirs, ours))


def test_its_attention_module_rotates_as_theirs(gloo: Workers) -> None:
    gloo.run(4, _start)
    for theirs, ours in gloo.run(4, rotated):
        assert (theirs - ours).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (5, 1), (8, 2), (3, 3), (12, 4)])
@pytest.mark.parametrize("lengths", [(3, 3, 3), (1, 7, 2), (4, 0, 5)])
def test_around_a_local_attention_heads_and_lengths_are_any(
    heads: int, kv_heads: int, lengths: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    size = sum(lengths)
    inputs = [torch.randn(2, size, count, dim) for count, dim in ((heads, 4), (kv_heads, 4), (kv_heads, 3), (heads, 3))]

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    def results(attend: Any, rows: slice) -> list[Tensor]:
        q, k, v, dout = (x[:, rows].clone() for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attend(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def sharded(mesh: ringattn.Mesh) -> list[Tensor]:
        start = sum(lengths[: mesh.rank])
        layer = DistributedAttention(local, mesh, gather_idx=1)
        return results(lambda q, k, v: layer(q, k, v, 0), slice(start, start + lengths[mesh.rank]))

    expected = results(local, slice(None))
    run = ringattn.simulate(sharded, ring=3)
    for wanted, *parts in zip(expected, *run.results, strict=True):
        assert (torch.cat(parts, 1) - wanted).norm() <= 1e-6 * wanted.norm()
    assert run.traffic[0].messages == 4 * 2 or 0 in lengths  # to either other rank: out and home, forward and backward


def test_its_attention_module_takes_any_number_of_heads() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 9, 6, 4), torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4)
    expected = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)

    def attend(mesh: ringattn.Mesh) -> Tensor:
        layer = DistributedAttention(mesh, ringattn.Causal(), schedule="ring")
        own = slice(3 * mesh.rank, 3 * mesh.rank + 3)
        return layer(q[:, own], k[:, own], v[:, own], 0)  # type: ignore[no-any-return]

    found = torch.cat(ringattn.simulate(attend, ring=3).results, 1)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda layer, x: layer(x, x, x, 2), "batch_dim_idx is 0"),
        (lambda layer, x: layer(x, x, x, 0, (x, x)), "rotary_pos_emb is of the whole sequence"),
        (lambda layer, x: layer(x[0], x, x, 0), "four dimensions; got 3, 4, 4"),
        (lambda layer, x: DistributedAttention(layer.mesh, layer.mask, return_lse=True), "got return_lse"),
        (lambda layer, x: DistributedAttention(max, layer.mesh, scatter_idx=1), "Heads are dim 2"),
        (lambda layer, x: DistributedAttention(max, layer.mesh, sp_stream=cast("None", 3)), "Leave it out"),
        (lambda layer, x: DistributedAttention(max, layer.mesh, schedule="ring"), "no options here.*schedule"),
        (lambda layer, x: DistributedAttention(layer.mask, layer.mask), "a mesh, where a mask says"),
        (lambda layer, x: DistributedAttention(max, layer.mesh, num_kv_heads=2)(x, x, x), "for 2 key heads; got 3"),
        (lambda layer, x: DistributedAttention(max, layer.mesh)(x, x, x, 0), "Dim 0 counts sequences"),
        (lambda layer, x: DistributedAttention(lambda q, k, v: q[0], layer.mesh, 2, 1)(x, x, x), "gives the shape"),
        (lambda layer, x: DistributedAttention(max, layer.mesh, 2, 1)(x[:, :, :2], x, x), "a multiple of key heads"),
    ],
)
def test_what_its_attention_module_cannot_do_is_refused(call: Any, said: str) -> None:
    layer = DistributedAttention(ringattn.Mesh.local(), ringattn.Causal())
    with pytest.raises(InputError, match=said):
        call(layer, torch.zeros(1, 2, 3, 4))
