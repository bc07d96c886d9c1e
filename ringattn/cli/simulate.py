"""`ringattn simulate`: attention on virtual ranks in one process, compared with the oracle."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import typer
from rich.progress import ProgressColumn, Task, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

import ringattn
from ringattn import reference
from ringattn.advice.comparison import schedules_for
from ringattn.checking import integer
from ringattn.cli import options
from ringattn.conformance import Case, Part, attend, errors, joined, limits, oracle
from ringattn.conformance.judging import NAMES
from ringattn.errors import UnsupportedError
from ringattn.mechanisms.ordered import Ordered
from ringattn.mesh import Mesh
from ringattn.plans.plan import Plan
from ringattn.readable import dtype_name, readable_bytes, shortened
from ringattn.simulator.virtual import MAX_RANKS
from ringattn.transports.base import Transport


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one schedule did, over all ranks together where not said otherwise."""

    schedule: str
    errors: dict[str, float]
    limits: dict[str, float]
    seconds: float
    received_bytes: int
    planned_bytes: int
    messages: int
    balance: Any  # of the plans: largest share over the mean

    @property
    def within(self) -> bool:
        accurate = all(error <= self.limits[name] for name, error in self.errors.items())
        return accurate and self.received_bytes == self.planned_bytes


def simulate(
    ring: options.RingSize = 4,
    ulysses: options.UlyssesSize = 1,
    node: options.Node = None,
    length: options.Length = 2048,
    heads: options.Heads = 4,
    kv_heads: options.KvHeads = None,
    dim: options.Dim = 64,
    value_dim: options.ValueDim = None,
    batch: options.Batch = 1,
    mask: options.MaskText = "causal",
    layout: options.LayoutName = "auto",
    schedule: options.ScheduleName = None,
    mechanism: options.MechanismName = "softmax",
    kernel: options.KernelName = "auto",
    dtype: options.DtypeName = "float32",
    backward: bool = typer.Option(False, "--backward", help="Compute and compare the gradients too."),
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Run attention on virtual ranks in this process and compare it with a float64 oracle.

    Prints, for each schedule, the error of the output and of every gradient in units of the rounding that the formula
    itself incurs, beside the bound it must keep; the bytes the transport counted beside those of the plans; and how
    evenly work and traffic are spread. The exit code is 1 where a bound is broken.

    [bold]Examples[/bold]

      ringattn simulate --ring 8 --length 4096 --backward

      ringattn simulate --ring 7 --length 2999 --heads 8 --kv-heads 2 --mask "documents:1500,1,1498&causal"

      ringattn simulate --ring 4 --length 8192 --mechanism linear --backward

      ringattn simulate --ring 64 --length 16384 --schedule route --json

      ringattn simulate --ring 2 --ulysses 4 --length 4096 --heads 8 --kv-heads 2 --backward
    """
    given = {"ranks": ring * ulysses, "batch": batch, "layout": layout, "backward": backward, "seed": seed}
    case = options.case_of(mask, length, heads, kv_heads, dim, value_dim, dtype, mechanism, kernel, **given)
    integer(ring * ulysses, "--ring times --ulysses", least=1, below=MAX_RANKS + 1, needed="a number of virtual ranks")
    mesh = Mesh.virtual(ring, ulysses, node=node)
    options.refuse_too_large(case)
    planned = _planned(case, mesh, schedule)
    started = time.perf_counter()
    answer = _oracle(case)
    oracle_seconds = time.perf_counter() - started
    bounds = _shown(limits(case, answer))
    outcomes = [_run(each, mesh, plans, answer, bounds) for each, plans in planned.items()]
    if as_json:
        options.print_json(_machine(case, mesh, outcomes, oracle_seconds))
    else:
        _show(case, mesh, outcomes, oracle_seconds)
    if not all(outcome.within for outcome in outcomes):
        raise typer.Exit(1)


def _shown(results: dict[str, float]) -> dict[str, float]:
    """Those that are shown."""
    return {name: results[name] for name in NAMES if name in results}


def _planned(case: Case, mesh: Mesh, schedule: str | None) -> dict[Case, list[Plan]]:
    """Every rank's plan by the schedule asked for; otherwise by each that serves the mechanism, mask and layout."""
    names = schedules_for(case.attends, mesh.ulysses) if schedule is None else (schedule,)
    planned = {}
    for each in (dataclasses.replace(case, schedule=name) for name in names):
        try:
            planned[each] = _plans(each, mesh)
        except UnsupportedError:
            if schedule is not None or isinstance(case.attends, Ordered):
                raise
    return planned


def _plans(case: Case, mesh: Mesh) -> list[Plan]:
    return ringattn.plan_all(
        case.mask,
        case.length,
        layout=case.layout,
        schedule=case.schedule,
        ring=mesh.ring,
        ulysses=mesh.ulysses,
        node=mesh.node,
        heads=(case.heads, case.kv_heads),
        head_dims=(case.dim, case.value_dim),
        dtype=case.dtype,
        batch=case.batch,
        mechanism=case.attends,
    )


def _oracle(case: Case) -> reference.Evaluation:
    with options.progress_bar() as progress:
        bar = progress.add_task("float64 oracle", total=case.length)
        return oracle(case, lambda row: progress.update(bar, completed=row))


class _Messages(ProgressColumn):
    """A bar of the messages that the ranks' transports have counted, read whenever it is drawn."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.transports: list[Transport] = []
        self._total = total

    def render(self, task: Task) -> ProgressBar:
        done = sum(transport.counters.messages for transport in self.transports)
        return ProgressBar(total=self._total or None, completed=done, width=40, pulse=not self._total)


def _run(case: Case, mesh: Mesh, plans: list[Plan], answer: reference.Evaluation, bounds: dict[str, float]) -> Outcome:
    moved = [plan.traffic() for plan in plans]
    messages = sum(t.messages + t.backward_messages * case.backward for t in moved)
    planned = sum((t.received_bytes or 0) + (t.backward_received_bytes or 0) * case.backward for t in moved)
    inputs = case.inputs()
    column = _Messages(messages)

    def rank(one: Mesh) -> Part:
        column.transports.append(one.connected())
        return attend(one, case, inputs, "cpu", False)

    with options.progress_bar("{task.description}", column, TimeElapsedColumn()) as progress:
        progress.add_task(f"{case.schedule} on {case.ranks} virtual ranks")
        started = time.perf_counter()
        simulation = ringattn.simulate(rank, ring=mesh.ring, ulysses=mesh.ulysses, node=mesh.node)
        seconds = time.perf_counter() - started
    return Outcome(
        str(case.schedule),
        _shown(errors(joined(case, simulation.results), answer)),
        bounds,
        seconds,
        sum(counters.received_bytes for counters in simulation.traffic),
        planned,
        sum(counters.messages for counters in simulation.traffic),
        ringattn.balance(plans),
    )


def _machine(case: Case, mesh: Mesh, outcomes: list[Outcome], oracle_seconds: float) -> dict[str, Any]:
    shown = [
        {
            **dataclasses.asdict(outcome),
            "balance": vars(outcome.balance),
            "within": outcome.within,
        }
        for outcome in outcomes
    ]
    return {
        "ring": mesh.ring,
        "ulysses": mesh.ulysses,
        "mask": str(case.mask),
        "mechanism": str(case.attends),
        "length": case.length,
        "dtype": dtype_name(case.dtype),
        "oracle_seconds": oracle_seconds,
        "schedules": shown,
        "within": all(outcome.within for outcome in outcomes),
    }


def _show(case: Case, mesh: Mesh, outcomes: list[Outcome], oracle_seconds: float) -> None:
    console, ranks = options.console(), f"{mesh.size} ranks" + f" ({mesh.ring} x {mesh.ulysses})" * (mesh.ulysses > 1)
    console.print(
        f"{case.attends}, {shortened(str(case.mask), 60)}: {case.length} tokens on {ranks}, "
        f"{case.heads} query and {case.kv_heads} key heads of {case.dim}, {dtype_name(case.dtype)}",
        highlight=False,
    )
    table = Table("schedule")
    for name in NAMES if case.backward else NAMES[:1]:
        table.add_column(f"{name} error\n(at most)", justify="right")
    for title in ("received\n(planned)", "messages", "most pairs\n/ mean", "most received\n/ mean", "time"):
        table.add_column(title, justify="right")
    table.add_column("")
    for x in outcomes:
        table.add_row(
            x.schedule,
            *(f"{error:.1e}\n({x.limits[name]:.1e})" for name, error in x.errors.items()),
            f"{readable_bytes(x.received_bytes)}\n({readable_bytes(x.planned_bytes)})",
            str(x.messages),
            f"{x.balance.area:.3f}",
            f"{x.balance.received:.3f}",
            f"{x.seconds:.1f} s",
            "[green]within bounds" if x.within else "[bold red]OUT OF BOUNDS",
        )
    console.print(table)
    console.print(f"oracle: {oracle_seconds:.1f} s", highlight=False)
