"""Environments that no launcher sets: a launch that makes sense, or an error of ours."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from random import Random

from ringattn import rendezvous
from ringattn.rendezvous import Launch
from tests.fuzzing.judging import Report, judged

NAMES = sorted({*re.findall(r'"([A-Z][A-Z_]{3,})"', Path(rendezvous.__file__).read_text())})
"""Every variable that is looked at."""
VALUES = (
    *("", "0", "1", "2", "3", "4", "7", "8", "-1", "1.5", "x", "nan", "١", " 1", "1 ", "99999999999999", "0x1", "True"),
    *(
        "localhost",
        "127.0.0.1",
        "a,b",
        "a b\nc",
        "node[1-3,7]",
        "node[",
        "4(x2)",
        "2,4(x3)",
        "[::1]",
        "\0",
        "é",
        "29500",
        "65536",
    ),
)


def fuzzed(count: int, seed: int = 0) -> Report:
    """So many environments of up to eight variables."""
    random, report = Random(seed), Report()
    for _ in range(count):
        names = random.sample(NAMES, random.randint(1, 8))
        environment = {name: random.choice(VALUES) for name in names}
        report.add("Launch.found", judged(partial(_found, environment)), str(environment))
    return report


def _found(environment: dict[str, str]) -> None:
    launch = Launch.found(environment)
    sensible = 0 <= launch.rank < launch.world and launch.local_rank >= 0 and launch.local_world >= 1
    if not sensible or (launch.port is not None and not 0 <= launch.port < 65536):
        raise AssertionError(f"found {launch}")
