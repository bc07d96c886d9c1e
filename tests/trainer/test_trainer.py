"""The training loop: the same curve on any number of ranks, and a check that notices when it is not."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch

import ringattn
from ringattn.trainer.config import Config, Positions
from ringattn.trainer.data import Corpus, join_documents, read_corpus
from ringattn.trainer.model import Decoder
from ringattn.trainer.parity import TOLERANCE, Trace, compare, relative
from ringattn.training import scale_gradients, sum_gradients

CPU = torch.device("cpu")


def traces(trainer: ModuleType, config: Config, ring: int) -> list[Trace]:
    """The SGD steps of --check on virtual ranks."""
    corpus = Corpus(read_corpus(config.data)[0], config.seed)

    def steps(mesh: ringattn.Mesh) -> Trace:
        trace: Trace = trainer.sgd_steps(config, mesh, CPU, corpus)
        return trace

    return ringattn.simulate(steps, ring=ring).results


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Tensors this small are quicker without a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        model = Decoder(tiny.shape, 0)
        loss = trainer.gradients(model, [pack], mesh, tiny)
        return float(loss), sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)

    assert ringattn.simulate(step, ring=3).results == [(0.0, 0.0)] * 3


def test_the_held_out_loss_is_that_of_one_rank(trainer: ModuleType, tiny: Config) -> None:
    corpus = Corpus(read_corpus(tiny.data)[1], 0)
    packs = [corpus.pack(i, tiny.length) for i in range(2)]

    def loss(mesh: ringattn.Mesh) -> float:
        return float(trainer.evaluate(Decoder(tiny.shape, 0), packs, mesh, tiny))

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
    monkeypatch.setattr(trainer, "sum_gradients", averages)
    difference = compare(traces(trainer, tiny, 2)[0], alone)
    assert min(difference.gradients.values()) > 0.4


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
