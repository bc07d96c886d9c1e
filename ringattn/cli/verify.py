"""`ringattn verify`: parity and the leak probe on the ranks it is launched on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.table import Table

import ringattn
from ringattn import reference
from ringattn.advice.comparison import schedules_for
from ringattn.cli import options
from ringattn.cli.verify_model import verify_model
from ringattn.conformance import Case, Leaks, Results, attend, errors, leaks, limits, oracle
from ringattn.conformance.judging import DENSE_LIMIT, NAMES
from ringattn.errors import InputError, UnsupportedError
from ringattn.mechanisms.ordered import Ordered
from ringattn.mesh import Mesh
from ringattn.readable import dtype_name


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one combination did. Every rank comes to the same one, so that all end with the same exit code."""

    layout: str
    schedule: str
    errors: dict[str, float]
    limits: dict[str, float]
    leaks: Leaks

    @property
    def accurate(self) -> bool:
        return all(error <= self.limits[name] for name, error in self.errors.items())

    @property
    def passed(self) -> bool:
        return self.accurate and self.leaks.none


def verify(
    length: options.Length = 2053,
    heads: options.Heads = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.", min=1)] = 2,
    dim: options.Dim = 32,
    mask: Annotated[
        str | None, typer.Option(help="As for ringattn simulate; three causal documents unless given.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="One layout; all of them unless given.")] = None,
    schedule: options.ScheduleName = None,
    mechanism: options.MechanismName = "softmax",
    kernel: options.KernelName = "auto",
    dtype: options.DtypeName = "float32",
    seed: options.Seed = 0,
    ulysses: options.UlyssesSize = 1,
    model: Annotated[
        str | None,
        typer.Option(help="A transformers model to check instead: config.json, a folder with one, or module:function."),
    ] = None,
    shrink: Annotated[bool, typer.Option(help="With --model: the same kinds of layers, but small.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Check attention on the ranks this is launched on: output and gradients against a float64 oracle, and leaks.

    The leak probe changes one token of the first document and computes again: no output and no gradient that the mask
    does not tie to that token may change by a single bit. The exit code is 1 on every rank where anything fails.

    [bold]Examples[/bold]

      ringattn verify

      torchrun --nproc-per-node 4 --no-python ringattn verify

      torchrun --nproc-per-node 2 --no-python ringattn verify --mask "window:127&causal" --dtype bfloat16

      torchrun --nproc-per-node 4 --no-python ringattn verify --ulysses 2

    With --model, a transformers model with random weights is compared with itself in one process: every attention
    layer, logits, loss and every gradient, on packed documents of --length tokens; and no document may see another.

      torchrun --nproc-per-node 2 --no-python ringattn verify --model my-model/config.json --shrink --length 257
    """
    if model is not None:
        verify_model(
            model, length, ulysses=ulysses, schedule=schedule or "auto", shrink=shrink, seed=seed, as_json=as_json
        )
        return
    if not 0 < length <= DENSE_LIMIT:
        raise InputError(f"verify looks at the mask as a matrix: --length must be 1 to {DENSE_LIMIT}; got {length}.")
    usual = "full" if isinstance(options.mechanism_named(mechanism), Ordered) else _documents(length)
    case = options.case_of(mask or usual, length, heads, kv_heads, dim, None, dtype, mechanism, kernel, seed=seed)
    options.refuse_too_large(case)
    case.mask.regions(length, length)  # a mask that does not fit is refused before any rank waits for another
    mesh = ringattn.init(ulysses=ulysses)
    try:
        case = dataclasses.replace(case, ranks=mesh.sequence_size)
        findings = _findings(mesh, _combinations(mesh, case, layout, schedule))
        if mesh.rank == 0:
            _report(mesh, case, findings, as_json)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


def _documents(length: int) -> str:
    """The mask unless one is given: a third of the tokens, one alone, and the rest."""
    first = length // 3
    return f"documents:{first},{min(1, length - first)},{max(length - first - 1, 0)}&causal"


def _combinations(mesh: Mesh, case: Case, layout: str | None, schedule: str | None) -> list[Case]:
    """What was asked for; otherwise every layout with every schedule that serves the mechanism, the mask and it."""
    schedules = schedules_for(case.attends, mesh.ulysses) if schedule is None else (schedule,)
    cases = []
    for names in itertools.product((layout,) if layout else options.LAYOUTS, schedules):
        taken = dataclasses.replace(case, layout=names[0], schedule=names[1])
        sharding = ringattn.Sharding(case.length, mesh, taken.layout, case.mask)
        try:
            if isinstance(case.attends, Ordered):
                ringattn.plan_wave(sharding, mechanism=case.attends, mask=case.mask)
            else:
                ringattn.plan(
                    case.mask,
                    sharding,
                    taken.schedule,
                    heads=(case.heads, case.kv_heads),
                    head_dims=(case.dim, case.value_dim),
                    dtype=case.dtype,
                    mechanism=case.attends,
                )
            cases.append(taken)
        except UnsupportedError:  # on every rank alike
            if schedule is not None:
                raise
    if not cases:
        raise UnsupportedError(f"No layout and schedule serve {case.attends} under {case.mask}. Give another --mask.")
    return cases


def _findings(mesh: Mesh, cases: list[Case]) -> list[Verdict]:
    answer = oracle(cases[0])
    bounds = limits(cases[0], answer)
    with options.bar("verifying", len(cases), shown=mesh.rank == 0) as advance:
        findings = []
        for case in cases:
            findings.append(_finding(mesh, case, answer, bounds))
            advance()
    return findings


def _finding(mesh: Mesh, case: Case, answer: reference.Evaluation, bounds: dict[str, float]) -> Verdict:
    def run(inputs: Sequence[torch.Tensor]) -> Results:
        return _everywhere(mesh, case, inputs)

    whole = run(case.inputs())
    probed = leaks(case, run, whole, _token(case))
    return Verdict(str(case.layout), str(case.schedule), errors(whole, answer), bounds, probed)


def _everywhere(mesh: Mesh, case: Case, inputs: Sequence[torch.Tensor]) -> Results:
    """The whole out, dq, dk, dv on every rank."""
    device = mesh.connected().device
    part = attend(mesh, case, inputs, device)
    sharding = ringattn.Sharding(case.length, mesh, layout=case.layout, mask=case.mask)
    return {name: sharding.join(part.results[name].to(device), 2).cpu() for name in NAMES}


def _token(case: Case) -> int:
    """A token in the middle of the first document."""
    starts = np.flatnonzero(case.mask.local_positions(np.arange(case.length)).numpy() == 0)
    return int(starts[1] if len(starts) > 1 else case.length) // 2


def _report(mesh: Mesh, case: Case, findings: list[Verdict], as_json: bool) -> None:
    if as_json:
        verdicts = [
            {
                **dataclasses.asdict(finding),
                "leaks": finding.leaks.tokens,
                "moved": finding.leaks.moved,
                "accurate": finding.accurate,
                "tight": finding.leaks.none,
            }
            for finding in findings
        ]
        good = all(finding.passed for finding in findings)
        said = {"ranks": mesh.size, "transport": mesh.connected().name, "mask": str(case.mask)}
        options.print_json({**said, "findings": verdicts, "passed": good})
        return
    console = options.console()
    console.print(
        f"{case.mask}: {case.length} tokens on {options.where(mesh)}, {case.heads} query and {case.kv_heads} "
        f"key heads of {case.dim}, {dtype_name(case.dtype)}",
        highlight=False,
    )
    table = Table("layout", "schedule")
    for name in NAMES:
        table.add_column(f"{name} error\n(at most)", justify="right")
    table.add_column("leaks")
    table.add_column("")
    for finding in findings:
        table.add_row(
            finding.layout,
            finding.schedule,
            *(f"{error:.1e}\n({finding.limits[name]:.1e})" for name, error in finding.errors.items()),
            str(finding.leaks),
            "[green]passed" if finding.passed else "[bold red]FAILED",
        )
    console.print(table)
