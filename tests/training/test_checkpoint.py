"""Checkpoints: exact at any number of ranks and in any wrapper, whole or not there, never code, refused by all."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ringattn
from ringattn.errors import AgreementError, CheckpointError, InputError, UnsupportedError
from ringattn.training import checkpoint
from ringattn.training.storage import MANIFEST, complete
from tests.workers import Workers

ROOT = Path(__file__).parents[2]
WRAPPERS = ("plain", "ddp", "fsdp2")


class Model(nn.Module):
    """Odd sizes, a scalar, a buffer, a tied weight and one that is not trained."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, width)
        self.second = nn.Sequential(nn.Linear(width, 7, bias=False), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        out: Tensor = x + self.second(self.first(x).relu()) * self.scale
        return out


def wrapped(model: nn.Module, wrapper: str, mesh: ringattn.Mesh) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model, process_group=mesh.device_mesh(flat=True).get_group())
    if wrapper == "fsdp2":
        fully_shard(model, mesh=mesh.device_mesh(flat=True))
    return model


def made(wrapper: str, mesh: ringattn.Mesh, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = wrapped(Model(seed), wrapper, mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Some steps on the same tokens on every rank."""
    losses = []
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and states by name, whole."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = {name: whole(x.detach()).clone() for name, x in inner.state_dict().items()}
    for name, p in inner.named_parameters():
        found |= {f"{name} {key}": whole(x).clone() for key, x in optimizer.state[p].items()}
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def saved(mesh: ringattn.Mesh, folder: str, wrapper: str) -> tuple[dict[str, Tensor], list[float]]:
    """Three steps, a checkpoint, and what the next two give."""
    model, optimizer = made(wrapper, mesh)
    trained(model, optimizer, range(3))
    optimizer.param_groups[1]["lr"] = 0.003
    checkpoint.save(folder, model=model, optimizer=optimizer, step=3, data={"epoch": [1, 2]}, mesh=mesh)
    return snapshot(model, optimizer), trained(model, optimizer, range(3, 5))


def loaded(mesh: ringattn.Mesh, folder: str, wrapper: str) -> tuple[dict[str, Tensor], list[float]]:
    model, optimizer = made(wrapper, mesh, seed=1)
    state = checkpoint.load(folder, model=model, optimizer=optimizer, mesh=mesh)
    assert (state.step, state.data) == (3, {"epoch": [1, 2]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.003]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    return snapshot(model, optimizer), trained(model, optimizer, range(3, 5))


@pytest.mark.parametrize("source", WRAPPERS)
def test_what_one_wrapper_saves_every_other_loads_at_any_number_of_ranks(
    gloo: Workers, tmp_path: Path, source: str
) -> None:
    (before, losses), *_ = gloo.run(4, saved, str(tmp_path), source)
    for target, ranks in (("plain", 1), ("plain", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4)):
        if ranks == 1:
            results = [loaded(ringattn.Mesh.local(), str(tmp_path), target)]
        else:
            results = gloo.run(ranks, loaded, str(tmp_path), target)
        for after, further in results:
            assert equal(after, before), (target, ranks)
            assert further == pytest.approx(losses, rel=1e-6)


def tied() -> nn.Module:
    model = Model()
    model.second[1].weight = nn.Parameter(model.first.weight.detach().T.repeat(1, 2)[:, :7].clone())
    model.again = model.second[1]
    return model


def two_replicas(_: ringattn.Mesh, folder: str, load: bool) -> tuple[dict[str, Tensor], float]:
    """Two replicas of two ranks in HSDP, a module in two places; and a number that is the same within a replica."""
    torch_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    mesh = ringattn.Mesh.from_device_mesh(torch_mesh, ring="cp", data="dp")
    model = tied()
    fully_shard(model, mesh=torch_mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(mesh.coordinates["data"] + 10 * load)
    if load:
        checkpoint.load(folder, model=model, optimizer=optimizer, mesh=mesh)
    else:
        trained(model, optimizer, range(2))
        checkpoint.save(folder, model=model, optimizer=optimizer, step=2, mesh=mesh)
    return snapshot(model, optimizer), float(torch.rand(()))


def test_virtual_ranks_save_and_load(tmp_path: Path) -> None:
    """What joins the ranks does not matter: none of it needs torch.distributed."""
    before = ringattn.simulate(saved, str(tmp_path), "plain", ring=3).results
    after = ringattn.simulate(loaded, str(tmp_path), "plain", ring=2).results
    assert all(equal(found[0], before[0][0]) and found[1] == before[0][1] for found in after)
    said = ringattn.simulate(lambda mesh: checkpoint.last(tmp_path, mesh), ring=2).results
    assert [path and path.name for path in said] == ["step-00000003"] * 2


def test_virtual_ranks_do_not_save_in_the_background(tmp_path: Path) -> None:
    def run(mesh: ringattn.Mesh) -> str:
        with pytest.raises(UnsupportedError) as caught:
            checkpoint.save(tmp_path, model=Model(), step=1, mesh=mesh, background=True)
        return str(caught.value)

    assert all("leave background out" in said for said in ringattn.simulate(run, ring=2).results)
    assert not complete(tmp_path)


def test_replicas_of_sharded_models(gloo: Workers, tmp_path: Path) -> None:
    before = gloo.run(4, two_replicas, str(tmp_path), False)
    after = gloo.run(4, two_replicas, str(tmp_path), True)
    for (saved, drawn), (found, again) in zip(before, after, strict=True):
        assert equal(saved, found) and drawn == again
    numbers = [drawn for _, drawn in before]
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3]
    size = sum(path.stat().st_size for path in (tmp_path / "step-00000002").glob("*.bin"))
    random_bytes = 4 * (8 * 627 + 8 * 626 + 5056)
    weights = sum(x.numel() * x.element_size() for name, x in before[0][0].items() if "again" not in name)
    assert size < weights + 1.1 * random_bytes  # replicas are written once, and so is a module in two places


def test_compiled_modules_have_the_names_of_their_own(tmp_path: Path) -> None:
    mesh = ringattn.Mesh.local()
    before, _ = saved(mesh, str(tmp_path), "plain")
    inner = Model(seed=1)
    inner.second = torch.compile(inner.second)  # type: ignore[assignment]
    checkpoint.load(tmp_path, model=torch.compile(inner), mesh=mesh)  # type: ignore[arg-type]
    assert torch.equal(inner.first.weight, before["first.weight"])


# -- whole, or not there ----------------------------------------------------------------------------------------------


def small(mesh: ringattn.Mesh, folder: Path | str, step: int, **options: Any) -> checkpoint.Saving:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    return checkpoint.save(folder, model=model, step=step, mesh=mesh, **options)


def load_small(mesh: ringattn.Mesh, folder: Path | str, **options: Any) -> int:
    """The step that the weights are of."""
    model = nn.Linear(3, 2)
    state = checkpoint.load(folder, model=model, mesh=mesh, **options)
    assert (model.weight == state.step).all()
    return state.step


def test_the_last_is_found_and_old_ones_are_removed(tmp_path: Path) -> None:
    mesh = ringattn.Mesh.local()
    for step in (5, 10, 20, 100_000_000):
        small(mesh, tmp_path, step, keep=2)
    assert sorted(complete(tmp_path)) == [20, 100_000_000]
    assert load_small(mesh, tmp_path) == 100_000_000
    assert load_small(mesh, tmp_path, step=20) == load_small(mesh, tmp_path / "step-00000020") == 20
    with pytest.raises(CheckpointError, match="no step 10; it has 20, 100000000"):
        load_small(mesh, tmp_path, step=10)


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    mesh = ringattn.Mesh.local()
    for number in range(2):
        small(mesh, tmp_path, 7, data=number)
    assert checkpoint.load(tmp_path, model=nn.Linear(3, 2), mesh=mesh).data == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    (tmp_path / "step-00000007").rename(tmp_path / ".step-00000007.old")  # killed between two renames
    assert load_small(mesh, tmp_path) == 7


def test_nothing_of_others_is_replaced_or_removed(tmp_path: Path) -> None:
    mesh, theirs = ringattn.Mesh.local(), tmp_path / "step-00000002"
    theirs.mkdir()
    (theirs / MANIFEST).write_text('{"of": "something else"}')
    for step in (1, 3, 4):
        small(mesh, tmp_path, step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    with pytest.raises(CheckpointError, match="step-00000002 is there, and is no checkpoint"):
        small(mesh, tmp_path, 2)
    assert theirs.exists()


def in_the_background(mesh: ringattn.Mesh, folder: str) -> tuple[bool, int, str]:
    model, optimizer = made("fsdp2", mesh)
    trained(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    saving = checkpoint.save(folder, model=model, optimizer=optimizer, step=2, mesh=mesh, background=True)
    trained(model, optimizer, range(2, 6))  # goes on at once, over the same ranks
    name = saving.wait().name
    assert saving.done
    state = checkpoint.load(folder, model=model, optimizer=optimizer, mesh=mesh)
    return equal(snapshot(model, optimizer), before), state.step, name


def test_in_the_background_it_is_what_it_was_when_asked_for(gloo: Workers, tmp_path: Path) -> None:
    assert gloo.run(3, in_the_background, str(tmp_path)) == [(True, 2, "step-00000002")] * 3


def cannot_write(mesh: ringattn.Mesh, folder: str, background: bool) -> str:
    """Rank 1 finds no space on its disk."""
    if mesh.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", full)
            return save_small(mesh, folder, background)
    return save_small(mesh, folder, background)


def save_small(mesh: ringattn.Mesh, folder: str, background: bool) -> str:
    try:
        small(mesh, folder, 2, background=background).wait()
    except CheckpointError as error:
        return str(error)
    return "saved"


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_cannot_write_is_an_error_on_all_and_loses_nothing(
    gloo: Workers, tmp_path: Path, background: bool
) -> None:
    small(ringattn.Mesh.local(), tmp_path, 1)
    for rank, said in enumerate(gloo.run(3, cannot_write, str(tmp_path), background)):
        assert "[Errno 28] No space left" in said and ("Rank 1 says" in said) == (rank != 1) and "\n" not in said
    assert load_small(ringattn.Mesh.local(), tmp_path) == 1
    small(ringattn.Mesh.local(), tmp_path, 2)
    assert load_small(ringattn.Mesh.local(), tmp_path) == 2


def test_a_process_killed_during_a_save_loses_nothing(tmp_path: Path) -> None:
    """Killed when the first file of the second checkpoint has begun, or its manifest: whenever we come to it."""
    code = f"""
import torch, ringattn, sys
from ringattn.training import checkpoint
model = torch.nn.Linear(3000, 3000)
torch.nn.init.constant_(model.weight, 1)
for step in range(1, 1000):
    checkpoint.save({str(tmp_path)!r}, model=model, step=step, mesh=ringattn.Mesh.local(), keep=2)
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for _ in range(2):
            last = int(process.stdout.readline())
        while not (tmp_path / f".step-{last + 1:08}.new").exists():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
    found = max(complete(tmp_path))
    assert found >= int([str(last), *said][-1])
    model = nn.Linear(3000, 3000)
    assert checkpoint.load(tmp_path, model=model, mesh=ringattn.Mesh.local()).step == found
    assert (model.weight == 1).all()


# -- refused ----------------------------------------------------------------------------------------------------------


class Bomb:
    """Says so in the environment when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return exec, ("import os; os.environ['BOMB'] = 'exploded'",)


def truncated(step: Path) -> None:
    os.truncate(step / "0.bin", 30)


def flipped(step: Path) -> None:
    raw = bytearray((step / "0.bin").read_bytes())
    raw[3] ^= 1
    (step / "0.bin").write_bytes(raw)


def manifest_cut(step: Path) -> None:
    os.truncate(step / MANIFEST, (step / MANIFEST).stat().st_size - 9)


def manifest_edited(step: Path) -> None:
    (step / MANIFEST).write_text((step / MANIFEST).read_text().replace('"step": 3', '"step": 4'))


def file_lost(step: Path) -> None:
    (step / "0.bin").unlink()


def pickled(step: Path) -> None:
    for path in step.iterdir():
        path.write_bytes(pickle.dumps(Bomb()))


def of_later_version(step: Path) -> None:
    (step / MANIFEST).write_text((step / MANIFEST).read_text().replace('"version": 1', '"version": 99'))


FAULTS: dict[Callable[[Path], None], str] = {
    truncated: "0.bin has 30 bytes and should have",
    flipped: "0.bin is damaged: the checksum of",
    manifest_cut: "its checksum is another",
    manifest_edited: "its checksum is another",
    file_lost: "No such file",
    pickled: "holds no checkpoint",
    of_later_version: "has version 99",
}


def refused(mesh: ringattn.Mesh, folder: str, make: Callable[[], nn.Module] = Model) -> str:
    try:
        checkpoint.load(folder, model=make(), mesh=mesh)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_one_is_refused_in_one_line_on_every_rank(
    gloo: Workers, tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    saved(ringattn.Mesh.local(), str(tmp_path), "plain")
    fault(tmp_path / "step-00000003")
    for said in gloo.run(2, refused, str(tmp_path)):
        assert FAULTS[fault] in said and "\n" not in said and len(said) < 400
    if fault is pickled:
        assert "is no checkpoint of ringattn" in refused(ringattn.Mesh.local(), str(tmp_path / "step-00000003"))
    assert "BOMB" not in os.environ


def test_the_manifest_decides_nothing_but_what_it_may(tmp_path: Path) -> None:
    """With a right checksum, as only malice would make it."""
    from ringattn.training.storage import _checksum

    saved(ringattn.Mesh.local(), str(tmp_path), "plain")
    path = tmp_path / "step-00000003" / MANIFEST
    head, body = map(json.loads, path.read_bytes().split(b"\n"))
    (tmp_path / "secret.bin").write_bytes(b"x" * 1000)
    name = "model/first.weight"
    changes: list[dict[str, Any]] = [
        {"content": {}},
        {"files": {**body["files"], "../secret.bin": 1000}},
        {"tensors": {**body["tensors"], name: {**body["tensors"][name], "dtype": "object"}}},
        {"tensors": {**body["tensors"], name: {**body["tensors"][name], "shape": [10**9, 10**9]}}},
        {"tensors": {**body["tensors"], name: {**body["tensors"][name], "pieces": []}}},
        {"tensors": {**body["tensors"], name: "os.system"}},
        {"tensors": []},
    ]
    for change in changes:
        text = json.dumps({**body, **change}).encode()
        path.write_bytes(json.dumps({**head, "checksum": _checksum(text)}).encode() + b"\n" + text)
        assert "is damaged" in refused(ringattn.Mesh.local(), str(tmp_path))


def test_a_folder_of_something_else(gloo: Workers, tmp_path: Path) -> None:
    torch.save(Model().state_dict(), tmp_path / "model.pt")
    for said in gloo.run(2, refused, str(tmp_path)):
        assert "holds no checkpoint" in said and str(tmp_path) in said
    assert "holds no checkpoint" in refused(ringattn.Mesh.local(), str(tmp_path / "nowhere"))


def wider() -> nn.Module:
    return Model(width=6)


def larger() -> nn.Module:
    model = Model()
    model.extra = nn.Linear(1, 1)
    return model


def smaller() -> nn.Module:
    model = Model()
    del model.scale
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (wider, "shapes differ: first.bias [5] instead of [6], first.weight [5, 3] instead of [6, 3]"),
        (larger, "it has no extra.bias, extra.weight"),
        (smaller, "the model has no scale"),
    ],
)
def test_of_another_model(gloo: Workers, tmp_path: Path, make: Callable[[], nn.Module], says: str) -> None:
    saved(ringattn.Mesh.local(), str(tmp_path), "plain")
    for said in gloo.run(2, refused, str(tmp_path), make):
        assert "is of another model" in said and says in said


def one_rank_has_another(mesh: ringattn.Mesh, folder: str) -> str:
    return refused(mesh, folder, wider if mesh.rank == 1 else Model)


def test_a_rank_that_refuses_is_heard_by_all(gloo: Workers, tmp_path: Path) -> None:
    saved(ringattn.Mesh.local(), str(tmp_path), "plain")
    first, second, third = gloo.run(3, one_rank_has_another, str(tmp_path))
    assert first == third and first.startswith("Rank 1 says CheckpointError: ")
    assert second.startswith(str(tmp_path))


def test_of_an_optimizer_with_other_groups_or_without(tmp_path: Path) -> None:
    mesh, model = ringattn.Mesh.local(), nn.Linear(2, 3)
    checkpoint.save(tmp_path, model=model, step=1, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="without an optimizer"):
        checkpoint.load(tmp_path, model=model, optimizer=optimizer, mesh=mesh)
    checkpoint.save(tmp_path, model=model, optimizer=optimizer, step=2, mesh=mesh)
    other = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    with pytest.raises(CheckpointError, match=r"other groups of parameters: \[2\] and \[1, 1\]"):
        checkpoint.load(tmp_path, model=model, optimizer=other, mesh=mesh)


def test_arguments(tmp_path: Path) -> None:
    mesh, model = ringattn.Mesh.local(), nn.Linear(2, 3)
    for options, says in (
        ({"step": -1}, "step is"),
        ({"data": {1, 2}}, "data must be what JSON can hold"),
        ({"keep": 0}, "keep"),
        ({"background": 1}, "background"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 3).parameters())}, "parameters that the model has not"),
        ({"mesh": None}, "mesh must be"),
        ({"mesh": ringattn.Mesh(ring=2)}, "has no transport"),
    ):
        with pytest.raises(InputError, match=says):
            checkpoint.save(tmp_path, **{"model": model, "step": 1, "mesh": mesh, **options})  # type: ignore[arg-type]
    model.get_extra_state = lambda: 1  # type: ignore[method-assign]
    assert not list(tmp_path.iterdir())


def disagree(mesh: ringattn.Mesh, folder: str) -> str:
    try:
        small(mesh, folder, 1 + mesh.rank)
    except AgreementError as error:
        return str(error)
    return "saved"


def test_ranks_that_save_different_steps(gloo: Workers, tmp_path: Path) -> None:
    for said in gloo.run(2, disagree, str(tmp_path)):
        assert "they differ in step (rank 0: 1; rank 1: 2)" in said
    assert not list(tmp_path.iterdir())


# -- random states ----------------------------------------------------------------------------------------------------


def drawn() -> tuple[float, ...]:
    numbers = [float(torch.rand(())), float(np.random.standard_normal()), random.gauss(), random.random()]  # noqa: NPY002
    return tuple(numbers)


def random_saved(mesh: ringattn.Mesh, folder: str, alike: bool) -> tuple[float, ...]:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0 if alike else mesh.rank)
    drawn()
    small(mesh, folder, 1)
    return drawn()


def random_loaded(mesh: ringattn.Mesh, folder: str) -> tuple[float, ...]:
    load_small(mesh, folder)
    return drawn()


def test_random_numbers_go_on_where_the_ranks_are_the_same(gloo: Workers, tmp_path: Path) -> None:
    expected = gloo.run(3, random_saved, str(tmp_path), False)
    assert len({*expected}) == 3
    assert gloo.run(3, random_loaded, str(tmp_path)) == expected


def test_else_they_are_derived_and_differ_by_rank(gloo: Workers, tmp_path: Path) -> None:
    before = gloo.run(3, random_saved, str(tmp_path), False)
    first, again = (gloo.run(4, random_loaded, str(tmp_path)) for _ in range(2))
    assert first == again and len({*first, *before}) == 7


def test_ranks_of_a_sequence_that_drew_the_same_go_on_as_one_at_any_number(gloo: Workers, tmp_path: Path) -> None:
    """As dropout in attention needs: its mask is a function of one seed on all ranks."""
    expected = gloo.run(3, random_saved, str(tmp_path), True)
    assert gloo.run(2, random_loaded, str(tmp_path)) == expected[:2]
    assert random_loaded(ringattn.Mesh.local(), str(tmp_path)) == expected[0]


def test_importing_the_package_does_not_import_it() -> None:
    code = (
        "import ringattn, ringattn.training, sys; print('torch.distributed.checkpoint.default_planner' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.RMSprop])
def test_other_optimizers_go_on_to_the_bit(tmp_path: Path, make: Any) -> None:
    mesh, losses = ringattn.Mesh.local(), []
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    for start in (0, 2):
        model = Model(seed=start)
        optimizer = make(model.parameters(), lr=0.01, **options)
        if start:
            checkpoint.load(tmp_path, model=model, optimizer=optimizer, mesh=mesh)
        trained(model, optimizer, range(start, 2))
        if not start:
            checkpoint.save(tmp_path, model=model, optimizer=optimizer, step=2, mesh=mesh)
        losses.append(trained(model, optimizer, range(2, 5)))
    assert losses[0] == losses[1]
