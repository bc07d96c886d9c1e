"""Many more conformance cases than the test suite has time for: any call on virtual ranks, against the float64 oracle.

Says how many were computed, what was refused in which words, and the largest errors. Ends with 1 where any was wrong. A
member of your own is put through it by its name, as in --schedule my.module:Name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from rich.progress import track

from ringattn import conformance
from ringattn.conformance import Case

MEMBERS = ("mask", "layout", "schedule", "mechanism", "kernel")


def _shown(cases: Sequence[Case]) -> Iterator[Case]:
    yield from track(cases, "cases", transient=True)


def main() -> int:
    """Runs the cases."""
    parser = argparse.ArgumentParser(prog="scripts/bench conformance", description=__doc__)
    parser.add_argument("--cases", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    for name in MEMBERS:
        parser.add_argument(f"--{name}", help="by name, or module:Name; any unless given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    members = {name: getattr(options, name) for name in MEMBERS}
    report = conformance.check(**members, count=options.cases, seed=options.seed, track=_shown)
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
