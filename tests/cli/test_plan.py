"""`ringattn plan`: its figures are those of the plans, and what it recommends is right for the mask."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ringattn
from ringattn import masks, schedules
from ringattn.advice import comparison
from ringattn.advice.comparison import Combination, Request
from ringattn.advice.recommendation import recommend
from ringattn.cli import app, options
from ringattn.cli import plan as command
from ringattn.naming import by_name

OF_KEYS = [name for name, member in by_name(schedules.FLAT).items() if member.payload.per_key]
"""The schedules that serve every mechanism."""
DOCUMENTS = "documents:1500,900,2,600&causal"
HEADS: dict[str, Any] = {"heads": (8, 2), "head_dims": (16, 8), "dtype": "float32"}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def compared(*arguments: str) -> Any:
    shown = run(*arguments, "--json")
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


@pytest.mark.parametrize(
    ("mask", "length", "ring"),
    [("causal", 515, 4), (DOCUMENTS, 3002, 7), ("window:40,3", 700, 5), ("full", 9, 3), ("prefix:20|causal", 300, 3)],
)
def test_the_comparison_is_what_the_plans_say(mask: str, length: int, ring: int) -> None:
    found = compared(
        *("--mask", mask, "--length", str(length), "--ring", str(ring), "--heads", "8", "--kv-heads", "2"),
        *("--dim", "16", "--value-dim", "8", "--dtype", "float32"),
    )
    bound = ringattn.lower_bound(masks.parse(mask), length, ring)
    assert found["lower_bound"]["received_tokens"] == bound
    assert found["lower_bound"]["received_bytes_mean"] == pytest.approx(bound / ring * 2 * (16 + 8) * 4)
    assert found["verified"] == "all"
    combinations = {(x["layout"], x["schedule"]): x for x in found["combinations"]}
    assert set(combinations) == {(a, b) for a in options.LAYOUTS for b in OF_KEYS}
    for (layout, schedule), x in combinations.items():
        plans = ringattn.plan_all(masks.parse(mask), length, layout, schedule, ring, **HEADS)
        moved = [plan.traffic() for plan in plans]
        even = ringattn.balance(plans)
        assert (x["area"], x["tokens"]) == (even.area, even.tokens)
        assert x["area_max"] == max(plan.area for plan in plans)
        assert x["received_tokens_max"] == max(t.received_tokens for t in moved)
        assert x["sent_tokens_max"] == max(t.sent_tokens for t in moved)
        for field in ("received_bytes", "backward_received_bytes"):
            sizes = [getattr(t, field) for t in moved]
            assert x[f"{field}_max"] == max(sizes)
            assert x[f"{field}_mean"] == pytest.approx(sum(sizes) / ring)
        assert x["sent_bytes_max"] == max(t.sent_bytes or 0 for t in moved)
        assert x["backward_sent_bytes_max"] == max(t.backward_sent_bytes or 0 for t in moved)
        assert x["messages"] == sum(t.messages for t in moved)
        assert x["steps"] == max(len(plan.steps) for plan in plans)
        assert x["memory"] == max(plan.memory().total for plan in plans)
        received = sum(t.received_tokens for t in moved)
        assert x["over_bound"] == (pytest.approx(received / bound) if bound and not moved[0].received_queries else None)


@pytest.mark.parametrize(
    ("mask", "length", "expected"),
    [
        ("full", 4096, ("contiguous", "ring")),
        ("causal", 4096, ("zigzag", "route")),
        ("window:63", 4096, ("contiguous", "ring")),
        ("window:511&causal", 65536, ("contiguous", "ring")),
        (DOCUMENTS, 3002, ("balanced", "route")),
        ("documents:100,3000,50,200,700,46&causal", 4096, ("balanced", "route")),
    ],
)
@pytest.mark.parametrize("ring", ["4", "8"])
def test_the_recommended_one_is_right_and_auto_takes_it(
    mask: str, length: int, expected: tuple[str, str], ring: str
) -> None:
    found = compared("--mask", mask, "--length", str(length), "--ring", ring, "--verify", "none")
    for name in ("recommended", "auto"):
        assert (found[name]["layout"], found[name]["schedule"]) == expected
    best = min(x["area_max"] for x in found["combinations"])
    assert found["recommended"]["area_max"] <= 1.05 * best
    assert found["recommended"]["why"][0].startswith("its busiest rank computes 1.0")
    taken = ringattn.plan_all(masks.parse(mask), length, ring=int(ring))
    assert found["auto"]["received_tokens_max"] == max(plan.traffic().received_tokens for plan in taken)


NOTHING = {field.name: 0 for field in dataclasses.fields(Combination)}


def combination(name: str, area: int, most: int, mean: int, messages: int) -> Combination:
    layout, schedule = name.split()
    some = {"area_max": area, "area": area / 100, "received_bytes_max": most, "received_bytes_mean": mean}
    return Combination(**{**NOTHING, **some, "layout": layout, "schedule": schedule, "messages": messages})  # type: ignore[arg-type]


def test_the_rule_puts_balance_first_then_bytes_then_messages() -> None:
    unbalanced = combination("contiguous ring", area=106, most=200, mean=10, messages=1)
    heavy = combination("zigzag ring", area=100, most=103, mean=10, messages=1)
    wasteful = combination("zigzag route", area=104, most=102, mean=90, messages=1)
    chatty = combination("balanced ring", area=100, most=100, mean=80, messages=3)
    best = combination("balanced route", area=105, most=101, mean=81, messages=2)
    equal = combination("striped route", area=105, most=101, mean=81, messages=2)
    choice = recommend([unbalanced, heavy, wasteful, chatty, best, equal])
    assert choice.taken is best
    assert choice.why == [
        "its busiest rank computes 1.05 times the mean; contiguous with ring 1.06",
        "no rank receives more than 101 B forward, 2% less than zigzag with ring (103 B)",
        "the mean rank receives 81 B forward, 10% less than zigzag with route (90 B)",
        "its ranks send 2 messages; balanced with ring 3",
        "by these measures as good, and not simpler: striped with route",
    ]


def test_what_balance_costs_is_said() -> None:
    light = combination("contiguous ring", area=210, most=10, mean=10, messages=1)
    choice = recommend([light, combination("balanced route", area=105, most=40, mean=30, messages=2)])
    assert choice.why == [
        "its busiest rank computes 1.05 times the mean; contiguous with ring 2.10",
        "its price: with contiguous with ring no rank would receive more than 10 B, 75% less, but the busiest would "
        "compute 2.00 times as long",
    ]


def test_the_table_marks_the_recommended_row_and_says_why() -> None:
    shown = run("--mask", DOCUMENTS, "--length", "3002")
    assert shown.exit_code == 0, shown.output
    marked = [line.split() for line in shown.output.splitlines() if "→" in line]
    assert [words[1:3] for words in marked] == [["balanced", "route"]]
    for words in ("recommended: --layout balanced --schedule route", "contiguous 1.97", "auto takes the same"):
        assert words in shown.output
    assert "every combination" in shown.output


def test_one_axis_can_be_held() -> None:
    found = compared("--layout", "auto", "--length", "100")
    assert [(x["layout"], x["schedule"]) for x in found["combinations"]] == [("zigzag", each) for each in OF_KEYS]
    found = compared("--schedule", "auto", "--mask", "window:5", "--length", "100")
    assert [x["layout"] for x in found["combinations"]] == list(options.LAYOUTS)
    assert {x["schedule"] for x in found["combinations"]} == {"ring", "route"}  # what auto takes


@pytest.mark.parametrize(("length", "ring"), [(0, 4), (1, 1), (3, 5), (64, 1)])
def test_any_length_goes_with_any_number_of_ranks(length: int, ring: int, tmp_path: Path) -> None:
    shown = run("--length", str(length), "--ring", str(ring), "--draw", str(tmp_path / "plan.png"))
    assert shown.exit_code == 0, shown.output


def test_one_combination_is_shown_rank_by_rank() -> None:
    arguments = ("--ring", "5", "--length", "2999", "--mask", "documents:1500,1,1498&causal")
    shown = run(*arguments, "--layout", "auto", "--schedule", "auto", "--rank", "2")
    assert shown.exit_code == 0, shown.output
    assert "rank 2 of 5" in shown.output
    assert "auto took" in shown.output
    value = compared("--ring", "5", "--length", "100", "--layout", "auto", "--schedule", "auto")
    assert sum(rank["tokens"] for rank in value["ranks"]) == 100
    assert sum(rank["area"] for rank in value["ranks"]) == 5050


def test_a_rank_of_the_recommended_plans_is_explained() -> None:
    shown = run("--mask", DOCUMENTS, "--length", "3002", "--rank", "3")
    assert "rank 3 of 4, route" in shown.output


@pytest.mark.parametrize("chosen", [(), ("--layout", "striped", "--schedule", "ring")])
def test_the_picture_is_drawn(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    target = tmp_path / "plan.png"
    shown = run("--ring", "3", "--length", "300", "--draw", str(target), *chosen)
    assert shown.exit_code == 0, shown.output
    picture = target.read_bytes()
    assert picture.startswith(b"\x89PNG")
    height = int.from_bytes(picture[20:24], "big")
    assert height == (770 if chosen else 1210)  # a second row of charts where there is a comparison


@pytest.mark.parametrize("chosen", [(), ("--layout", "zigzag", "--schedule", "ring")])
def test_broken_plans_end_with_1(monkeypatch: pytest.MonkeyPatch, chosen: tuple[str, ...]) -> None:
    def broken(plans: Sequence[ringattn.Plan]) -> None:
        raise ringattn.PlanError("rank 1 sends what nobody receives")

    monkeypatch.setattr("ringattn.verify", broken)
    shown = run(*chosen)
    assert shown.exit_code == 1
    assert "rank 1 sends what nobody receives" in shown.stderr
    assert ("contiguous with ring" in shown.stderr) == (not chosen)  # which one it was, where there are several
    assert run(*chosen, "--verify", "none").exit_code == 0


@pytest.mark.parametrize(
    ("limits", "said", "calls"),
    [((2**30, 2**30), "all", 3 * len(OF_KEYS)), ((0, 2**30), "recommended", 1), ((0, 0), "none", 0)],
)
def test_what_is_checked_is_said(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], said: str, calls: int
) -> None:
    """Balanced and zigzag come to the same for a causal mask: three of the four layouts are planned."""
    checked: list[int] = []
    monkeypatch.setattr("ringattn.verify", lambda plans: checked.append(len(plans)))
    monkeypatch.setattr(command, "CHECK_ALL", limits[0])
    monkeypatch.setattr(command, "CHECK_ONE", limits[1])
    assert compared("--length", "64")["verified"] == said
    assert checked == [4] * calls


def test_a_layout_that_makes_too_many_tiles_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "COMPARED_TILES", 150)
    arguments = ("--mask", "documents:" + ",".join(["16"] * 16), "--length", "256", "--ring", "8")
    found = compared(*arguments)
    assert [x["layout"] for x in found["left_out"]] == ["striped"]
    assert "striped" not in {x["layout"] for x in found["combinations"]}
    assert "left out: striped" in run(*arguments).output

    monkeypatch.setattr(comparison, "COMPARED_TILES", 1)
    monkeypatch.setattr(comparison, "PLANNED_TILES", 1)
    for chosen in ((), ("--layout", "striped", "--schedule", "ring")):
        shown = run(*chosen)
        assert shown.exit_code == 2
        assert "too many tiles" in shown.stderr
        assert len(shown.stderr.splitlines()) == 1


@pytest.mark.parametrize("layout", options.LAYOUTS)
@pytest.mark.parametrize("mask", ["causal", "full", "window:9,4", "documents:100,3,30,67", "prefix:7|causal"])
def test_tiles_are_not_undercounted(mask: str, layout: str) -> None:
    request = Request(masks.parse(mask), 200, 8, 1, 1, 8, 8, options.dtype_named("float32"))
    true = sum(len(plan.tile_rows) for plan in request.plans(layout, "route"))
    assert true <= request.tiles(layout) <= 4 * true


def test_drawing_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = run("--draw", "plan.png", "--length", "64")
    assert shown.exit_code == 2
    assert "ringattn[plot]" in shown.stderr


def test_a_mechanism_that_sums_keys_up_is_compared_with_scan() -> None:
    shape = ("--ring", "4", "--length", "4096", "--mechanism", "linear")
    shown = run(*shape, "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    scans = [x for x in found["combinations"] if x["schedule"] == "scan"]
    assert [x["layout"] for x in scans] == ["contiguous", "zigzag", "balanced"]
    assert "rank 0 sees rank 1's only in part" in found["refused"]["striped with scan"]
    assert (found["recommended"]["layout"], found["recommended"]["schedule"]) == ("zigzag", "scan")
    assert found["auto"]["schedule"] == "scan"
    plans = Request(ringattn.Causal(), 4096, 4, 8, 8, 64, 64, torch.bfloat16, ringattn.Linear()).plans("zigzag", "scan")
    assert scans[1]["received_bytes_max"] == max(plan.traffic().received_bytes or 0 for plan in plans)
    assert "not striped with scan" in run(*shape).output
    refused = run("--ring", "4", "--length", "64", "--layout", "striped", "--schedule", "scan")
    assert refused.exit_code == 2 and "needs the keys themselves" in refused.output
