"""Every mechanism through many random calls against its float64 oracle, and which pairs are refused, in which words.

Ranks, layouts, schedules, masks, kernels, shapes and dtypes are drawn; of each mechanism as many cases. Ends with 1
where any was wrong.
"""

from __future__ import annotations

import argparse
import collections
import sys

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ringattn import conformance
from ringattn.mechanisms import MEMBERS
from ringattn.naming import name_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=120, help="of each mechanism")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table("mechanism", "computed", "wrong", "refused", "largest error over its limit")
    sentences: collections.Counter[str] = collections.Counter()
    faulty = []
    for member in track(MEMBERS, "mechanisms", transient=True):
        name = name_of(member)
        report = conformance.check(mechanism=name, count=arguments.cases, seed=arguments.seed)
        worst = ", ".join(f"{x} {error:.2f}" for x, error in report.worst.items())
        refused = len(report.findings) - len(report.computed)
        table.add_row(name, str(len(report.computed)), str(len(report.faulty)), str(refused), worst)
        sentences.update({f"{name}: {words}": count for words, count in report.refusals.items()})
        faulty += report.faulty
    console = Console(width=160)
    console.print(table)
    for sentence, count in sentences.most_common():
        console.print(f"refused {count} ×, {sentence}", markup=False, highlight=False)
    for finding in faulty[:3]:
        console.print(str(finding), markup=False)
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
