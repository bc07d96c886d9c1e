"""Thousands of calls with arguments that make no sense: an error of ours, at once, or a right answer; nothing else.

Each call is one that works, with one or two arguments replaced. What an argument may be is said by its kind; a call
that takes anything else without a word fails the test, and so do an error that is not of `ringattn.errors` and a call
that does not come back.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.fuzzing import calls, commands, environments, files, ranks
from tests.fuzzing.kinds import Call
from tests.workers import Workers

CALLS = 4400  # of functions
COMMANDS = 400
ENVIRONMENTS = 2000
FILES = 90
PROCESSES = 70
TOGETHER = 700  # of three ranks, one of which is called with nonsense


@pytest.mark.parametrize("call", calls.EVERY, ids=lambda call: call.name)
def test_the_calls_work_before_anything_is_replaced(call: Call) -> None:
    call.function(**call.right)


@pytest.mark.timeout(600)
def test_calls() -> None:
    report = calls.fuzzed(CALLS)
    assert not report.faults, str(report)


@pytest.mark.timeout(600)
def test_commands() -> None:
    report = commands.fuzzed(COMMANDS)
    assert not report.faults, str(report)


@pytest.mark.timeout(600)
def test_one_rank_of_several() -> None:
    report = ranks.fuzzed(TOGETHER)
    assert not report.faults, str(report)


def test_one_of_several_processes(gloo: Workers, tmp_path: Path) -> None:
    ended = gloo.run(ranks.RANKS, ranks.run, PROCESSES, 1, str(tmp_path))
    report = ranks.judged_together(ended, 1, str(tmp_path))
    assert report.calls == PROCESSES and not report.faults, str(report)


def test_environments() -> None:
    report = environments.fuzzed(ENVIRONMENTS)
    assert not report.faults, str(report)


@pytest.mark.timeout(600)
def test_damaged_files(trainer: ModuleType) -> None:
    report = files.fuzzed(FILES, trainer)
    assert not report.faults, str(report)


@pytest.mark.timeout(600)
def test_places_that_cannot_be_written(trainer: ModuleType) -> None:
    report = files.unwritable(trainer)
    assert not report.faults, str(report)
