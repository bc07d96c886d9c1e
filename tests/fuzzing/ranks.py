"""Calls of several virtual ranks, one of them called with nonsense: all must learn it before any payload."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from torch import nn

import ringattn
from ringattn import training
from ringattn.errors import RingAttentionError, TransportError
from ringattn.training import checkpoint
from tests.fuzzing.judging import PATIENCE, Report, TooLongError, text, within
from tests.fuzzing.kinds import NONSENSE

RANKS = 3
LENGTH = 12
UNLIKE = ringattn.Window(2), ringattn.Striped(), "route", "reference", True, False, 1, ringattn.Hard(), {"x": 1}, 0.25
"""What may be right by itself, on all ranks alike."""
TENSORS = (
    torch.zeros(1, 2, 4, 4, dtype=torch.float64),
    torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16),
    *map(torch.zeros, ((2, 2, 4, 4), (1, 4, 4, 4), (1, 2, 5, 4), (1, 2, 4, 5), (2, 4), (0,))),
)
JOINING = "mesh", "sharding"
"""Without which a rank cannot tell the others."""
Arguments = dict[str, Any]
Outcome = tuple[Exception | str | None, int]
"""How the call ended on a rank, and the messages it had sent by then."""


@dataclasses.dataclass(frozen=True)
class Together:
    """A call that all ranks make.

    Attributes:
        arguments: of a rank, that make a call that works.
        private: those that are a rank's own affair.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[ringattn.Mesh], Arguments]
    private: tuple[str, ...] = ()


def _attention(mesh: ringattn.Mesh) -> Arguments:
    sharding = ringattn.Sharding(LENGTH, mesh)
    q = torch.ones(1, 2, sharding.count, 4)
    members = {"mechanism": ringattn.Softmax(), "schedule": "auto", "kernel": "auto"}
    more = {"mask": ringattn.Causal(), "sharding": sharding, "kv_sharding": None}
    return {"q": q, "k": q, "v": q, **more, **members, "deterministic": False, "return_lse": False}


def _joined(mesh: ringattn.Mesh) -> Arguments:
    sharding = ringattn.Sharding(LENGTH, mesh)
    return {"sharding": sharding, "x": torch.ones(1, 2, sharding.count, 4), "dim": 2}


def _reduced(mesh: ringattn.Mesh) -> Arguments:
    return {"x": torch.ones(2, 3), "mesh": mesh, "op": "sum"}


def _beside(mesh: ringattn.Mesh) -> Arguments:
    return {**_joined(mesh), "left": 1, "right": 2}


def _pooled(mesh: ringattn.Mesh) -> Arguments:
    sharding = ringattn.Sharding(LENGTH, mesh)
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, sharding.count, 4)
    return {"q": q, "k": k, "v": k, "sharding": sharding, "mechanism": ringattn.Softmax(), "extras": ()}


def _rows(mesh: ringattn.Mesh) -> Arguments:
    sharding = ringattn.Sharding(LENGTH, mesh)
    q, more = torch.ones(1, 2, sharding.count, 4), {"sharding": sharding, "kv_sharding": None}
    return {"q": q, "k": q, "mask": ringattn.Causal(), "rows": [0, 5], **more, "mechanism": ringattn.Softmax()}


def _batch(mesh: ringattn.Mesh) -> Arguments:
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    sample = {"tokens": tokens, "documents": None, "labels": None, "mask": None, "shift": True}
    return {**sample, "mesh": mesh, "layout": "auto", "scatter": False, "positions": "document"}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 3)


def _saved(mesh: ringattn.Mesh, folder: str) -> Arguments:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    more = {"step": 3, "data": None, "keep": None, "background": False}
    return {"folder": folder, "model": model, "optimizer": optimizer, "mesh": mesh, **more}


def _loaded(mesh: ringattn.Mesh, folder: str) -> Arguments:
    return {"folder": f"{folder}/there", "model": _model(), "mesh": mesh, "optimizer": None, "step": None}


def _gradients(mesh: ringattn.Mesh) -> Arguments:
    model = _model()
    model(torch.ones(1, 2)).sum().backward()
    return {"model": model, "mesh": mesh}


