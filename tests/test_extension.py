"""Members from outside the package, of every kind but transports: no registry, and no file of the package touched."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ringattn
from ringattn import conformance
from ringattn.cli import app

SOURCE = '''
"""What somebody else wrote, with nothing but the contracts."""

import dataclasses

import numpy as np

from ringattn.bands import regions
from ringattn.kernels import Reference
from ringattn.layouts import Layout, Contiguous
from ringattn.masks import Mask
from ringattn.mechanisms import Softmax
from ringattn.plans.assembly import Moves
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.schedules.base import Schedule


@dataclasses.dataclass(frozen=True)
class Shout(Schedule):
    """Every owner sends each rank all that it uses, all at once, in one phase."""

    def phases(self, demand, q_ranks, k_ranks):
        return (q_ranks != k_ranks).astype(np.int64)

    def moves(self, demand, rank):
        _, owner, start, stop = demand.keys_needed_by(rank).T
        receives = np.stack([np.ones_like(owner), owner, owner, start, stop], axis=1)[owner != rank]
        user, _, start, stop = demand.keys_requested_from(rank).T
        ones, zeros, own = np.ones_like(user), np.zeros_like(user), np.full_like(user, rank)
        return Moves(receives, np.stack([ones, user, zeros, own, start, stop], axis=1)[user != rank])

    def received_tokens(self, requested, size):
        others = requested[requested[:, Q_RANK] != requested[:, K_RANK]]
        return int((others[:, 3] - others[:, 2]).sum())

    def __str__(self):
        return "shout"


@dataclasses.dataclass(frozen=True)
class Diagonals(Mask):
    """A query sees the keys at most ``width`` to either side of itself, and itself not."""

    width: int = 3

    def regions(self, q_length, k_length):
        rows = [(0, q_length, 0, k_length, 1, self.width), (0, q_length, 0, k_length, -self.width, -1)]
        return regions(rows)

    def allows(self, q, k):
        return (abs(q - k) <= self.width) & (q != k)


@dataclasses.dataclass(frozen=True)
class Backwards(Layout):
    """The last rank holds the beginning."""

    def spans(self, length, size):
        rows = Contiguous().spans(length, size).copy()
        counts = np.zeros(size, dtype=np.int64)
        counts[size - 1 - rows[:, 0]] = rows[:, 3]
        rows[:, 0] = size - 1 - rows[:, 0]
        return rows[np.argsort(rows[:, 0])]

    def __str__(self):
        return "backwards"


HALF = Softmax(scale=0.5)


class Careful(Reference):
    """A kernel."""
'''


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module, as one that is installed beside the package."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "somebody.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("somebody")
        sys.modules.pop("somebody", None)


@pytest.fixture(params=["instance", "module:Name"])
def schedule(request: pytest.FixtureRequest, outside: ModuleType) -> Any:
    return outside.Shout() if request.param == "instance" else "somebody:Shout"


@pytest.fixture(params=["instance", "module:Name"])
def layout(request: pytest.FixtureRequest, outside: ModuleType) -> Any:
    return outside.Backwards() if request.param == "instance" else "somebody:Backwards"


def test_attention(outside: ModuleType, schedule: Any, layout: Any) -> None:
    mask, full = outside.Diagonals(4) | ringattn.SinkTokens(1), torch.randn(1, 2, 40, 8)

    def run(mesh: ringattn.Mesh, **members: Any) -> torch.Tensor:
        sharding = ringattn.Sharding(40, mesh, members.pop("layout", "auto"), mask)
        part = sharding.split(full, 2)
        out = ringattn.attention(part, part, part, mask, sharding=sharding, mechanism=outside.HALF, **members)
        assert "kernel" in ringattn.explain(part, part, part, mask, sharding=sharding, **members)
        return sharding.join(out, 2)

    alone = ringattn.simulate(run, ring=1).results[0]
    for out in ringattn.simulate(lambda mesh: run(mesh, schedule=schedule, layout=layout), ring=4).results:
        torch.testing.assert_close(out, alone)


def test_plan(outside: ModuleType, schedule: Any, layout: Any) -> None:
    mask = outside.Diagonals(4) & ringattn.Causal()
    plans = ringattn.plan_all(mask, 40, layout, schedule, ring=4)
    ringattn.verify(plans)
    assert sum(plan.area for plan in plans) == int(mask.dense(range(40), range(40)).sum())
    sharding = ringattn.Sharding(40, ringattn.Mesh.virtual(4, rank=2), layout)
    one = ringattn.plan(mask, sharding, schedule)
    assert one.hash == plans[2].hash and one.explain().startswith("rank 2 of 4, shout: somebody:Diagonals:4&causal")
    assert "backwards" in one.description


@pytest.mark.parametrize("member", ["schedule", "mask", "layout", "mechanism", "kernel"])
def test_conformance(outside: ModuleType, member: str) -> None:
    instances: dict[str, Any] = {
        "schedule": outside.Shout(),
        "mask": outside.Diagonals(5),
        "layout": outside.Backwards(),
        "mechanism": outside.HALF,
        "kernel": outside.Careful(),
    }
    names = {
        "schedule": "Shout",
        "mask": "Diagonals:5",
        "layout": "Backwards",
        "mechanism": "HALF",
        "kernel": "Careful",
    }
    value: Any
    for value in (instances[member], f"somebody:{names.get(member, 'Careful')}"):
        report = conformance.check(**{member: value}, count=5)
        assert report.passed, report


def _run(*arguments: str) -> Any:
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


KERNEL = ("--kernel", "somebody:Careful")
NAMES = ("--schedule", "somebody:Shout", "--layout", "somebody:Backwards", "--mask", "somebody:Diagonals:6&causal")


def test_the_command_line(outside: ModuleType) -> None:
    simulated = _run(
        "simulate", "--ring", "3", "--length", "64", "--dim", "8", "--mechanism", "somebody:HALF", *KERNEL, *NAMES
    )
    assert [x["schedule"] for x in simulated["schedules"]] == ["somebody:Shout"] and simulated["within"]
    verified = _run("verify", "--length", "64", "--dim", "8", *KERNEL, *NAMES)
    assert [(x["layout"], x["schedule"]) for x in verified["findings"]] == [("somebody:Backwards", "somebody:Shout")]
    assert verified["passed"]
    planned = _run("plan", "--ring", "3", "--length", "64", *NAMES)
    assert len(planned["ranks"]) == 3 and planned["description"].startswith("shout: somebody:Diagonals:6&causal")
    compared = _run("plan", "--ring", "3", "--length", "64", *NAMES[:2], *NAMES[4:])
    assert {x["schedule"] for x in compared["combinations"]} == {"somebody:Shout"}
    assert [x["layout"] for x in compared["combinations"]] == ["contiguous", "zigzag", "striped", "balanced"]
    compared = _run("plan", "--ring", "3", "--length", "64", *NAMES[2:])
    assert {x["layout"] for x in compared["combinations"]} == {"somebody:Backwards"}


def test_what_is_not_there_is_said(outside: ModuleType) -> None:
    for option, value in (
        ("--schedule", "somebody:Whisper"),
        ("--layout", "nobody:Shout"),
        ("--mask", "somebody:Shout"),
    ):
        for command in ("simulate", "plan", "verify"):
            shown = CliRunner().invoke(app, [command, "--length", "64", option, value])
            assert shown.exit_code == 2 and len(shown.stderr.splitlines()) == 1, shown.output
