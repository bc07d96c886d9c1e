"""Checkpoints of DeepSpeed's engines: what ZeRO saves every wrapper loads, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringattn
from ringattn.errors import InputError
from ringattn.training import checkpoint
from tests.workers import Workers

CONFIG: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1e9}


class Model(nn.Module):
    """Odd sizes, a parameter of one number, a buffer, and one that is not trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.first(x).relu()) * self.scale + self.frozen * self.shift
        return out


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))


def plain(mesh: ringattn.Mesh, seed: int) -> tuple[nn.Module, Any]:
    model = Model(seed)
    return model, optimizer_of(model)


def zero(mesh: ringattn.Mesh, seed: int, stage: int, dtype: str = "") -> tuple[Any, Any]:
    from ringattn.integrations.deepspeed import initialize

    model = Model(seed)
    config = {**CONFIG, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    if dtype:
        config[dtype] = {"enabled": True}
    engine, _ = initialize(model, mesh, config, optimizer=optimizer_of(model))
    return engine, engine.optimizer


def trained(model: Any, optimizer: Any, steps: range) -> list[float]:
    """Some steps on the same tokens on every rank: averaged gradients are those of one."""
    losses = []
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        if hasattr(model, "backward"):
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def made(mesh: ringattn.Mesh, seed: int, stage: int | None) -> tuple[Any, Any]:
    return plain(mesh, seed) if stage is None else zero(mesh, seed, stage)


def round_trip(mesh: ringattn.Mesh, folder: str, source: int | None, target: int | None) -> tuple[Any, ...]:
    """Saved by one, loaded by the other; the losses of both after it, and what the other saves again."""
    model, optimizer = made(mesh, 0, source)
    trained(model, optimizer, range(3))
    first = checkpoint.save(Path(folder) / "first", model=model, optimizer=optimizer, step=3, mesh=mesh).path
    expected = trained(model, optimizer, range(3, 6))
    model, optimizer = made(mesh, 1, target)
    checkpoint.load(first, model=model, optimizer=optimizer, mesh=mesh)
    again = checkpoint.save(Path(folder) / "again", model=model, optimizer=optimizer, step=3, mesh=mesh).path
    return expected, trained(model, optimizer, range(3, 6)), numbers(first), numbers(again)


def numbers(path: Path) -> dict[str, Tensor]:
    """Weights and states on the disk."""
    from ringattn.training.checkpoint import _read
    from ringattn.training.storage import Manifest

    manifest = Manifest.read(path)
    found = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in manifest.tensors.items() if not n.startswith("random/")}
    _read(found, manifest)
    return found


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 2), (2, 3), (3, None), (None, 3), (3, 1), (None, 0)])
def test_what_one_stage_saves_another_loads(
    gloo: Workers, tmp_path: Path, source: int | None, target: int | None
) -> None:
    for expected, losses, first, again in gloo.run(4, round_trip, str(tmp_path), source, target):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert first.keys() == again.keys() and len(first) == 18
        assert all(torch.equal(first[name], again[name]) for name in first)


def narrow(mesh: ringattn.Mesh, folder: str, stage: int) -> tuple[Any, ...]:
    """Of a model in bfloat16: its float32 weights, and the same losses after loading."""
    engine, _ = zero(mesh, 0, stage, "bf16")
    tokens = [torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).bfloat16() for step in range(4)]
    losses = []
    for step, x in enumerate(tokens):
        if step == 2:
            checkpoint.save(folder, model=engine, step=2, mesh=mesh)
        losses.append(_step(engine, x))
    engine, _ = zero(mesh, 1, stage, "bf16")
    checkpoint.load(folder, model=engine, mesh=mesh)
    return losses[2:], [_step(engine, x) for x in tokens[2:]], numbers(Path(folder) / "step-00000002")


def _step(engine: Any, x: Tensor) -> float:
    loss = engine(x).float().square().mean()
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_of_a_narrow_model_the_wide_weights_are_saved(gloo: Workers, tmp_path: Path, stage: int) -> None:
    for expected, losses, found in gloo.run(4, narrow, str(tmp_path), stage):
        assert losses == expected
        assert found["model/first.weight"].dtype == found["optimizer/first.weight/exp_avg"].dtype == torch.float32
        assert not torch.equal(found["model/first.weight"], found["model/first.weight"].bfloat16().float())


def other_optimizer(mesh: ringattn.Mesh, folder: str) -> str:
    engine, _ = zero(mesh, 0, 2)
    try:
        checkpoint.save(folder, model=engine, optimizer=optimizer_of(Model(0)), step=1, mesh=mesh)
    except InputError as error:
        return str(error)
    return "saved"


def test_an_engine_brings_its_own_optimizer(gloo: Workers, tmp_path: Path) -> None:
    for said in gloo.run(4, other_optimizer, str(tmp_path)):
        assert "brings its own optimizer" in said
