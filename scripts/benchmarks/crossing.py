"""What crosses between nodes: `Route` and `Ring`, and their forms that look at nodes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import ringattn
from ringattn.cli import options as shared
from ringattn.masks import Causal, Documents, Full, Mask
from ringattn.plans.plan import Plan
from ringattn.readable import readable_bytes
from ringattn.schedules import Schedule
from scripts.benchmarks.cases import packed

NODES = 8
SCHEDULES: tuple[Schedule, ...] = (
    ringattn.Route(),
    ringattn.Route(node_aware=True),
    ringattn.Ring(),
    ringattn.Ring(double=True),
)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Of all ranks together, forward."""

    mask: str
    schedule: str
    between_nodes_tokens: int
    between_nodes_bytes: int
    between_nodes_messages: int
    received_tokens: int
    share: float  # of what crosses by the first schedule
    buffers: float  # for keys of the rank that holds most, in shards


def cases(length: int) -> Iterator[tuple[str, str, Mask]]:
    yield "full", "contiguous", Full()
    yield "causal", "zigzag", Causal()
    yield "documents", "balanced", Documents(packed("lognormal", length, 0)) & Causal()


def report(options: argparse.Namespace, path: Path | None) -> int:
    ranks = NODES * options.node
    length, rows = ranks * options.tokens, list[Crossing]()
    shape: dict[str, Any] = {"heads": tuple(options.heads), "head_dims": (options.dim,) * 2, "dtype": options.dtype}
    for name, layout, mask in cases(length):
        flat = None
        for schedule in SCHEDULES:
            plans = ringattn.plan_all(mask, length, layout, schedule, ranks, node=options.node, **shape)
            row = measured(name, schedule, plans, options.tokens, flat)
            flat = row.between_nodes_tokens if flat is None else flat
            rows.append(row)
    shared.console().print(table(rows, f"{NODES} nodes of {options.node} ranks, {length} tokens, forward, all ranks"))
    if path is not None:
        path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    return 0


def measured(name: str, schedule: Schedule, plans: Sequence[Plan], shard: int, flat: int | None) -> Crossing:
    moved = [plan.traffic() for plan in plans]
    tokens, received = sum(x.between_nodes_tokens for x in moved), sum(x.received_tokens for x in moved)
    return Crossing(
        *(name, str(schedule), tokens),
        between_nodes_bytes=sum(x.received_bytes or 0 for x in moved) * tokens // max(received, 1),
        between_nodes_messages=sum(x.between_nodes_messages for x in moved),
        received_tokens=received,
        share=1.0 if flat is None else tokens / max(flat, 1),
        buffers=max(sum(plan.buffer_rows.received) for plan in plans) / shard,
    )


def table(rows: Sequence[Crossing], title: str) -> Table:
    out = Table("mask", "schedule", box=box.SIMPLE_HEAD, title_justify="left", title=title)
    for name in ("between nodes", "of route's", "messages", "received in all", "key buffers\nshards"):
        out.add_column(name, justify="right")
    for row in rows:
        first = row.schedule == str(SCHEDULES[0])
        out.add_row(
            *(row.mask if first else "", row.schedule, readable_bytes(row.between_nodes_bytes)),
            *(f"{row.share:.1%}", str(row.between_nodes_messages), str(row.received_tokens)),
            f"{row.buffers:.1f}",
        )
    return out
