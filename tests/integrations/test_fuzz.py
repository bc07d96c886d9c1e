"""The integrations called with what makes no sense: an error of ours, at once, or a right answer; nothing else."""

from __future__ import annotations

from tests.fuzzing import calls, integrations

CALLS = 1500


def test_calls_of_integrations() -> None:
    every = integrations.calls()
    for call in every:
        if call.name != "deepspeed.initialize":  # which needs ranks
            call.function(**call.right)
    report = calls.fuzzed(CALLS, every=every)
    assert not report.faults, str(report)
