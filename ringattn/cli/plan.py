"""`ringattn plan`: every rank's plan, checked, printed and drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import ringattn
from ringattn import masks
from ringattn.cli import options
from ringattn.errors import InputError
from ringattn.masks import Mask
from ringattn.plans import Plan

Draw = Annotated[Path | None, typer.Option(help="Draw the plans into this PNG file.")]
Rank = Annotated[int | None, typer.Option(help="Explain this rank's plan step by step.", min=0)]


def plan(
    ring: options.RingSize = 4,
    length: options.Length = 8192,
    heads: options.Heads = 8,
    kv_heads: options.KvHeads = None,
    dim: options.Dim = 64,
    value_dim: options.ValueDim = None,
    mask: options.MaskText = "causal",
    layout: options.LayoutName = "auto",
    schedule: Annotated[str, typer.Option(help="What moves when: ring, route or auto.")] = "auto",
    dtype: options.DtypeName = "bfloat16",
    rank: Rank = None,
    draw: Draw = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what every rank would compute, send and receive, without running anything.

    The plans are checked first, all together: every allowed pair computed exactly once, every send received, every
    gradient brought home, no deadlock. A broken one ends with exit code 1.

    [bold]Examples[/bold]

      ringattn plan --ring 4 --length 8192 --draw plan.png

      ringattn plan --ring 8 --length 65536 --mask "window:4095&causal" --schedule route --rank 3

      ringattn plan --ring 3 --length 2999 --mask "documents:1500,1,1498&causal" --json
    """
    parsed = masks.parse(mask)
    if rank is not None and rank >= ring:
        raise InputError(f"--rank must be below --ring ({ring}); got {rank}.")
    if draw is not None and draw.suffix.lower() != ".png":
        raise InputError(f"--draw writes a PNG: the file's name must end in .png; got {draw}.")
    with options.working("planning"):
        plans = ringattn.plan_all(
            parsed,
            length,
            layout=layout,
            schedule=schedule,
            ring=ring,
            heads=(heads, kv_heads or heads),
            head_dims=(dim, value_dim or dim),
            dtype=options.dtype_named(dtype),
        )
    with options.working("checking the plans"):
        _check(plans)
    if as_json:
        options.print_json(_machine(plans))
    else:
        _show(plans, parsed, length)
        if rank is not None:
            typer.echo("\n" + plans[rank].explain())
    if draw is not None:
        from ringattn.cli.figures import draw_plans

        try:
            with options.working("drawing"):
                draw_plans(plans, length, draw)
        except OSError as error:
            raise InputError(f"--draw cannot write {draw}: {error.strerror}.") from error
        typer.echo(f"drawn into {draw}", err=True)


def _check(plans: list[Plan]) -> None:
    try:
        ringattn.verify(plans)
    except ringattn.errors.PlanError as error:
        typer.echo(f"ringattn plan: {error}", err=True)
        raise typer.Exit(1) from error


def _machine(plans: list[Plan]) -> dict[str, Any]:
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


def _show(plans: list[Plan], mask: Mask, length: int) -> None:
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
            options.readable_count(plan.area),
            str(len(plan.steps)),
            str(sum(len(tiles) for tiles in plan.tiles.values())),
            str(moved.received_tokens),
            str(moved.sent_tokens),
            str(moved.messages),
            options.readable_bytes(moved.received_bytes or 0),
            options.readable_bytes(moved.backward_received_bytes or 0),
            options.readable_bytes(plan.memory().total),
            plan.hash,
        )
    console.print(table)
    even, received = ringattn.balance(plans), sum(plan.traffic().received_tokens for plan in plans)
    console.print(
        f"largest share over the mean: pairs {even.area:.3f}, tokens {even.tokens:.3f}, "
        f"received {even.received:.3f}, sent {even.sent:.3f}",
        highlight=False,
    )
    everything = length * (len(plans) - 1)
    if everything:
        least = ringattn.lower_bound(mask, length, len(plans))
        console.print(
            f"all ranks together receive {received} key positions: {received / everything:.1%} of what handing "
            f"everything round would take; a layout balanced to 2 % needs at least {least / everything:.1%}",
            highlight=False,
        )
