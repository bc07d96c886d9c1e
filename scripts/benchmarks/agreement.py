"""What it costs the ranks to agree on every call: messages of a rank by the number of ranks, and its share of a step.

Steps are those of the demo, `launch/train.py` with its defaults, on Gloo ranks of one thread, with agreement and
without in turn, so that a slow minute is both's. Their difference is smaller than the noise of most machines: so the
comparison is also timed by itself, all ranks starting together, and multiplied by the comparisons of a step.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

import ringattn
from ringattn.kernels.machine import processor
from ringattn.runtime import agreement
from ringattn.trainer.config import Config
from ringattn.trainer.data import Corpus, read_corpus
from ringattn.trainer.model import Decoder
from ringattn.training import Batch, sum_gradients, token_loss
from scripts.benchmarks.teams import Team, Worker

REPEATS = 200  # comparisons that are timed together


def messages(ranks: int) -> list[int]:
    """What each of so many virtual ranks sends to agree on one forward pass."""

    def call(mesh: ringattn.Mesh) -> int:
        sharding = ringattn.Sharding(ranks, mesh)
        q = torch.randn(1, 1, sharding.count, 4)
        ringattn.attention(q, q, q, ringattn.Window(1), sharding=sharding, schedule="route", kernel="reference")
        return mesh.connected().counters.control_messages

    return [int(sent) for sent in ringattn.simulate(call, ring=ranks).results]


def prepare(worker: Worker, agrees: bool, length: int) -> None:
    """One training step of the demo, on a mesh that agrees or on one that does not."""
    kept = f"agrees: {agrees}"
    if kept not in worker.kept:
        config = Config(length=length)
        mesh = ringattn.init(agreement=agrees)
        corpus = Corpus(read_corpus(None)[0], config.seed)
        worker.kept[kept] = mesh, Decoder(config.shape, config.seed), Batch(corpus.pack(0, length), mesh)
    mesh, model, batch = worker.kept[kept]

    def step() -> None:
        token_loss(model(batch.tokens, batch.positions, batch.attend), batch).backward()
        sum_gradients(model, mesh)
        for parameter in model.parameters():
            parameter.grad = None

    worker.prepared = step


def comparisons(worker: Worker) -> int:
    """Control messages of one step, by those of one comparison."""
    mesh: ringattn.Mesh = worker.kept["agrees: True"][0]
    counters = mesh.connected().counters
    before = counters.control_messages
    worker.prepared()
    return (counters.control_messages - before) // math.ceil(math.log2(mesh.sequence_size))


def alone(worker: Worker) -> float:
    """Seconds of a comparison, when all ranks come to it together."""
    transport = worker.kept["agrees: True"][0].connected()
    fields = {"call": "fwd 1", "shapes": "x" * 80, "mask": "x" * 80, "layout": "x" * 80}
    agreement.check(transport, fields)
    started = time.perf_counter()
    for _ in range(REPEATS):
        agreement.check(transport, fields)
    return (time.perf_counter() - started) / REPEATS


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench agreement", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="Gloo ranks of the steps (default 4)")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of a step (default 16,384)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind (default 7)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{processor()}; load average before: {os.getloadavg()[0]:.1f}", highlight=False)
    table = Table("ranks", "messages a rank and call", "2 log2(ranks)", title="Messages by which ranks agree on a call")
    for ranks in (2, 4, 8, 64, 100, 256):
        table.add_row(str(ranks), str(max(messages(ranks))), f"{2 * math.log2(ranks):.1f}")
    console.print(table)
    with Team(options.ranks) as team:
        times: dict[bool, list[float]] = {True: [], False: []}
        for nth in range(options.rounds + 1):
            for agrees in (True, False):
                team.call(prepare, agrees, options.length)
                seconds = team.time()
                if nth:  # the first plans and measures
                    times[agrees].append(seconds)
        team.call(prepare, True, options.length)
        count, each = team.call(comparisons)[0], max(team.call(alone))
    with_it, without = (statistics.median(times[agrees]) for agrees in (True, False))
    console.print(
        f"A step of {options.length} tokens on {options.ranks} Gloo ranks, median of {options.rounds}: {with_it:.3f} s "
        f"with agreement, {without:.3f} s without ({with_it / without - 1:+.1%}).\n{count} comparisons a step of "
        f"{each * 1e3:.2f} ms: {count * each / with_it:.2%} of the step.",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
