"""The benchmarks measure what they say: teams report all ranks, contestants agree with the oracle, the link is slow."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from scripts.benchmarks import attention, overlap, plan
from scripts.benchmarks.cases import Case, documents
from scripts.benchmarks.contestants import OURS, collect, prepare_sdpa
from scripts.benchmarks.memory import Call, measure
from scripts.benchmarks.teams import Team, timed


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team(2, timeout=120) as started:
        yield started


@pytest.mark.parametrize(("count", "length"), [(64, 16384), (10_000, 2**20), (1, 1)])
def test_documents_fill_the_length(count: int, length: int) -> None:
    lengths = documents(count, length)
    assert len(lengths) == count
    assert sum(lengths) == length
    assert min(lengths) >= 1


def test_a_failure_names_every_rank_and_the_team_goes_on(team: Team) -> None:
    nonsense = Case("diagonal", 64, torch.float32, backward=False)
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*not a mask.*rank 1: .*not a mask"):
        team.call(OURS.prepare, nonsense)
    assert len(team.call(timed, False)) == 2


@pytest.mark.parametrize("mask", ["causal", "documents:100,1,99&causal"])
def test_contestants_compute_the_case(team: Team, mask: str) -> None:
    case = Case(mask, 200, torch.float32, backward=True, heads=2, dim=16)
    truth = attention.oracle(case)
    for prepare, shares in ((OURS.prepare, True), (prepare_sdpa, False)):
        positions = team.call(prepare, case)
        parts = team.call(collect, 2)
        if not shares:  # each process of a single-process contestant has the whole
            positions, parts = positions[:1], parts[:1]
        found = attention.errors(attention.joined(parts, positions), truth)
        assert len(found) == 4
        assert max(found) < 1e-6
    assert team.time() > 0


def test_memory_reads_counters_that_equal_the_plan(team: Team) -> None:
    for usage in team.call(measure, Call(301, 4, 2, 16, torch.float32, "causal", "route")):
        assert usage.moved == usage.planned
        assert usage.peak > sum(usage.planned_memory.values())


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_call_over_a_slow_link_lasts_as_long_as_the_link_needs(team: Team, lookahead: int) -> None:
    fast = overlap.Call("ring", lookahead, False, 256, 2, "causal", float("inf"))
    sizes = team.call(overlap.prepare, fast)
    assert all(size > 0 for size, _ in sizes)
    slow = dataclasses.replace(fast, bandwidth=max(size for size, _ in sizes) / 0.5)  # half a second
    team.call(overlap.prepare, slow)
    before = sum(team.call(overlap.slept))
    assert team.time() >= 0.5
    assert sum(team.call(overlap.slept)) > before


def test_plans_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["plan", "--length", "4096", "--documents", "50", "--ranks", "5", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", small)
    assert plan.main() == 0
    assert "equals its own of all: yes" in capsys.readouterr().out


def test_the_window_table_has_a_window_of_1024_keys() -> None:
    case = Case(attention.mask_names(4096)["window"], 4096, torch.float32, backward=False)
    row = case.rows(2000, 2001)[0]
    assert np.flatnonzero(row).tolist() == list(range(977, 2001))
