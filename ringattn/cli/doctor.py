"""`ringattn doctor`: what the ranks it is launched on are like, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ringattn
from ringattn.cli import options
from ringattn.diagnosis import Examination, Instruments, examine, findings
from ringattn.diagnosis.computing import gigaflops
from ringattn.diagnosis.examination import steps
from ringattn.diagnosis.findings import kinds, typical
from ringattn.errors import InputError
from ringattn.readable import readable_bytes, readable_seconds

SHOWN_RATES = 4  # classes of problems; --json and --profile have all
MOST_COLUMNS = 16  # of ranks in a table; --json and --plot have all

ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="Write what was measured, for ringattn.init(profile=FILE).")
]
Plot = Annotated[Path | None, typer.Option(help="Draw latency and bandwidth of all pairs into this PNG file.")]


def doctor(plot: Plot = None, profile: ProfileFile = None, as_json: options.AsJson = False) -> None:
    """Look at the ranks this is launched on: launcher, hosts, versions, kernels, every link, and what is slow.

    Between every pair of ranks latency and bandwidth are measured, all pairs of a round at once, and the two patterns
    in which attention uses them; on each rank how fast it computes. What is unlike the rest is said in words. It
    takes some seconds, and changes nothing. With --profile it writes the figures into a file, by which
    ringattn.init(profile=FILE) has "auto" choose schedules and kernels.

    [bold]Examples[/bold]

      ringattn doctor

      torchrun --nproc-per-node 4 --no-python ringattn doctor

      mpirun -n 4 ringattn doctor --plot links.png

      srun ringattn doctor --json > cluster.json

      torchrun --nproc-per-node 8 --no-python ringattn doctor --profile cluster.profile
    """
    options.check_writable(plot, "--plot", ".png")
    options.check_writable(profile, "--profile")
    mesh = ringattn.init()
    try:
        with options.bar("measuring", steps(mesh.size), shown=mesh.rank == 0) as advance:
            found = examine(mesh, Instruments(advance=advance))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if mesh.rank == 0:
        if as_json:
            options.print_json(for_machines(found))
        else:
            show(found, options.console())
        if plot is not None:
            _draw(found, plot)
        if profile is not None:
            found.profile.write(profile)


def for_machines(found: Examination) -> dict[str, Any]:
    """The examination as JSON: seconds and bytes a second."""
    rates = [
        {**dataclasses.asdict(entry.rates.workload), "seconds": dict(entry.rates.seconds), "taken": entry.rates.best}
        for entry in found.trial.entries
    ]
    return {
        "launcher": found.facts[0].launcher,
        "reason": found.facts[0].reason,
        "transport": found.transport,
        "axes": found.axes,
        "ranks": [
            {**dataclasses.asdict(facts), "gigaflops": speed, "clock_offset": offset}
            for facts, speed, offset in zip(found.facts, found.speeds, found.offsets, strict=True)
        ],
        "latency": found.latency,
        "bandwidth": found.bandwidth,
        "ring": found.ring,
        "all_to_all": found.all_to_all,
        "hidden_from": found.hidden_from,
        "kernel": found.trial.kernel,
        "rates": rates,
        "findings": findings(found),
    }


def show(found: Examination, console: Console) -> None:
    first = found.facts[0]
    lines = [
        ("launcher", f"{first.launcher}: {first.reason}"),
        ("ranks", f"{found.size} on {_hosts(found)}; mesh {_axes(found)}"),
        ("transport", found.transport + _mpi(first.gpu_aware_mpi)),
        ("devices", _counted(f"{each.device} ({each.processor})" for each in found.facts)),
        ("versions", ", ".join(f"{name} {version}" for name, version in first.versions.items())),
    ]
    for name, text in lines:
        console.print(f"[bold]{name:10}[/] {escape(text)}", highlight=False, soft_wrap=True)
    _show_kernels(found, console)
    if found.size > 1:
        _show_ranks(found, console)
        _show_links(found, console)
    said = findings(found)
    console.print("\n[bold]findings[/]" if said else "\n[bold green]nothing is unlike the rest[/]")
    for each in said:
        console.print(f"  [bold red]•[/] {escape(each)}", highlight=False, soft_wrap=True)


def _show_kernels(found: Examination, console: Console) -> None:
    console.print(
        f"[bold]{'kernel':10}[/] auto takes {found.trial.kernel}: {found.trial.gigaflops:.3g} GFLOP/s on this rank",
        highlight=False,
    )
    for entry in found.trial.entries[:SHOWN_RATES]:
        each = ", ".join(f"{name} {rate:.3g}" for name, rate in gigaflops(entry.rates).items())
        console.print(f"{'':11}{escape(f'{each} GFLOP/s for {entry.rates.workload}')}", highlight=False, soft_wrap=True)


def _show_ranks(found: Examination, console: Console) -> None:
    table = Table("rank", "host", "threads", "GFLOP/s", "clock", box=box.SIMPLE_HEAD)
    for rank, facts in enumerate(found.facts[: 4 * MOST_COLUMNS]):
        clock = f"{found.offsets[rank] * 1e3:+.1f} ms"
        table.add_row(str(rank), facts.host, f"{facts.threads} of {facts.cores}", f"{found.speeds[rank]:.3g}", clock)
    console.print(table)


def _show_links(found: Examination, console: Console) -> None:
    for kind, pairs in kinds(found).items():
        latency, bandwidth = typical(found.latency, pairs), typical(found.bandwidth, pairs)
        console.print(
            f"{kind}: {readable_seconds(latency)} and {readable_bytes(bandwidth)}/s each way, the median of "
            f"{len(pairs)} pair{'s' * (len(pairs) != 1)}",
            highlight=False,
        )
    if found.size <= MOST_COLUMNS:
        table = Table("latency \\ bandwidth/s", *map(str, range(found.size)), box=box.SIMPLE_HEAD)
        for row in range(found.size):
            table.add_row(str(row), *(_cell(found, row, column) for column in range(found.size)))
        console.print(table)
    console.print(
        f"all ranks at once: {readable_bytes(found.ring or 0)}/s round the ring, "
        f"{readable_bytes(found.all_to_all or 0)}/s from each to all others",
        highlight=False,
    )
    console.print(
        f"a ring's messages hide behind its computing from some {found.hidden_from} tokens a rank (8 heads of 128)",
        highlight=False,
    )


def _cell(found: Examination, row: int, column: int) -> str:
    """Latency below the diagonal, bandwidth above."""
    if row == column:
        return "—"
    return (
        readable_seconds(found.latency[row][column]) if row > column else readable_bytes(found.bandwidth[row][column])
    )


def _hosts(found: Examination) -> str:
    names = list(dict.fromkeys(each.host for each in found.facts))
    return names[0] if len(names) == 1 else f"{len(names)} hosts, {', '.join(names[:MOST_COLUMNS])}"


def _axes(found: Examination) -> str:
    return ", ".join(f"{name} {size}" for name, size in found.axes.items())


def _mpi(aware: bool | None) -> str:
    return "" if aware is None else f" ({'GPU-aware' if aware else 'not GPU-aware: it moves CPU tensors'})"


def _counted(items: Any) -> str:
    listed = list(items)
    return "; ".join(f"{listed.count(item)} x {item}" for item in dict.fromkeys(listed))


def _draw(found: Examination, path: Path) -> None:
    from ringattn.diagnosis.heatmap import draw

    try:
        draw(found, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {os.strerror(error.errno or 0)}.") from error
