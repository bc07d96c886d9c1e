"""The commands as people call them: what they print, what they refuse, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ringattn
from ringattn import conformance, kernels, layouts, schedules
from ringattn.cli import app, options
from ringattn.naming import by_name
from scripts.benchmarks.teams import mpirun

ROOT = Path(__file__).parents[2]
OF_KEYS = [name for name, member in by_name(schedules.FLAT).items() if member.payload.per_key]
"""The schedules that serve every mechanism."""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_help_lists_the_commands_and_each_has_examples() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    for command in ("simulate", "plan", "verify", "kernels", "doctor", "train"):
        assert command in shown.output
    for command in ("simulate", "plan", "verify", "kernels", "doctor"):
        text = run(command, "--help")
        assert text.exit_code == 0
        assert f"ringattn {command}" in text.output


def test_simulate_prints_every_schedule_within_its_bounds() -> None:
    shown = run("simulate", "--ring", "3", "--length", "129", "--dim", "8", "--backward")
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("within bounds") == len(OF_KEYS)
    assert all(name in shown.output for name in OF_KEYS)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_simulate_tells_machines_errors_limits_and_bytes(dtype: str) -> None:
    shown = run(
        *("simulate", "--ring", "7", "--length", "299", "--heads", "8", "--kv-heads", "2", "--dim", "16"),
        *("--value-dim", "8", "--mask", "documents:150,1,148&causal", "--layout", "zigzag", "--dtype", dtype),
        *("--backward", "--json"),
    )
    assert shown.exit_code == 0, shown.output
    value = json.loads(shown.stdout)
    assert value["within"]
    assert [x["schedule"] for x in value["schedules"]] == OF_KEYS
    for outcome in value["schedules"]:
        assert set(outcome["errors"]) == {"out", "dq", "dk", "dv"}
        assert all(0 < error <= outcome["limits"][name] for name, error in outcome["errors"].items())
        assert outcome["received_bytes"] == outcome["planned_bytes"] > 0


@pytest.mark.parametrize(("mechanism", "schedules"), [("hard", OF_KEYS), ("linear", [*OF_KEYS, "scan"])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_simulate_runs_every_mechanism(mechanism: str, schedules: list[str], dtype: str) -> None:
    shape = ("--ring", "4", "--length", "129", "--dim", "8", "--backward")
    shown = run("simulate", *shape, "--mechanism", mechanism, "--dtype", dtype, "--json")
    assert shown.exit_code == 0, shown.output
    value = json.loads(shown.stdout)
    assert value["within"]
    assert [x["schedule"] for x in value["schedules"]] == schedules


@pytest.mark.parametrize("shape", [("0", "4"), ("3", "5"), ("1", "1")])
def test_simulate_takes_any_length_and_number_of_ranks(shape: tuple[str, str]) -> None:
    assert run("simulate", "--length", shape[0], "--ring", shape[1], "--backward").exit_code == 0


def test_simulate_and_plan_on_two_axes() -> None:
    shown = run("simulate", "--ring", "3", "--ulysses", "2", "--length", "61", "--dim", "8", "--backward", "--json")
    value = json.loads(shown.stdout)
    assert shown.exit_code == 0 and (value["ring"], value["ulysses"]) == (3, 2)
    for outcome in value["schedules"]:
        assert outcome["received_bytes"] == outcome["planned_bytes"] > 0
    shown = run("plan", "--ring", "3", "--ulysses", "2", "--length", "61", "--schedule", "route(lookahead=0)", "--json")
    value = json.loads(shown.stdout)
    assert shown.exit_code == 0 and [value[name] for name in ("ranks", "ring", "ulysses")] == [6, 3, 2]
    shown = run("plan", "--ring", "3", "--ulysses", "2", "--node", "2", "--length", "61")
    assert "61 tokens on 6 ranks (3 x 2)" in shown.output
    names = ("ring", "ring(double=True)", "route(node_aware=True)", "ulysses", "between")
    assert shown.exit_code == 0 and all(name in shown.output for name in names)
    shown = run("plan", "--ring", "2", "--ulysses", "2", "--length", "61", "--schedule", "ulysses(route, slices=2)")
    assert shown.exit_code == 0 and "ulysses(route, slices=2)" in shown.output


def test_simulate_ends_with_1_when_the_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = conformance.attend

    def wrong(*arguments: Any) -> conformance.Part:
        part = right(*arguments)
        part.results["out"].mul_(1.0001)
        return part

    monkeypatch.setattr("ringattn.cli.simulate.attend", wrong)
    shown = run("simulate", "--length", "65", "--dim", "8")
    assert shown.exit_code == 1
    assert "OUT OF BOUNDS" in shown.output


def test_verify_on_one_process_needs_no_launcher() -> None:
    shown = run("verify", "--length", "61", "--mask", "documents:30,1,30&causal", "--dim", "8")
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("passed") == len(options.LAYOUTS) * len(OF_KEYS)


def test_verify_takes_what_walks_the_keys_in_order() -> None:
    shown = run("verify", "--length", "40", "--dim", "8", "--mechanism", "mocha", "--layout", "contiguous")
    assert shown.exit_code == 0 and "wave" in shown.output, shown.output
    for command in (("verify", "--mask", "causal"), ("simulate",), ("plan",)):
        refused = run(*command, "--length", "40", "--mechanism", "monotonic")
        assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1, refused.output


def test_verify_finds_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that ignores the documents gives numbers, and the probe says that they moved."""
    honest: Callable[..., torch.Tensor] = ringattn.attention

    def leaking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ringattn.Mask, **others: Any) -> torch.Tensor:
        return honest(q, k, v, ringattn.Causal(), **others)

    monkeypatch.setattr("ringattn.conformance.running.attention", leaking)
    shown = run("verify", "--length", "61", "--mask", "documents:30,31&causal", "--dim", "8", "--json")
    assert shown.exit_code == 1
    finding = json.loads(shown.stdout)["findings"][0]
    assert not finding["accurate"]
    assert finding["leaks"]["out"] == list(range(30, 61))


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "--mask", "diagonal"),
        ("simulate", "--mask", "documents:3,4", "--length", "8"),
        ("simulate", "--layout", "spiral"),
        ("simulate", "--schedule", "bus"),
        ("simulate", "--heads", "3", "--kv-heads", "2"),
        ("simulate", "--dtype", "int8"),
        ("plan", "--rank", "9"),
        ("plan", "--layout", "spiral"),
        ("plan", "--schedule", "bus"),
        ("plan", "--verify", "some"),
        ("plan", "--dtype", "int8"),
        ("plan", "--heads", "3", "--kv-heads", "2"),
        ("plan", "--mask", "documents:3,4", "--length", "8"),
        ("plan", "--draw", "plan.jpg"),
        ("plan", "--length", "64", "--draw", "/dev/null/plan.png"),
        ("plan", "--length", "64", "--layout", "zigzag", "--schedule", "ring", "--draw", "/dev/null/plan.png"),
        ("verify", "--length", "0"),
        ("verify", "--mask", "documents:3"),
        ("verify", "--length", "64", "--layout", "spiral"),
        ("verify", "--length", "64", "--mechanism", "hope"),
        *((command, "--mask", "(" * 5000) for command in ("plan", "simulate", "verify")),
        *((command, "--mask", "~" * 5000 + "full") for command in ("plan", "simulate", "verify")),
        *((command, "--length", "1099511627776") for command in ("plan", "simulate", "verify")),
        *((command, "--length", "99999999999999999999") for command in ("plan", "simulate", "verify")),
        *((command, "--ring", "100000", "--length", "10") for command in ("plan", "simulate")),
        *((command, "--ring", "99999999999999999999", "--length", "10") for command in ("plan", "simulate")),
        ("plan", "--ring", "100000", "--length", "10", "--layout", "auto", "--schedule", "auto"),
        ("simulate", "--length", "100000000"),
        ("simulate", "--length", "10", "--dim", "99999999999"),
        ("plan", "--length", "10", "--heads", "99999999999999999999"),
        ("plan", "--length", "64", "--draw", "/missing/x.png"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(arguments: tuple[str, ...]) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert shown.stderr.startswith(f"ringattn {arguments[0]}: ")
    assert len(shown.stderr.splitlines()) == 1 and len(shown.stderr) < 700
    assert not Path("/missing").exists()


@pytest.mark.parametrize("length", ["1", "2", "3", "64"])
def test_verify_takes_any_length(length: str) -> None:
    shown = run("verify", "--length", length, "--dim", "8", "--layout", "zigzag")
    assert shown.exit_code == 0, shown.output


def test_verify_takes_a_mask_that_allows_nothing() -> None:
    shown = run("verify", "--length", "64", "--mask", "~full", "--dim", "8", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["passed"]


def test_the_version_is_said() -> None:
    assert run("--version").stdout == f"ringattn {ringattn.__version__}\n"


@pytest.mark.parametrize("command", ["simulate", "plan", "verify"])
def test_interrupted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ringattn.masks.parse", stopped)
    shown = run(command)
    assert shown.exit_code == 130
    assert shown.stderr == f"ringattn {command}: stopped\n"


def test_out_of_memory_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 74.5 GiB")

    monkeypatch.setattr("ringattn.masks.parse", full)
    shown = run("plan")
    assert shown.exit_code == 1
    assert shown.stderr == "ringattn plan: out of memory (Unable to allocate 74.5 GiB). Take fewer tokens or ranks.\n"


def test_train_says_its_name_and_every_member() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "ringattn.cli", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Usage: ringattn train [OPTIONS]" in shown.stdout
    for name in (*layouts.NAMED, *by_name(schedules.MEMBERS), *by_name(kernels.MEMBERS)):
        assert name in shown.stdout


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("launcher", "transport"), [(TORCHRUN, "gloo"), ((*mpirun(2), sys.executable), "mpi")])
def test_verify_on_two_launched_ranks(launcher: tuple[str, ...], transport: str) -> None:
    # one machine: torchrun's own rendezvous finds a free port
    verify = ("-m", "ringattn.cli", "verify", "--length", "61", "--mask", "documents:30,1,30&causal", "--dim", "8")
    done = subprocess.run(
        [*launcher, *verify],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"on 2 ranks, transport {transport}" in done.stdout
    assert done.stdout.count("passed") == len(options.LAYOUTS) * len(OF_KEYS)
