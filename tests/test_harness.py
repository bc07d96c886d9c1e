"""The conformance harness finds what is wrong, whoever wrote it, and leaves no public member out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch

import ringattn
from ringattn import conformance, kernels, mechanisms
from ringattn.bands import Array
from ringattn.conformance import Case, drawing
from ringattn.kernels import Reference
from ringattn.masks import MEMBERS
from ringattn.mechanisms import Block, Mechanism, Problem, Softmax
from ringattn.mechanisms.base import State
from ringattn.naming import name_of
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.schedules.base import Schedule
from tests.workers import Workers


@dataclasses.dataclass(frozen=True)
class Deaf(ringattn.Ring):
    """Receives nothing."""

    def moves(self, demand: Demand, rank: int) -> Moves:
        moves = super().moves(demand, rank)
        return dataclasses.replace(moves, receives=moves.receives[:0])


@dataclasses.dataclass(frozen=True)
class Short(ringattn.Contiguous):
    """Loses the last token."""

    def spans(self, length: int, size: int) -> Array:
        return super().spans(max(length - 1, 0), size)


@dataclasses.dataclass(frozen=True)
class Twofaced(ringattn.Causal):
    """Its regions are those of another mask."""

    def regions(self, q_length: int, k_length: int) -> Array:
        return ringattn.Full().regions(q_length, k_length)


class Loud(Reference):
    """Its output is a thousandth too large."""

    def forward(self, *arguments: Any) -> State:
        out, *rest = super().forward(*arguments)
        return (out.mul_(1.001), *rest)


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Mechanism):
    """Values weighted by the raw products of queries and keys: a mechanism without an oracle of its own."""

    def empty(self, problem: Problem, length: int) -> State:
        return (problem.rows(problem.heads, length, problem.value_dim),)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        k, v = (x.repeat_interleave(problem.heads // problem.kv_heads, dim=1) for x in (k, v))
        return (self._weights(block, q @ k.transpose(2, 3)) @ v,)

    @staticmethod
    def _weights(block: Block, scores: torch.Tensor) -> torch.Tensor:
        return scores if block.allowed is None else scores * block.allowed

    def merge(self, into: State, part: State) -> None:
        into[0].add_(part[0])

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        return state[0].to(problem.dtype), ()

    def tile_grad(self, problem: Problem, block: Block, q: Any, k: Any, v: Any, output_grad: Any, dparams: Any) -> Any:
        groups = problem.heads // problem.kv_heads
        wide_k, wide_v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        weights, slopes = (
            self._weights(block, x) for x in (q @ wide_k.transpose(2, 3), output_grad.dout @ wide_v.transpose(2, 3))
        )
        dk, dv = (
            x.unflatten(1, (-1, groups)).sum(dim=2)
            for x in (slopes.transpose(2, 3) @ q, weights.transpose(2, 3) @ output_grad.dout)
        )
        return slopes @ wide_k, dk, dv


class Forgetful(Sum):
    """Keeps the last block alone."""

    def merge(self, into: State, part: State) -> None:
        into[0].copy_(part[0])


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ({"schedule": Deaf()}, "PlanError"),
        ({"layout": Short()}, "does not give each|PlanError|Error at"),
        ({"mask": Twofaced()}, "out is off by"),
        ({"kernel": Loud()}, "out is off by"),
        ({"mechanism": Forgetful()}, "out is off by"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_what_is_wrong_is_found(member: Any, words: str) -> None:
    report = conformance.check(**member, count=4)
    assert report.faulty and not report.passed
    assert any(re.search(words, fault) for each in report.faulty for fault in each.faults)
    assert f"{len(report.faulty)} of them wrong" in str(report)


@pytest.mark.parametrize(
    "member",
    [
        {"schedule": "ring"},
        {"schedule": ringattn.Scan(), "mechanism": "linear"},
        {"layout": "zigzag"},
        {"mask": ringattn.Documents([20, 1, 30]) & ringattn.Causal()},
        {"mask": "documents:3,4/5,1"},
        {"mechanism": Sum()},
        {"mechanism": Softmax(softcap=2.0, dropout=0.2, seed=1)},
        {"kernel": "chunked", "mechanism": "linear"},
        {"kernel": f"{__name__}:Reference"},
    ],
    ids=str,
)
def test_what_is_right_passes(member: Any) -> None:
    report = conformance.check(**member, count=6)
    assert report.passed, report


def test_nothing_computed_is_not_passed() -> None:
    report = conformance.check(schedule="scan", mechanism="softmax", count=3)
    assert not report.passed and not report.faulty
    assert list(report.refusals) == [next(iter(report.refusals))] and "needs the keys themselves" in str(report)


def test_a_wrong_name_is_refused_at_once() -> None:
    for name in ("mask", "layout", "schedule", "mechanism", "kernel"):
        with pytest.raises(ringattn.InputError):
            conformance.check(**{name: "nonsense"}, count=1)  # type: ignore[arg-type]


def test_a_token_that_changes_others_is_a_leak() -> None:
    case = Case(30, ringattn.Documents([15, 15]), ranks=2)
    loose = dataclasses.replace(case, mask=ringattn.Full())

    def run(inputs: Any) -> conformance.Results:
        return conformance.simulated(loose, inputs)

    found = conformance.leaks(case, run, conformance.simulated(loose), 7)
    assert found.tokens["out"] == list(range(15, 30)) and not found.none


def _public(base: type) -> set[type]:
    members = (getattr(ringattn, name) for name in ringattn.__all__)
    return {x for x in members if isinstance(x, type) and issubclass(x, base) and x is not base}


def test_every_public_member_is_in_the_cases() -> None:
    random = Random(0)
    masks = {type(atom) for _ in range(300) for atom in _atoms(drawing.mask(random, 50))}
    assert masks == set(MEMBERS) == _public(ringattn.Mask)
    layouts = {drawing.layout(random, 50, 3) for _ in range(100)}
    assert "balanced" in layouts
    assert {type(x) for x in layouts if not isinstance(x, str)} | {ringattn.Balanced} == _public(ringattn.Layout)
    drawn: list[Case] = []

    def keep(cases: Sequence[Case]) -> list[Case]:
        drawn.extend(cases)
        return []

    conformance.check(count=500, track=keep)
    assert {type(case.schedule) for case in drawn} - {str} == {*_public(Schedule), ringattn.Ulysses}
    assert {case.kernel for case in drawn} >= {name_of(kernel) for kernel in kernels.MEMBERS}
    assert {type(case.attends) for case in drawn} == set(mechanisms.MEMBERS) == _public(Mechanism)


def _atoms(mask: ringattn.Mask) -> list[ringattn.Mask]:
    parts = getattr(mask, "parts", None)
    return [mask] if parts is None else [atom for part in parts for atom in _atoms(part)]


def _checked(mesh: ringattn.Mesh) -> conformance.Report:
    return conformance.check(count=12, mesh=mesh)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_transport_computes_the_same_cases_to_the_bit(gloo: Workers, mpi: Workers, ranks: int) -> None:
    virtual = ringattn.simulate(_checked, ring=ranks).results
    every = [*virtual, *gloo.run(ranks, _checked), *mpi.run(ranks, _checked)]
    assert all(report.passed for report in every), every[0]
    assert all(report.worst == virtual[0].worst for report in every)
