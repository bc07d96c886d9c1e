"""`ringattn verify`: parity and the leak probe on the ranks it is launched on."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.table import Table

import ringattn
from ringattn import masks, reference
from ringattn.cli import options
from ringattn.cli.parity import NAMES, Problem, attend, errors, limits
from ringattn.errors import InputError
from ringattn.mesh import Mesh
from ringattn.readable import dtype_name

DENSE_LIMIT = 20_000  # tokens: the leak probe looks at the mask as a matrix


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one combination did. Every rank comes to the same one, so that all end with the same exit code."""

    layout: str
    schedule: str
    errors: dict[str, float]
    limits: dict[str, float]
    leaks: dict[str, list[int]]  # by result: tokens that moved and should not have
    moved: bool  # whether the changed token changed anything at all

    @property
    def accurate(self) -> bool:
        return all(error <= self.limits[name] for name, error in self.errors.items())

    @property
    def tight(self) -> bool:
        return self.moved and not any(self.leaks.values())


def verify(
    length: options.Length = 2053,
    heads: options.Heads = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.", min=1)] = 2,
    dim: options.Dim = 32,
    mask: options.MaskText = "documents:700,1,1352&causal",
    layout: Annotated[str | None, typer.Option(help="One layout; all of them unless given.")] = None,
    schedule: options.ScheduleName = None,
    dtype: options.DtypeName = "float32",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Check attention on the ranks this is launched on: output and gradients against a float64 oracle, and leaks.

    The leak probe changes one token of the first document and computes again: no output and no gradient that the mask
    does not tie to that token may change by a single bit. The exit code is 1 on every rank where anything fails.

    [bold]Examples[/bold]

      ringattn verify

      torchrun --nproc-per-node 4 --no-python ringattn verify

      torchrun --nproc-per-node 2 --no-python ringattn verify --mask "window:127&causal" --dtype bfloat16
    """
    if not 0 < length <= DENSE_LIMIT:
        raise InputError(f"verify looks at the mask as a matrix: --length must be 1 to {DENSE_LIMIT}; got {length}.")
    kind = options.dtype_named(dtype)
    problem = Problem(masks.parse(mask), length, 1, heads, kv_heads, dim, dim, kind, backward=True, seed=seed)
    problem.mask.regions(length, length)  # a mask that does not fit is refused before any rank waits for another
    mesh = ringattn.init()
    try:
        findings = _findings(mesh, problem, (layout,) if layout else options.LAYOUTS, options.schedules_named(schedule))
        if mesh.rank == 0:
            _report(mesh, problem, findings, as_json)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not all(finding.accurate and finding.tight for finding in findings):
        raise typer.Exit(1)


def _findings(mesh: Mesh, problem: Problem, layouts: tuple[str, ...], schedules: tuple[str, ...]) -> list[Finding]:
    combinations = [(layout, schedule) for layout in layouts for schedule in schedules]
    expected = problem.expected()
    bounds = limits(problem, mesh.sequence_size, expected)
    with options.bar("verifying", len(combinations), shown=mesh.rank == 0) as advance:
        findings = []
        for layout, schedule in combinations:
            findings.append(_finding(mesh, problem, layout, schedule, expected, bounds))
            advance()
    return findings


def _finding(
    mesh: Mesh,
    problem: Problem,
    layout: str,
    schedule: str,
    expected: reference.Evaluation,
    bounds: dict[str, float],
) -> Finding:
    inputs = problem.inputs()
    whole = _everywhere(mesh, problem, layout, schedule, inputs)
    token, may_move = _probe(problem)
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[:, :, token] += 1.0
    again = _everywhere(mesh, problem, layout, schedule, changed)
    leaks, moved = {}, False
    for name, before, after in zip(NAMES, whole, again, strict=True):
        different = (before != after).any(dim=3).flatten(0, 1).any(dim=0).numpy()
        moved = moved or bool(different.any())
        leaks[name] = np.flatnonzero(different & ~may_move[name]).tolist()
    return Finding(layout, schedule, errors(whole, expected), bounds, leaks, moved)


def _everywhere(
    mesh: Mesh, problem: Problem, layout: str, schedule: str, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The whole out, dq, dk, dv on every rank."""
    device = _device()
    part = attend(mesh, problem, layout, schedule, inputs, device)
    sharding = ringattn.Sharding(problem.length, mesh, layout=layout, mask=problem.mask)
    return [sharding.join(x.to(device), 2).cpu() for x in part.tensors]


def _device() -> str:
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "cpu"


def _probe(problem: Problem) -> tuple[int, dict[str, Any]]:
    """A token in the middle of the first document, and which tokens' results may depend on it.

    Rows that see the token may change, and so may the keys they see; its own row may, whatever the mask.
    """
    allowed = problem.rows(0, problem.length)
    starts = np.flatnonzero(problem.mask.local_positions(np.arange(problem.length)).numpy() == 0)
    token = int(starts[1] if len(starts) > 1 else problem.length) // 2
    rows = allowed[:, token].copy()
    rows[token] = True
    keys = np.logical_or.reduce(allowed[rows], axis=0)
    keys[token] = True
    return token, {"out": rows, "dq": rows, "dk": keys, "dv": keys}


def _report(mesh: Mesh, problem: Problem, findings: list[Finding], as_json: bool) -> None:
    if as_json:
        verdicts = [
            {**dataclasses.asdict(finding), "accurate": finding.accurate, "tight": finding.tight}
            for finding in findings
        ]
        good = all(finding.accurate and finding.tight for finding in findings)
        options.print_json({"ranks": mesh.size, "mask": str(problem.mask), "findings": verdicts, "passed": good})
        return
    console = options.console()
    console.print(
        f"{problem.mask}: {problem.length} tokens on {mesh.size} ranks, {problem.heads} query and {problem.kv_heads} "
        f"key heads of {problem.dim}, {dtype_name(problem.dtype)}",
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
            _leaks(finding),
            "[green]passed" if finding.accurate and finding.tight else "[bold red]FAILED",
        )
    console.print(table)


def _leaks(finding: Finding) -> str:
    if not finding.moved:
        return "the changed token changed nothing"
    leaking = [f"{name} at {len(at)} tokens, first {at[0]}" for name, at in finding.leaks.items() if at]
    return "; ".join(leaking) or "none"
