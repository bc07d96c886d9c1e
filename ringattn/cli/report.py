"""What `ringattn plan` prints: the comparison of layouts and schedules, or one line per rank."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

import ringattn
from ringattn.advice.comparison import Comparison, Request
from ringattn.advice.recommendation import RULE, Recommendation
from ringattn.cli import options
from ringattn.plans.plan import Plan
from ringattn.readable import dtype_name, readable_bytes, readable_count

COLUMNS = (
    "most pairs\n/ mean",
    "most tokens\n/ mean",
    "receives\nmean",
    "receives\nat most",
    "sends\nat most",
    "backward\nreceives\nat most",
    "messages\nof all",
    "steps\nat most",
    "memory\nat most",
    "received\n/ least",
)


def show_comparison(comparison: Comparison, choice: Recommendation) -> None:
    console = options.console()
    console.print(str(comparison.request), highlight=False)
    schedule = Column("schedule", no_wrap=True, min_width=max(len(x.schedule) for x in comparison.combinations))
    table = Table("", "layout", schedule, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    nodes = comparison.request.node is not None
    for title in (*COLUMNS, *("between nodes\npositions",) * nodes):
        table.add_column(title, justify="right")
    for x in comparison.combinations:
        taken = x == choice.taken
        table.add_row(
            "→" if taken else "",
            *(x.layout, x.schedule, f"{x.area:.3f}", f"{x.tokens:.3f}"),
            *map(readable_bytes, (x.received_bytes_mean, x.received_bytes_max, x.sent_bytes_max)),
            readable_bytes(x.backward_received_bytes_max),
            *(str(x.messages), str(x.steps), readable_bytes(x.memory)),
            "—" if x.over_bound is None else f"{x.over_bound:.2f}",
            *("—" if x.over_bound is None else readable_count(x.between_nodes_tokens),) * nodes,
            style="bold green" if taken else None,
        )
    console.print(table)
    _show_notes(console, comparison)
    _show_choice(console, comparison, choice)


def _show_notes(console: Console, comparison: Comparison) -> None:
    """What the columns leave open: the bound, what was left out, what was checked."""
    request, everything = comparison.request, comparison.request.length * (comparison.request.ranks - 1)
    notes = []
    if comparison.bound:
        notes.append(
            f"least: a layout balanced to 2 % must receive {readable_bytes(comparison.bound_bytes)} a rank, "
            f"{comparison.bound / everything:.1%} of what handing everything round would take; others may fall below"
        )
    elif everything:
        notes.append("least: for this mask the bound is 0, and tells nothing")
    for name, words in comparison.refused.items():
        console.print(f"not {name}: {words}", highlight=False)
    for name, tiles in comparison.left_out.items():
        cut = f"would cut this mask into up to {readable_count(tiles)} tiles on {request.ranks} ranks"
        notes.append(f"left out: {name} {cut}")
    checked = {
        "all": "checked: the plans of every combination, all ranks' together",
        "recommended": "checked: the plans of the recommended combination only (--verify all checks every one)",
        "none": "checked: nothing (--verify recommended takes some seconds to minutes for so many tokens and ranks)",
    }
    for note in (*notes, checked[comparison.verified]):
        console.print(note, highlight=False, soft_wrap=True)


def _show_choice(console: Console, comparison: Comparison, choice: Recommendation) -> None:
    taken, auto = choice.taken, comparison.auto
    console.print(
        f"\n[bold green]recommended: --layout {taken.layout} --schedule {shlex.quote(taken.schedule)}[/] (given, shows "
        "each rank)",
        highlight=False,
    )
    for line in choice.why:
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    if auto:
        same = auto.name == taken.name
        console.print(f"auto takes {'the same' if same else auto.name}", highlight=False)


def comparison_for_machines(comparison: Comparison, choice: Recommendation) -> dict[str, Any]:
    asked = comparison.request
    return {
        "mask": str(asked.mask),
        "length": asked.length,
        "ranks": asked.ranks,
        "ring": asked.ring,
        "ulysses": asked.ulysses,
        "node": asked.node,
        "heads": asked.heads,
        "kv_heads": asked.kv_heads,
        "dim": asked.dim,
        "value_dim": asked.value_dim,
        "dtype": dtype_name(asked.dtype),
        "lower_bound": {"received_tokens": comparison.bound, "received_bytes_mean": comparison.bound_bytes},
        "combinations": [dataclasses.asdict(x) for x in comparison.combinations],
        "refused": comparison.refused,
        "left_out": [{"layout": name, "tiles": size} for name, size in comparison.left_out.items()],
        "verified": comparison.verified,
        "recommended": {**dataclasses.asdict(choice.taken), "why": choice.why, "rule": RULE},
        "auto": dataclasses.asdict(comparison.auto) if comparison.auto else None,
    }


def ranks_for_machines(plans: Sequence[Plan]) -> dict[str, Any]:
    return {
        "description": plans[0].description,
        "reason": plans[0].reason,
        "balance": vars(ringattn.balance(plans)),
        "ranks": [
            {
                "rank": plan.rank,
                "hash": plan.hash,
                "tokens": plan.tokens,
                "area": plan.area,
                "steps": len(plan.steps),
                "traffic": dataclasses.asdict(plan.traffic()),
                "memory": plan.memory().buffers,
            }
            for plan in plans
        ],
    }


def show_ranks(plans: Sequence[Plan], request: Request) -> None:
    console = options.console()
    console.print(plans[0].description, highlight=False)
    if plans[0].reason:
        console.print(plans[0].reason, highlight=False)
    table = Table("rank")
    for title in ("tokens", "pairs", "steps", "tiles", "receives\npositions", "sends\npositions", "messages"):
        table.add_column(title, justify="right")
    for title in ("receives\nforward", "receives\nbackward", "memory", "plan"):
        table.add_column(title, justify="right")
    for plan in plans:
        moved = plan.traffic()
        table.add_row(
            str(plan.rank),
            str(plan.tokens),
            readable_count(plan.area),
            str(len(plan.steps)),
            str(sum(len(tiles) for tiles in plan.tiles.values())),
            str(moved.received_tokens),
            str(moved.sent_tokens),
            str(moved.messages),
            readable_bytes(moved.received_bytes or 0),
            readable_bytes(moved.backward_received_bytes or 0),
            readable_bytes(plan.memory().total),
            plan.hash,
        )
    console.print(table)
    even, received = ringattn.balance(plans), sum(plan.traffic().received_tokens for plan in plans)
    console.print(
        f"largest share over the mean: pairs {even.area:.3f}, tokens {even.tokens:.3f}, "
        f"received {even.received:.3f}, sent {even.sent:.3f}",
        highlight=False,
    )
    everything = request.length * (len(plans) - 1)
    if everything:
        least = ringattn.lower_bound(request.mask, request.length, len(plans))
        console.print(
            f"all ranks together receive {received} key positions: {received / everything:.1%} of what handing "
            f"everything round would take; a layout balanced to 2 % needs at least {least / everything:.1%}",
            highlight=False,
        )