def calls(folder: str) -> Iterator[Together]:
    """Those in which a rank sends something, or waits for others."""
    yield Together("attention", ringattn.attention, _attention, ("return_lse",))
    yield Together("join", lambda sharding, **x: sharding.join(**x), _joined)
    yield Together("reduce", ringattn.reduce, _reduced)
    yield Together("cumsum", ringattn.cumsum, _joined)
    yield Together("halo", ringattn.halo, _beside)
    yield Together("pool", ringattn.pool, _pooled, ("extras",))
    yield Together("attention_rows", ringattn.attention_rows, _rows)
    yield Together("Batch", training.Batch, _batch)
    yield Together("checkpoint.save", checkpoint.save, partial(_saved, folder=folder))
    yield Together("checkpoint.load", checkpoint.load, partial(_loaded, folder=folder), ("model", "step", "folder"))
    yield Together("sum_gradients", training.sum_gradients, _gradients)
    yield Together("total", training.total, lambda mesh: {"share": torch.ones(()), "mesh": mesh})


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A call, and what is wrong with it on one rank alone."""

    call: Together
    rank: int
    name: str
    value: Any

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.name}={text(self.value)}"


def drawn(count: int, seed: int, folder: str) -> Iterator[Drawn]:
    """So many calls, the same wherever they are drawn."""
    random, every = Random(seed), list(calls(folder))
    names = [[x for x in call.arguments(ringattn.Mesh.local()) if x not in JOINING] for call in every]
    for nth in range(count):
        which = nth % len(every)
        rank, name = random.randrange(RANKS), random.choice(names[which])
        yield Drawn(every[which], rank, name, random.choice((*NONSENSE, *UNLIKE, *TENSORS)))


def fuzzed(count: int, seed: int = 0) -> Report:
    """So many calls of virtual ranks with one argument of one rank replaced."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        ringattn.simulate(partial(_begin, folder), ring=RANKS)
        for each in drawn(count, seed, folder):
            report.add(each.call.name, _simulated(each), str(each))
    return report


def _simulated(each: Drawn) -> Exception | str | None:
    try:
        with within(PATIENCE):
            return _judged(each, ringattn.simulate(partial(_on_a_rank, each), ring=RANKS).results)
    except TooLongError:
        return "does not come back"
    except TransportError as error:
        return f"ranks are told nothing: {error}"


def run(mesh: ringattn.Mesh, count: int, seed: int, folder: str) -> list[Outcome]:
    """The same calls by ranks that are processes: how each ended on this one."""
    _begin(folder, mesh)
    return [_on_a_rank(each, mesh) for each in drawn(count, seed, folder)]


def judged_together(ended: Sequence[Sequence[Outcome]], seed: int, folder: str) -> Report:
    """What has become of the calls of `run`, by rank."""
    report, outcomes = Report(), list(zip(*ended, strict=True))
    for each, said in zip(drawn(len(outcomes), seed, folder), outcomes, strict=True):
        report.add(each.call.name, _judged(each, said), str(each))
    return report


def _begin(folder: str, mesh: ringattn.Mesh) -> None:
    """A checkpoint to load."""
    checkpoint.save(**_saved(mesh, f"{folder}/there"))


def _judged(each: Drawn, ended: Sequence[Outcome]) -> Exception | str | None:
    """What has become of a call, from how it ended on every rank."""
    faults = [said for said, _ in ended if isinstance(said, str)]
    errors = [said for said, _ in ended if isinstance(said, Exception)]
    private = each.name in each.call.private
    if faults:
        return faults[0]
    if not errors:
        return None
    if len(errors) < RANKS and not private:
        return f"{RANKS - len(errors)} ranks went on where others say: {errors[0]}"
    untold = [error for error in errors if isinstance(error, TransportError)]
    if untold:
        return f"a rank is told nothing and says {str(untold[0])[:200]}"
    sent = sum(messages for _, messages in ended)
    return f"{sent} messages were sent before {errors[0]}" if sent and not private else errors[0]


def _on_a_rank(each: Drawn, mesh: ringattn.Mesh) -> Outcome:
    arguments, counters = each.call.arguments(mesh), mesh.connected().counters
    before = counters.messages
    if mesh.rank == each.rank:
        arguments[each.name] = each.value
    said: Exception | str | None = None
    try:
        each.call.function(**arguments)
    except RingAttentionError as error:
        said = type(error)(str(error))  # which travels between processes without what it holds
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
    return said, counters.messages - before
