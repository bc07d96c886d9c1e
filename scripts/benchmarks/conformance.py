"""Many more conformance cases than the test suite has time for: any call on virtual ranks, against the float64 oracle.

Counts what was tried and what was refused, in which words; stops at the first failure and shows the case.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.progress import Progress

import ringattn
from tests.conformance import Case, cases, cross_cases, errors, oracle, simulated

LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6}
SCANS = (ringattn.Scan(), ringattn.Scan(lookahead=0))
KERNELS = ("auto", "onednn", "sdpa", "chunked", "reference")


@st.composite
def asked(draw: st.DrawFn) -> Case:
    """Any case, with schedules and kernels asked for by name even where they may refuse."""
    case = draw(st.one_of(cases(), cases(), cross_cases()))
    schedules = (case.schedule, *SCANS) if case.mechanism == "linear" else (*[case.schedule] * 40, *SCANS)
    kernels = (*[case.kernel] * 20, *KERNELS)
    return dataclasses.replace(case, schedule=draw(st.sampled_from(schedules)), kernel=draw(st.sampled_from(kernels)))


def main() -> int:
    """Runs the cases."""
    parser = argparse.ArgumentParser(prog="scripts/bench conformance", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tried: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    worst: dict[str, float] = collections.defaultdict(float)

    with Progress(transient=True) as progress:
        task = progress.add_task("cases", total=options.cases)

        @seed(options.seed)
        @settings(
            max_examples=options.cases,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=asked())
        def run(case: Case) -> None:
            progress.advance(task)
            try:
                results = simulated(case)
            except ringattn.UnsupportedError as refusal:
                words = re.sub(r"\([a-z]+=.*?\)", "(…)", str(refusal))
                refused[re.sub(r"-?[\d.]*\d", "#", words)] += 1
                return
            found = errors(results, oracle(case))
            assert max(found.values()) <= LIMIT[case.dtype], (case, found)
            kind = "cross" if case.kv_length is not None else "self"
            tried[f"{case.mechanism}, {kind}, {str(case.dtype).removeprefix('torch.')}"] += 1
            for feature in case.features:
                tried[feature] += 1
            for name, error in found.items():
                key = f"{name} {case.dtype}"
                worst[key] = max(worst[key], error)

        run()
    for title, table in (("exact", tried), ("refused", refused)):
        print(f"{title}: {sum(n for name, n in table.items() if title == 'refused' or ',' in name)} cases")
        for name, count in sorted(table.items()):
            print(f"  {count:6d}  {name}")
    print("largest error")
    for name, error in sorted(worst.items()):
        print(f"  {error:.1e}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
