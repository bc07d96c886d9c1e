"""`ringattn plan`: layouts and schedules compared, or every rank's plan of one; checked, printed and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ringattn import layouts, masks
from ringattn.advice.comparison import Combination, Comparison, Request, check, compare, refuse_too_many
from ringattn.advice.recommendation import recommend
from ringattn.checking import choice
from ringattn.cli import options, report
from ringattn.errors import InputError, PlanError
from ringattn.plans.choice import named_schedule
from ringattn.plans.plan import Plan

CHECKED = ("auto", "all", "recommended", "none")
# Tokens times ranks up to which all combinations, or the recommended one, are checked unless --verify says otherwise:
# checking looks at every query and the keys of every rank, and then takes a few seconds.
CHECK_ALL, CHECK_ONE = 1 << 21, 1 << 25

ALL = "all, to compare them, auto"
LayoutNames = Annotated[
    str, typer.Option("--layout", help=f"Who holds which tokens: {ALL}, {options.listed(options.LAYOUTS)}.")
]
ScheduleNames = Annotated[
    str, typer.Option("--schedule", help=f"What moves when: {ALL}, {options.listed(options.SCHEDULES)}.")
]
Checked = Annotated[
    str,
    typer.Option(
        "--verify",
        help="Which combinations to check: all, recommended or none; auto checks one that is given, and of many "
        "what takes a few seconds.",
    ),
]
Draw = Annotated[Path | None, typer.Option(help="Draw the plans, and the comparison, into this PNG file.")]
Rank = Annotated[int | None, typer.Option(help="Explain this rank's plan step by step.", min=0)]


def plan(
    ring: options.RingSize = 4,
    ulysses: options.UlyssesSize = 1,
    node: options.Node = None,
    length: options.Length = 8192,
    heads: options.Heads = 8,
    kv_heads: options.KvHeads = None,
    dim: options.Dim = 64,
    value_dim: options.ValueDim = None,
    mask: options.MaskText = "causal",
    layout: LayoutNames = "all",
    schedule: ScheduleNames = "all",
    mechanism: options.MechanismName = "softmax",
    dtype: options.DtypeName = "bfloat16",
    verified: Checked = "auto",
    rank: Rank = None,
    draw: Draw = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare layouts and schedules for a mask, or show what every rank would do; without running anything.

    Compares all layouts with all schedules, says which to take and why: the fewest pairs of the busiest rank (to 5 %),
    of those the fewest bytes that any rank receives (to 2 %). Given one layout and one schedule, prints the ranks.

    Plans are checked, all ranks' together: every allowed pair computed exactly once, every send received, every
    gradient brought home, no deadlock. A broken one ends with exit code 1.

    [bold]Examples[/bold]

      ringattn plan --ring 8 --length 65536 --mask "window:4095&causal" --draw plan.png

      ringattn plan --ring 3 --length 2999 --mask "documents:1500,1,1498&causal" --json

      ringattn plan --ring 8 --length 65536 --mechanism linear

      ringattn plan --ring 8 --length 8192 --layout zigzag --schedule route --rank 3

      ringattn plan --ring 4 --ulysses 2 --node 4 --length 65536 --heads 32 --kv-heads 8
    """
    _refuse(layout, schedule, verified, rank, ring * ulysses, draw)
    request = Request(
        masks.parse(mask),
        length,
        ring,
        heads,
        kv_heads or heads,
        dim,
        value_dim or dim,
        options.dtype_named(dtype),
        options.mechanism_named(mechanism),
        ulysses,
        node,
    )
    try:
        if "all" in (layout, schedule):
            names = options.LAYOUTS if layout == "all" else (request.layout_named(layout),)
            schedules = request.schedules if schedule == "all" else (schedule,)
            _compared(request, names, schedules, verified, rank, draw, as_json)
        else:
            _single(request, layout, schedule, verified, rank, draw, as_json)
    except PlanError as error:
        typer.echo(f"ringattn plan: {error}", err=True)
        raise typer.Exit(1) from error


def _refuse(layout: str, schedule: str, verified: str, rank: int | None, ranks: int, draw: Path | None) -> None:
    if layout != "all":
        layouts.named(layout, masks.Causal(), 1)
    if schedule != "all":
        named_schedule(schedule)
    choice(verified, "--verify", CHECKED)
    if rank is not None and rank >= ranks:
        raise InputError(f"--rank must be below the number of ranks ({ranks}); got {rank}.")
    options.check_writable(draw, "--draw", ".png")


def _compared(
    request: Request,
    names: Sequence[str],
    schedules: Sequence[str],
    verified: str,
    rank: int | None,
    draw: Path | None,
    as_json: bool,
) -> None:
    if verified == "auto":
        size = request.length * request.ranks
        verified = "all" if size <= CHECK_ALL else "recommended" if size <= CHECK_ONE else "none"
    comparison = compare(request, names, schedules, verified, partial(options.track, "layouts and schedules"))
    advice = recommend(comparison.combinations)
    plans: list[Plan] = []
    if verified == "recommended" or rank is not None or draw is not None:
        with options.working(advice.taken.name):
            plans = request.plans(advice.taken.layout, advice.taken.schedule)
            if verified == "recommended":
                check(plans, advice.taken.name)
    if as_json:
        options.print_json(report.comparison_for_machines(comparison, advice))
    else:
        report.show_comparison(comparison, advice)
        _explain(plans, rank)
    _draw(plans, request.length, draw, (comparison, advice.taken))


def _single(
    request: Request, layout: str, schedule: str, verified: str, rank: int | None, draw: Path | None, as_json: bool
) -> None:
    refuse_too_many(request, layout)
    with options.working("planning"):
        plans = request.plans(layout, schedule)
    if verified != "none":
        with options.working("checking the plans"):
            check(plans)
    if as_json:
        options.print_json(report.ranks_for_machines(plans))
    else:
        report.show_ranks(plans, request)
        _explain(plans, rank)
    _draw(plans, request.length, draw, None)


def _explain(plans: Sequence[Plan], rank: int | None) -> None:
    if rank is not None:
        typer.echo("\n" + plans[rank].explain())


def _draw(
    plans: Sequence[Plan], length: int, path: Path | None, compared: tuple[Comparison, Combination] | None
) -> None:
    if path is None:
        return
    from ringattn.advice.figures import draw_plans

    try:
        with options.working("drawing"):
            draw_plans(plans, length, path, compared)
    except OSError as error:
        raise InputError(f"--draw cannot write {path}: {error.strerror}.") from error
    typer.echo(f"drawn into {path}", err=True)
