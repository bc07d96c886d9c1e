"""`ringattn kernels`: the rates that are kept, shown, renewed and forgotten."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ringattn.cli import app
from ringattn.kernels import OneDNN, Sdpa, choice
from ringattn.kernels.machine import Machine
from ringattn.kernels.rates import Rates, Workload
from ringattn.kernels.store import Entry, Store

WORKLOAD = Workload("Softmax", "float32", 64, 64, 2, 1, 64, True)
RATES = Rates(WORKLOAD, (("onednn", 0.002), ("sdpa", 0.001)))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A store with rates of this machine, with one thread and with two, and of another one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = Machine.here([OneDNN(), Sdpa()])
    store = Store.of_user()
    for machine in (
        dataclasses.replace(here, threads=1),
        dataclasses.replace(here, threads=2),
        dataclasses.replace(here, processor="another processor"),
    ):
        store.keep(Entry(machine, RATES))
    store.keep(Entry(here, Rates(dataclasses.replace(WORKLOAD, mechanism="Foreign"), RATES.seconds)))
    return store


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["kernels", *arguments])


def test_rates_are_shown_by_machine(store: Store) -> None:
    shown = _run()
    assert shown.exit_code == 0
    for words in ("1 thread, PyTorch", "2 threads, PyTorch", "another processor", "(another machine)", str(store.path)):
        assert words in shown.output
    rows = [line.split() for line in shown.output.splitlines() if "Softmax" in line]
    assert [row[-3:] for row in rows] == [["2.0", "1.0", "sdpa"]] * 3


def test_rates_for_machines(store: Store) -> None:
    found = json.loads(_run("--json").stdout)
    assert found["file"] == str(store.path)
    assert [rate["here"] for rate in found["rates"]] == [True, True, False, True]
    assert found["rates"][0]["seconds"] == {"onednn": 0.002, "sdpa": 0.001}
    assert found["rates"][0]["taken"] == "sdpa"


def test_renewing_measures_what_was_measured_here_with_as_many_threads(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    before = torch.get_num_threads()

    def measure(kernels: Any, mechanism: Any, workload: Workload) -> Rates:
        measured.append((torch.get_num_threads(), workload))
        return Rates(workload, tuple((str(kernel), 0.5) for kernel in kernels))

    monkeypatch.setattr(choice, "measure", measure)
    shown = _run("--renew")
    assert shown.exit_code == 0 and "could not be kept" not in shown.output
    assert measured == [(1, WORKLOAD), (2, WORKLOAD)] and torch.get_num_threads() == before
    new = [entry.rates.seconds for entry in store.entries()]
    assert sorted(new) == sorted([(("onednn", 0.5), ("sdpa", 0.5))] * 2 + [RATES.seconds] * 2)


def test_a_kernel_that_has_changed_is_renewed_in_place_of_its_old_version(store: Store) -> None:
    store.clear()
    old = dataclasses.replace(Machine.here([OneDNN(), Sdpa()]), kernels=("onednn 0", "sdpa 1"))
    store.keep(Entry(old, RATES))
    assert _run("--renew").exit_code == 0
    (entry,) = store.entries()
    assert entry.machine == Machine.here([OneDNN(), Sdpa()])
    assert entry.rates.workload == WORKLOAD and entry.rates != RATES


def test_rates_are_forgotten(store: Store) -> None:
    assert "Forgot 4 measurements" in _run("--clear").output
    assert store.entries() == []
    assert json.loads(_run("--clear", "--json").stdout)["cleared"] == 0
    assert "No rates are kept" in _run().output


def test_a_store_that_cannot_be_written_costs_nothing_but_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    shown = _run()
    assert shown.exit_code == 0 and "No rates are kept" in shown.output
    assert _run("--renew").exit_code == 0
    cleared = _run("--clear")
    assert cleared.exit_code == 2 and "cannot be removed" in cleared.output


def test_rates_that_cannot_be_kept_are_shown_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(store: Store, text: str) -> None:
        raise PermissionError

    monkeypatch.setattr(Store, "_write", refused)
    monkeypatch.setattr(choice, "measure", lambda kernels, mechanism, workload: Rates(workload, (("sdpa", 0.5),)))
    shown = _run("--renew")
    assert shown.exit_code == 0
    assert "500.0" in shown.output and "could not be kept" in shown.output


def test_wrong_options_are_one_readable_line(store: Store) -> None:
    shown = _run("--renew", "--clear")
    assert shown.exit_code == 2
    assert "give one of them" in shown.output and len(shown.output.splitlines()) == 1
