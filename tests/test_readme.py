"""What the README shows is true: its example runs, its output is what is printed, its tables are those of the lists."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import ringattn
from ringattn import kernels, layouts, masks, mechanisms, schedules
from ringattn.advice.repertoire import Sizes, facts
from ringattn.cli import app
from ringattn.naming import name_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE, TRAINING = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]


def test_the_example_runs_as_a_file(tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(EXAMPLE)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,  # and no clock of its own: the suite has one
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1, " in done.stdout and "kernel" in done.stdout


def test_the_training_example_runs() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(TRAINING, "README.md", "exec"), {})  # noqa: S102 (our own text)
    losses = re.findall(r"tensor\((.*?)\)", printed.getvalue())
    assert len(losses) == 4 and all(float(loss) > 0 for loss in losses)


def _run(monkeypatch: pytest.MonkeyPatch, ranks: int) -> tuple[list[dict[str, Any]], str]:
    """The example's names on every virtual rank, and what they print."""
    meshes: dict[int, ringattn.Mesh] = {}
    monkeypatch.setattr("ringattn.init", lambda: meshes[threading.get_ident()])

    def rank(mesh: ringattn.Mesh) -> dict[str, Any]:
        meshes[threading.get_ident()] = mesh
        names: dict[str, Any] = {}
        exec(compile(EXAMPLE, "README.md", "exec"), names)  # noqa: S102 (our own text)
        return names

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = ringattn.simulate(rank, ring=ranks).results
    return results, printed.getvalue()


def test_the_example_gives_the_same_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,), _ = _run(monkeypatch, 1)
    several, printed = _run(monkeypatch, 4)
    for names in several:
        torch.testing.assert_close(names["full"], alone["full"])
    summed = sum(names["embed"].weight.grad for names in several)
    torch.testing.assert_close(summed, alone["embed"].weight.grad)
    shown = re.search(r"```text\n(rank 1 of 4.*?)\n  kernel", README, re.DOTALL)
    assert shown is not None and _without_hashes(shown.group(1)) in _without_hashes(printed), printed


def _without_hashes(text: str) -> str:
    return re.sub(r"plan [0-9a-f]{16}", "plan", text)


def _table() -> str:
    """Every member, what it is called in texts, and the first sentence of its docstring."""
    lines = ["| axis | member | by name | what it is |", "|---|---|---|---|"]
    for folder in (masks, layouts, schedules, mechanisms, kernels):
        axis = folder.__name__.rpartition(".")[2].removesuffix("s")
        for nth, member in enumerate(folder.MEMBERS):
            name = name_of(member) if member not in (masks.Predicate, layouts.Explicit) else "—"
            words = " ".join((member.__doc__ or "").split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
            lines.append(f"| {axis if nth == 0 else ''} | `{member.__name__}` | {name} | {words} |")
    return "\n".join(lines)


def test_the_table_of_members_is_that_of_the_lists() -> None:
    assert _table() in README, _table()


def test_the_table_of_mechanisms_has_all_that_the_command_shows() -> None:
    """Figures are of one machine; what is fixed is not."""
    shown = re.findall(r"^\| `([^`]*)` \| ([^|]*) \| ([^|]*) \| [\d.]+ .?B \|", README, re.MULTILINE)
    found = set(shown)
    sizes = Sizes(length=8, dim=16, value_dim=16, ring=2)
    assert found == {(x.title, x.state, x.travels) for x in facts(sizes, measured=False)}


def test_what_is_named_is_there() -> None:
    for picture in re.findall(r"\]\((\.pictures/.*?)\)", README):
        assert (ROOT / picture).is_file(), picture
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert commands == set(re.findall(r"^(?:.*--no-python )?ringattn (\w+)", README, re.MULTILINE))
    for script in set(re.findall(r"scripts/bench (\w+)", README)):
        assert (ROOT / "scripts" / "benchmarks" / f"{script}.py").is_file(), script
    for folder in re.findall(r"  (\w+)/$", README, re.MULTILINE):
        assert (ROOT / "ringattn" / folder).is_dir(), folder
