"""A different pack of documents every step of the trainer: planning as a share of the step, and memory over the steps.

Planning is all that a new mask costs: the balanced layout, the plan, its check, and lowering its tiles to launches.
Steps are those of `launch/train.py`, forward, backward, gradient sum and optimizer, on Gloo ranks of one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn.kernels import onednn
from ringattn.runtime.request import Request
from ringattn.sharding import Sharding
from ringattn.trainer.config import Config
from ringattn.trainer.data import Corpus, read_corpus
from scripts.benchmarks.teams import Team, Worker

TRAINER = Path(__file__).parents[2] / "launch" / "train.py"


@dataclass(frozen=True)
class Steps:
    """One rank's: seconds of each step, seconds of them spent planning, resident bytes after it."""

    seconds: list[float]
    planning: list[float]
    resident: list[int]
    documents: set[int]


class Stopwatch:
    """Adds up the time spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def train(_: Worker, length: int, steps: int) -> Steps:
    """Trains and reads the clock, the stopwatch and the resident set after every step."""
    spec = importlib.util.spec_from_file_location("trainer", TRAINER)
    assert spec is not None and spec.loader is not None
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    planning = Stopwatch()
    Sharding.spans.func = planning.wrap(Sharding.spans.func)  # type: ignore[attr-defined]
    Request.prepared = planning.wrap(Request.prepared)  # type: ignore[method-assign]
    onednn._lowered_parts = planning.wrap(onednn._lowered_parts)

    config = replace(Config(), length=length)
    mesh, corpus = ringattn.init(), Corpus(read_corpus(None)[0], 0)
    model = trainer.wrapped(mesh, torch.device("cpu"), config, partial(trainer.build_optimizer, config=config))
    done = Steps([], [], [], set())
    for step in range(steps):
        packs, before, start = trainer.batch_of(corpus, step, config), planning.seconds, time.perf_counter()
        trainer.gradients(model, packs, config)
        model.step()
        done.seconds.append(time.perf_counter() - start)
        done.planning.append(planning.seconds - before)
        done.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        done.documents.add(hash(packs[0].mask))
    return done


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="scripts/bench packs", description=__doc__)
    parser.add_argument("--length", type=int, default=16_384, help="tokens a pack (default 16384)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed blocks go back at once: what is resident is in use
    with Team(options.ranks, timeout=3600) as team:
        parts = team.call(train, options.length, options.steps)
    table = Table(title=f"{options.steps} steps of {options.length} tokens, {options.ranks} ranks")
    for title in ("rank", "packs", "step, median", "planning, median", "planning, largest", "share of all time"):
        table.add_column(title, justify="right")
    marks = [options.steps * i // 5 for i in range(1, 6)]
    for mark in marks:
        table.add_column(f"resident\nstep {mark}", justify="right")
    for rank, part in enumerate(parts):
        table.add_row(
            str(rank),
            str(len(part.documents)),
            f"{statistics.median(part.seconds) * 1e3:.0f} ms",
            f"{statistics.median(part.planning) * 1e3:.1f} ms",
            f"{max(part.planning) * 1e3:.1f} ms",
            f"{sum(part.planning) / sum(part.seconds):.2%}",
            *(f"{part.resident[mark - 1] / 2**20:.0f} MiB" for mark in marks),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
