"""The training loop: the same curve on any number of ranks, and a check that notices when it is not."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ringattn
from ringattn.errors import CheckpointError, NotFiniteError, UnsupportedError
from ringattn.trainer.config import Config, Positions, Wrap
from ringattn.trainer.data import Corpus, join_documents, read_corpus
from ringattn.trainer.parity import TOLERANCE, Trace, compare, relative
from ringattn.trainer.run_folder import RunFolder
from ringattn.trainer.stopping import AGAIN, Stop
from ringattn.trainer.wrapping import Plain
from ringattn.training import Sample, scale_gradients, sum_gradients
from tests.trainer.conftest import load_trainer
from tests.workers import Workers

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def traces(trainer: ModuleType, config: Config, ring: int) -> list[Trace]:
    """The SGD steps of --check on virtual ranks."""
    corpus = Corpus(read_corpus(config.data)[0], config.seed)

    def steps(mesh: ringattn.Mesh) -> Trace:
        trace: Trace = trainer.sgd_steps(config, mesh, CPU, corpus)
        return trace

    return ringattn.simulate(steps, ring=ring).results


def plain(trainer: ModuleType, config: Config, mesh: ringattn.Mesh) -> Plain:
    """The model without a wrapper."""
    model: Plain = trainer.wrapped(mesh, CPU, config, trainer.sgd)
    return model


@pytest.mark.parametrize("positions", ["document", "global"])
@pytest.mark.parametrize("ring", [2, 3, 4])
def test_loss_and_gradients_are_those_of_one_rank(
    trainer: ModuleType, tiny: Config, ring: int, positions: Positions
) -> None:
    config = dataclasses.replace(tiny, positions=positions, batch=2)
    [alone] = traces(trainer, config, 1)
    for trace in traces(trainer, config, ring):
        difference = compare(trace, alone)
        assert difference.largest <= TOLERANCE, difference.table()
    assert alone.losses[0] != alone.losses[-1]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("schedule", ["ring", "route"])
def test_neither_layout_nor_schedule_changes_anything(
    trainer: ModuleType, tiny: Config, layout: str, schedule: str
) -> None:
    [alone] = traces(trainer, tiny, 1)
    config = dataclasses.replace(tiny, layout=layout, schedule=schedule)
    for trace in traces(trainer, config, 3):
        assert compare(trace, alone).largest <= TOLERANCE


def test_ranks_agree_to_the_bit(trainer: ModuleType, tiny: Config) -> None:
    first, *others = traces(trainer, tiny, 4)
    for other in others:
        assert compare(other, first).largest == 0


@pytest.mark.parametrize("length", [2, 3])
def test_ranks_without_tokens_take_part(trainer: ModuleType, tiny: Config, length: int) -> None:
    config = dataclasses.replace(tiny, length=length)
    [alone] = traces(trainer, config, 1)
    for trace in traces(trainer, config, 5):
        assert compare(trace, alone).largest <= TOLERANCE


def test_documents_of_one_token_have_a_loss_of_zero(trainer: ModuleType, tiny: Config) -> None:
    pack = join_documents([b"a"] * tiny.length)

    def step(mesh: ringattn.Mesh) -> tuple[float, float]:
        model = plain(trainer, tiny, mesh)
        loss, _ = trainer.gradients(model, [pack], tiny)
        return float(loss), sum(float(gradient.norm()) for gradient in model.gradients().values())

    assert ringattn.simulate(step, ring=3).results == [(0.0, 0.0)] * 3


def test_the_held_out_loss_is_that_of_one_rank(trainer: ModuleType, tiny: Config) -> None:
    corpus = Corpus(read_corpus(tiny.data)[1], 0)
    packs = [corpus.pack(i, tiny.length) for i in range(2)]

    def loss(mesh: ringattn.Mesh) -> float:
        return float(trainer.evaluate(plain(trainer, tiny, mesh), packs, tiny))

    [alone] = ringattn.simulate(loss, ring=1).results
    assert all(abs(got - alone) <= TOLERANCE * alone for got in ringattn.simulate(loss, ring=3).results)


def test_bfloat16_is_close(trainer: ModuleType, tiny: Config) -> None:
    [alone] = traces(trainer, tiny, 1)
    for trace in traces(trainer, dataclasses.replace(tiny, dtype="bfloat16"), 2):
        difference = compare(trace, alone)
        assert 0 < difference.loss < 1e-2 and max(difference.gradients.values()) < 0.1


def averages(model: torch.nn.Module, mesh: ringattn.Mesh) -> None:
    """The classical mistake: gradients averaged over ranks."""
    sum_gradients(model, mesh)
    scale_gradients(model, mesh.size)


def test_the_check_sees_a_wrong_gradient_scale(
    trainer: ModuleType, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    [alone] = traces(trainer, tiny, 1)
    monkeypatch.setattr("ringattn.trainer.wrapping.sum_gradients", averages)
    difference = compare(traces(trainer, tiny, 2)[0], alone)
    halved = sorted(difference.gradients.values())
    assert halved[len(halved) // 2] > 0.4 and halved[0] > 1000 * TOLERANCE


def test_the_check_sees_attention_across_documents(
    trainer: ModuleType, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    [alone] = traces(trainer, tiny, 1)
    documents = "ringattn.training.sample.Documents"
    monkeypatch.setattr(documents, lambda lengths: ringattn.Documents([sum(lengths)]))
    assert compare(traces(trainer, tiny, 2)[0], alone).largest > 100 * TOLERANCE


def test_a_relative_difference_hides_nothing() -> None:
    assert relative(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative(torch.tensor([1e-30]), torch.zeros(1)) == float("inf")
    assert relative(torch.zeros(3), torch.zeros(3)) == 0
    assert relative(torch.tensor([1.001e-20]), torch.tensor([1e-20])) == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_warms_up_and_cools_down(trainer: ModuleType) -> None:
    config = Config(steps=100, warmup=10)
    rates = [trainer.learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which Dynamo looks at, and hides
@pytest.mark.parametrize("options", [{"compile": True}, {"checkpoint_activations": True}], ids=str)
def test_compiled_and_recomputed_blocks_are_the_blocks(
    trainer: ModuleType, tiny: Config, options: dict[str, bool]
) -> None:
    [alone] = traces(trainer, tiny, 1)
    for trace in traces(trainer, dataclasses.replace(tiny, **options), 1 if "compile" in options else 3):  # type: ignore[arg-type]
        assert compare(trace, alone).largest <= TOLERANCE


def _wrapped(mesh: ringattn.Mesh, config: Config, axis: str) -> list[tuple[Trace, float]]:
    """SGD steps with every wrapper of torch, on two replicas of two ranks; the norm that the next step clips by."""
    from torch.distributed.device_mesh import init_device_mesh

    devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    names: dict[str, Any] = {axis: "cp"}
    mesh = ringattn.Mesh.from_device_mesh(devices, data="dp", **names)
    trainer = load_trainer()
    corpus, found = Corpus(read_corpus(config.data)[0], config.seed), []
    for wrap in ("none", "ddp", "fsdp2"):
        wrapped = dataclasses.replace(config, wrap=wrap)
        trace = trainer.sgd_steps(wrapped, mesh, CPU, corpus)
        model = trainer.wrapped(mesh, CPU, wrapped, trainer.sgd)
        trainer.gradients(model, trainer.batch_of(corpus, 1, wrapped), wrapped)
        found.append((trace, model.step()))
    return found


@pytest.mark.parametrize("axis", ["ring", "ulysses"])
def test_wrappers_of_torch_train_alike(trainer: ModuleType, tiny: Config, gloo: Workers, axis: str) -> None:
    config = dataclasses.replace(tiny, batch=4, replicas=2)
    [alone] = traces(trainer, config, 1)
    for found in gloo.run(4, _wrapped, config, axis):
        for trace, norm in found:
            difference = compare(trace, alone)
            assert difference.largest <= TOLERANCE, difference.table()
            assert norm == pytest.approx(found[0][1], rel=1e-5)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def trained(mesh: ringattn.Mesh, config: Config) -> list[str]:
    """A whole run on a Gloo rank; what rank 0 has measured, without costs."""
    spec = importlib.util.spec_from_file_location("trainer_of_rank", ROOT / "launch" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train_files, held_out_files = read_corpus(config.data)
    module.train(config, mesh, CPU, Corpus(train_files, config.seed), Corpus(held_out_files, 0))
    assert config.folder is not None
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "gradient_norm", "learning_rate", "held_out_loss")
    return [str([line[name] for name in names if name in line]) for line in lines]


@pytest.mark.parametrize("wrap", ["none", "ddp", "fsdp2"])
def test_ranks_go_on_to_the_bit_from_a_checkpoint(gloo: Workers, tiny: Config, tmp_path: Path, wrap: Wrap) -> None:
    config = dataclasses.replace(tiny, steps=4, save_every=2, eval_every=2, folder=tmp_path / "run", wrap=wrap)
    expected, *_ = gloo.run(3, trained, config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    again, *_ = gloo.run(3, trained, dataclasses.replace(config, resume="auto"))
    assert again == expected and len(again) == 4 + 3


def test_another_number_of_ranks_and_wrapper_goes_on_with_the_same_losses(
    gloo: Workers, tiny: Config, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny, steps=6, save_every=3, folder=tmp_path / "run", wrap="fsdp2")
    expected, *_ = gloo.run(4, trained, config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    other = dataclasses.replace(config, folder=tmp_path / "other", resume=str(tmp_path / "run"), wrap="ddp")
    again, *_ = gloo.run(3, trained, other)
    for got, wanted in zip(again, expected[-len(again) :], strict=True):
        assert json.loads(got) == pytest.approx(json.loads(wanted), rel=1e-5)
    assert len(again) == 3 + 1


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "deepspeed"])
def test_wrappers_that_need_torch_distributed_are_refused_without_it(
    trainer: ModuleType, tiny: Config, wrapper: Wrap
) -> None:
    def start(mesh: ringattn.Mesh) -> str:
        with pytest.raises(UnsupportedError) as caught:
            plain(trainer, dataclasses.replace(tiny, wrap=wrapper), mesh)
        return str(caught.value)

    said = ringattn.simulate(start, ring=2).results
    assert all(f"--wrap {wrapper} needs torch.distributed, and these ranks are joined by simulator" in x for x in said)


def stopped(mesh: ringattn.Mesh, config: Config, odd: int, step: int) -> tuple[int, int]:
    """A run of which one rank is asked to stop in the middle of a step: the exit code, and the last step saved."""
    module: Any = load_trainer()
    batch_of = module.batch_of

    def asked(corpus: Corpus, nth: int, config: Config) -> list[Sample]:
        if mesh.rank == odd and nth == step:
            os.kill(os.getpid(), signal.SIGTERM)
        packs: list[Sample] = batch_of(corpus, nth, config)
        return packs

    module.batch_of = asked
    train_files, held_out_files = read_corpus(config.data)
    before = signal.getsignal(signal.SIGTERM)
    try:
        module.train(config, mesh, CPU, Corpus(train_files, config.seed), Corpus(held_out_files, 0))
        code = -1
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert signal.getsignal(signal.SIGTERM) == before
    return code, max(int(path.name[5:]) for path in config.checkpoints.iterdir())


@pytest.mark.parametrize("wrap", ["none", "fsdp2"])
def test_sigterm_on_one_rank_saves_the_step_on_all(gloo: Workers, tiny: Config, tmp_path: Path, wrap: Wrap) -> None:
    whole = dataclasses.replace(tiny, steps=5, save_every=100, eval_every=2, folder=tmp_path / "whole", wrap=wrap)
    config = dataclasses.replace(whole, folder=tmp_path / "run", resume="auto")
    assert [code for code, _ in gloo.run(3, stopped, config, 1, 2)] == [0] * 3
    assert (config.checkpoints / "step-00000003").exists() or (config.checkpoints / "step-00000002").exists()
    again, *_ = gloo.run(3, trained, config)
    expected, *_ = gloo.run(3, trained, whole)
    assert again == expected


def test_without_checkpoints_sigterm_ends_a_run_as_ever() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop(heeded=False):
        assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("asked", "restarts", "code"), [(True, 3, 0), (False, 3, AGAIN), (False, 0, 0)])
def test_torchrun_goes_on_where_only_others_were_asked(
    monkeypatch: pytest.MonkeyPatch, asked: bool, restarts: int, code: int
) -> None:
    monkeypatch.setattr("ringattn.trainer.stopping.GRACE", 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    with Stop(heeded=True) as stop:
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code() == code


@pytest.mark.parametrize("what", ["gone", "read-only"])
def test_a_folder_that_cannot_be_written_is_one_line(
    trainer: ModuleType, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = RunFolder(tmp_path / "run", {})
    folder.record(step=1, loss=1.0)
    if what == "gone":
        shutil.rmtree(tmp_path / "run")
    else:
        monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(CheckpointError, match=r"run could not be written: .*--resume auto"):
        folder.record(step=2, loss=1.0)


def test_check_finite_names_the_rank_and_the_step(gloo: Workers, tiny: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny, steps=3, folder=tmp_path / "run", check_finite=True, lr=float("inf"), optimizer="sgd"
    )
    said = gloo.run(2, first_error, config)
    assert said[0] == said[1] and said[0].startswith("Step 2: the first numbers that are not finite are on rank 0 of 2")


def first_error(mesh: ringattn.Mesh, config: Config) -> str:
    try:
        trained(mesh, config)
    except NotFiniteError as error:
        return str(error)
    return "none"
