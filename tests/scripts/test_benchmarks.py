"""The benchmarks measure what they say: teams report all ranks, contestants agree with the oracle, the link is slow."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ringattn
from ringattn import bands
from scripts.benchmarks import attention, overhead, overlap, plan, scale, wave
from scripts.benchmarks.cases import GENERATORS, Case, documents, packed, prefixed
from scripts.benchmarks.contestants import collect, contestants, prepare_ringattn, prepare_sdpa, schedules
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
        team.call(prepare_ringattn, nonsense)
    assert len(team.call(timed, False)) == 2


@pytest.mark.parametrize("mask", ["causal", "documents:100,1,99&causal"])
def test_contestants_compute_the_case(team: Team, mask: str) -> None:
    case = Case(mask, 200, torch.float32, backward=True, heads=2, dim=16)
    expected = attention.oracle(dataclasses.replace(case, backward=False))  # one serves both directions
    ways: list[Any] = [
        partial(prepare_ringattn, schedule=schedule, ulysses=ulysses) for schedule, ulysses in schedules(2)
    ]
    all_ways: list[tuple[Any, bool]] = [(prepare_ringattn, True), *((way, True) for way in ways), (prepare_sdpa, False)]
    for prepare, shares in all_ways:
        positions = team.call(prepare, case)
        parts = team.call(collect, 2)
        if not shares:  # each process of a single-process contestant has the whole
            positions, parts = positions[:1], parts[:1]
        found = attention.errors(attention.joined(parts, positions), expected)
        assert len(found) == 4
        assert max(found) < 1e-6
    assert team.time() > 0


def test_the_wave_moves_what_it_plans(team: Team) -> None:
    name, ranks, block, steps, waits, _, _, received, *_, error = wave.row(
        team, wave.Call(ringattn.MoChA(3), 8, 40, 2), rounds=1
    )
    assert (name, ranks, block, steps, waits) == ("MoChA(width=3)", "2", "8", "7", "14%")
    assert received.replace(",", "").isdigit(), "as many bytes as planned"
    assert float(error) < 1e-6


@pytest.mark.parametrize(("schedule", "mechanism"), [("route", "softmax"), ("scan", "linear")])
def test_memory_reads_counters_that_equal_the_plan(team: Team, schedule: str, mechanism: str) -> None:
    for usage in team.call(measure, Call(301, 4, 2, 16, torch.float32, "causal", schedule, mechanism)):
        assert usage.moved == usage.planned
        assert usage.peak > sum(usage.planned_memory.values())


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_call_over_a_slow_link_lasts_as_long_as_the_link_needs(team: Team, lookahead: int) -> None:
    fast = overlap.Call(f"ring(lookahead={lookahead})", 1, False, 256, 2, "causal", float("inf"))
    sizes = team.call(overlap.prepare, fast)
    assert all(size > 0 for size, _ in sizes)
    slow = dataclasses.replace(fast, bandwidth=max(size for size, _ in sizes) / 0.5)  # half a second
    team.call(overlap.prepare, slow)
    before = sum(team.call(overlap.slept))
    assert team.time() >= 0.5
    assert sum(team.call(overlap.slept)) > before


def test_plans_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["plan", "--length", "4096", "--documents", "50", "--ranks", "5", "3", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*small, "--json", str(tmp_path / "times.json")])
    assert plan.main() == 0
    assert capsys.readouterr().out.count("equals its own of all: yes") == 2
    figures = json.loads((tmp_path / "times.json").read_text())
    assert figures["layout"] == "balanced"
    assert [x["ranks"] for x in figures["planning"]] == [x["ranks"] for x in figures["verifying"]] == [5, 3]
    assert all(x["all_ranks"] > 0 and x["same"] for x in figures["planning"])
    assert all(0 < x["one"] < x["together"] for x in figures["verifying"])


def test_large_plans_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scale, "CASES", scale.CASES[:1])
    monkeypatch.setattr(sys, "argv", ["plan", "--scale", "--json", str(tmp_path / "scale.json")])
    plan.main()
    (cost,) = json.loads((tmp_path / "scale.json").read_text())
    assert cost["name"] == scale.CASES[0].name
    assert cost["seconds"] > 0 and 0 < cost["more_megabytes"] < cost["peak_megabytes"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("generator", GENERATORS)
def test_packed_documents_fill_the_length(generator: str, seed: int) -> None:
    lengths = packed(generator, 2**18, seed)
    assert sum(lengths) == 2**18
    assert min(lengths) >= 1
    assert lengths == packed(generator, 2**18, seed)
    assert lengths != packed(generator, 2**18, seed + 1)
    if generator == "giant":
        assert max(lengths) == 2**17
    if generator == "pareto":
        assert max(lengths) <= 2**16
        assert sorted(lengths)[1] >= 256  # all but the one that was cut


def test_each_document_sees_its_first_quarter() -> None:
    lengths = [8, 1, 5]
    found = prefixed(lengths).dense(np.arange(14), np.arange(14)).numpy()
    expected = np.zeros((14, 14), dtype=bool)
    for start, length in zip((0, 8, 9), lengths, strict=True):
        inside = slice(start, start + length)
        expected[inside, inside] = np.tril(np.ones((length, length), dtype=bool))
        expected[inside, start : start + length // 4] = True
    np.testing.assert_array_equal(found, expected)
    regions = prefixed(lengths).regions(14, 14)
    np.testing.assert_array_equal(bands.dense(regions, np.arange(14), np.arange(14)), expected)


@pytest.mark.parametrize("at_once", [0, 10**9])
def test_the_table_of_balance_is_what_the_plans_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, at_once: int
) -> None:
    monkeypatch.setattr(plan, "AT_ONCE", at_once)  # planned rank by rank, and all ranks at once
    target = tmp_path / "balance.json"
    small = ["plan", "--balance", "--length", "5000", "--ranks", "3", "--seeds", "1", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", small)
    assert plan.main() == 0
    assert "pareto, prefix of a quarter" in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 6 * 4  # masks times layouts
    row = next(x for x in rows if (x["mask"], x["layout"]) == ("giant, causal", "balanced"))
    mask = ringattn.Documents(packed("giant", 5000, 0)) & ringattn.Causal()
    plans = ringattn.plan_all(mask, 5000, "balanced", "route", 3)
    moved = [x.traffic() for x in plans]
    even, bound, full = ringattn.balance(plans), ringattn.lower_bound(mask, 5000, 3), 5000 * 2
    assert (row["area"], row["tokens"]) == pytest.approx((even.area, even.tokens))
    assert row["mean_received"] == pytest.approx(sum(t.received_tokens for t in moved) / full)
    assert row["max_received"] == pytest.approx(max(t.received_tokens for t in moved) / full * 3)
    assert row["max_sent"] == pytest.approx(max(t.sent_tokens for t in moved) / full * 3)
    assert row["lower_bound"] == pytest.approx(bound / full)
    assert row["distance"] == pytest.approx(sum(t.received_tokens for t in moved) / bound)


def test_the_window_table_has_a_window_of_1024_keys() -> None:
    case = Case(attention.mask_names(4096)["window"], 4096, torch.float32, backward=False)
    row = case.rows(2000, 2001)[0]
    assert np.flatnonzero(row).tolist() == list(range(977, 2001))


def test_overhead_is_told_by_parts() -> None:
    compared, forward, backward = overhead.one_rank(16, rounds=1)
    assert compared.keys() == overhead.LIMITS.keys()
    assert forward["kernel"] > 0
    assert backward["kernel"] > 0
    step = overhead.ring(3, rounds=1)
    assert step["whole"] > step["kernel"] > 0
    functions, calls, files = overhead.walked(2, backward=True)
    assert calls >= functions > files > 5


def test_the_choice_of_a_kernel_is_compared_with_the_fastest_by_its_name() -> None:
    seconds = {None: 1.0, "sdpa": 3.0, "onednn": 2.0, "auto": 2.1}
    column = {x: ([0.5 if x.schedule != "auto" else seconds[x.kernel]], 0.0) for x in contestants(2)}
    column |= {x: ([1.5], 0.0) for x in column if x.transport == "mpi"}
    assert attention._choice(column) == "1.05× onednn"
    assert attention._choice({x: value for x, value in column.items() if x.kernel != "onednn"}) == "0.70× sdpa"
    assert attention._choice({x: value for x, value in column.items() if x.kernel is None}) == ""


@pytest.mark.parametrize("report", ["--wait", "--nodes"])
def test_models_of_time_and_nodes_are_reported(
    report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    arguments = [report, "--ranks", "16", "--tokens", "64", "--node", "2", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    assert plan.main() == 0
    rows = json.loads(target.read_text())
    if report == "--wait":
        assert [row["route"] for row in rows[::2]] == ["distances", "route", "route(stages=4, buffer=512)"]
        assert all(row["busy"] <= row["bound"] * 1.001 <= row["makespan"] * 1.002 for row in rows)
    else:
        found = {(row["mask"], row["schedule"]): row["between_nodes_tokens"] for row in rows}
        assert found["full", "route"] == 2 * found["full", "route(node_aware)"] == 2 * found["full", "ring(double)"]
    assert "documents" in capsys.readouterr().out
