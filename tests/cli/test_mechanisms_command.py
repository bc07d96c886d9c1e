"""`ringattn mechanisms`: the table has every mechanism and is right, and the gallery is of what runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ringattn.advice.gallery import SMALL, matrix
from ringattn.advice.repertoire import Specimen, mask_for, specimens
from ringattn.cli import app
from ringattn.mechanisms import MEMBERS

SPECIMENS = {specimen.title: specimen for specimen in specimens()}
UNNORMALISED = ("Gated", "Monotonic", "MoChA", "Softmax(centres")
"""Whose rows need not sum to 1."""
SIGNED = ("Gated",)


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["mechanisms", *arguments])
    return result.exit_code, result.output


def test_the_table_has_every_mechanism() -> None:
    code, said = _run("--no-measure", "--length", "24", "--ring", "2", "--heads", "2", "--dim", "8", "--json")
    rows = {row["title"]: row for row in json.loads(said)["mechanisms"]}
    assert code == 0
    assert rows.keys() == SPECIMENS.keys()
    assert {title.split("(")[0] for title in rows} == {member.__name__ for member in MEMBERS}
    assert rows["Softmax()"]["state"] == "Dv + 1"
    assert rows["Softmax()"]["received_bytes"] == 12 * 2 * 16 * 4  # rank 1 of zigzag sees half of the other's: 12 keys
    assert rows["Linear()"]["travels"] == "D Dv + D a run of keys"
    assert {"ring", "route", "scan"} <= {*rows["Linear()"]["schedules"]}
    assert all(row["times"] is None for row in rows.values())


def test_a_table_for_people_and_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "gallery.png"
    code, said = _run("--length", "16", "--ring", "2", "--heads", "1", "--dim", "4", "--draw", str(path))
    assert code == 0
    assert "× softmax" in said
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--length", "99999999"), "--length is an integer, below 16385"),
        (("--heads", "3", "--kv-heads", "2"), "--heads must be a multiple of --kv-heads"),
        (("--draw", "nowhere/x.png"), "--draw"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], words: str) -> None:
    code, said = _run("--no-measure", *arguments)
    assert code == 2
    assert words in said


@pytest.mark.parametrize("title", SPECIMENS)
def test_pictures_are_empty_outside_the_mask_and_rows_sum_to_what_they_should(title: str) -> None:
    specimen: Specimen = SPECIMENS[title]
    weights = matrix(specimen)
    mask = mask_for(specimen.made(SMALL))
    assert not weights[~mask.dense(range(SMALL.length), range(SMALL.length)).numpy()].any()
    assert title.startswith(SIGNED) or weights.min() >= 0
    sums = weights.sum(axis=1)
    if title.startswith(UNNORMALISED):
        assert title.startswith(SIGNED) or (sums < 1 + 1e-5).all()
    else:
        np.testing.assert_allclose(sums, 1, atol=1e-5)
