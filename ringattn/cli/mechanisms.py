"""`ringattn mechanisms`: every mechanism in a table, measured here, and its attention matrix in a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ringattn.advice.repertoire import Facts, Sizes, facts
from ringattn.checking import integer
from ringattn.cli import options
from ringattn.errors import InputError
from ringattn.readable import readable_bytes

LONGEST = 1 << 14  # tokens: some mechanisms take a minute of them

Draw = Annotated[
    Path | None, typer.Option(help="Draw each one's attention matrix, of the same small input, into this PNG file.")
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Measure = Annotated[bool, typer.Option("--measure/--no-measure", help="Whether times are measured.")]


def mechanisms(
    ring: options.RingSize = 4,
    length: options.Length = 1024,
    heads: options.Heads = 4,
    kv_heads: options.KvHeads = None,
    dim: options.Dim = 64,
    value_dim: options.ValueDim = None,
    measure: Measure = True,
    draw: Draw = None,
    markdown: Markdown = False,
    as_json: options.AsJson = False,
) -> None:
    """Show every mechanism: what it keeps and moves, what serves it, and what it costs here, beside softmax.

    The state is what is kept for a query and head, in numbers; what travels is for a key head. D are the dims of a
    query and key, Dv those of a value. Bytes are what the busiest of virtual ranks received in one forward pass under a
    causal mask (a full one where the mechanism asks for it). Times are forward and backward on one rank, as multiples
    of softmax's on its fastest kernel, and of softmax's on the reference kernel where the mechanism runs on that.

    [bold]Examples[/bold]

      ringattn mechanisms

      ringattn mechanisms --length 4096 --ring 8 --heads 8 --kv-heads 2

      ringattn mechanisms --no-measure --draw gallery.png

      ringattn mechanisms --json
    """
    integer(length, "--length", least=1, below=LONGEST + 1)
    options.check_writable(draw, "--draw", ".png")
    sizes = Sizes(length, heads, kv_heads or heads, dim, value_dim or dim, ring)
    if sizes.heads % sizes.kv_heads:
        raise InputError(f"--heads must be a multiple of --kv-heads; got {sizes.heads} and {sizes.kv_heads}.")
    found = facts(sizes, measured=measure, track=lambda all_: options.track("mechanisms", list(all_)))
    if markdown:
        typer.echo(_markdown(found))
    elif as_json:
        options.print_json({"sizes": dataclasses.asdict(sizes), "mechanisms": [dataclasses.asdict(x) for x in found]})
    else:
        _show(found, sizes)
    if draw is not None:
        from ringattn.advice.gallery import draw_gallery

        with options.working("drawing"):
            draw_gallery(draw)
        typer.echo(f"drawn into {draw}", err=True)


HEAD = ("mechanism", "state", "travels", "bytes", "masks", "schedules", "kernels", "× softmax", "same kernel")
NUMBERS = ("bytes", "× softmax", "same kernel")


def _cells(x: Facts) -> tuple[str, ...]:
    times = ("—" if value is None else f"{value:.1f}" for value in (x.times, x.times_reference))
    served = ", ".join(x.schedules), ", ".join(x.kernels)
    return x.title, x.state, x.travels, readable_bytes(x.received_bytes), x.mask, *served, *times


def _markdown(found: Sequence[Facts]) -> str:
    rows = [HEAD, ["---:" if name in NUMBERS else "---" for name in HEAD]]
    rows += [(f"`{title}`", *cells) for title, *cells in map(_cells, found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _show(found: Sequence[Facts], sizes: Sizes) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in HEAD:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for x in found:
        table.add_row(*map(escape, _cells(x)))
    console = options.console()
    console.print(table)
    console.print(
        f"{sizes.length} tokens, {sizes.heads} query and {sizes.kv_heads} key heads of {sizes.dim} and "
        f"{sizes.value_dim} dims, float32, {sizes.ring} ranks",
        highlight=False,
    )
