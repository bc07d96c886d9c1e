"""`ringattn verify --model`: a user's transformers model over the ranks it is launched on, against itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch.distributed as dist
import typer
from rich.table import Table

import ringattn
from ringattn.cli import options
from ringattn.errors import InputError, MissingDependencyError
from ringattn.mesh import Mesh

if TYPE_CHECKING:
    from ringattn.integrations.model_parity import Parity

PASSES = 3
SHOWN = 8  # layers and gradients of a table, the worst first


def verify_model(
    source: str, length: int, *, ulysses: int, schedule: str, shrink: bool, seed: int, as_json: bool
) -> None:
    """Prints the verdict on rank 0; ends with exit code 1 on every rank where the model differs from itself."""
    if length < 3:
        raise InputError(f"verify --model packs three documents: --length must be 3 or more; got {length}.")
    try:
        from ringattn.integrations.model_parity import compare, load_model
    except ImportError as error:
        raise MissingDependencyError(
            f"--model needs transformers: pip install 'ringattn[transformers]' ({error})"
        ) from error
    model = load_model(source, shrink=shrink, seed=seed)  # refused before any rank waits for another
    documents = [length // 3, 1, length - length // 3 - 1]
    mesh = ringattn.init(ulysses=ulysses)
    try:
        with options.bar("verifying", PASSES, shown=mesh.rank == 0) as advance:
            parity = compare(model, mesh, documents, seed=seed, schedule=schedule, advance=advance)
        if mesh.rank == 0:
            size = sum(parameter.numel() for parameter in model.parameters())
            _report(mesh, f"{type(model).__name__} of {size:,} parameters", documents, parity, as_json)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not parity.passed:
        raise typer.Exit(1)


def _report(mesh: Mesh, what: str, documents: list[int], parity: Parity, as_json: bool) -> None:
    from ringattn.integrations.model_parity import LIMIT

    name, worst = parity.worst
    if as_json:
        found = {**dataclasses.asdict(parity), "first_layer_that_differs": parity.first, "passed": parity.passed}
        options.print_json(
            {
                "model": what,
                "ranks": mesh.size,
                "transport": mesh.connected().name,
                "documents": documents,
                "limit": LIMIT,
                **found,
            }
        )
        return
    console = options.console()
    console.print(f"{what}, documents of {documents} tokens on {options.where(mesh)}", highlight=False)
    table = Table("", "relative difference", f"at most {LIMIT:g}")
    rows = {"loss": parity.loss, "logits": parity.logits, f"gradient of {name}, the worst": worst}
    layers = sorted(parity.layers.items(), key=lambda item: -item[1])[:SHOWN]
    for label, error in (*rows.items(), *layers):
        table.add_row(label, f"{error:.1e}", "[green]equal" if error <= LIMIT else "[bold red]DIFFERS")
    console.print(table)
    if parity.first is not None:
        console.print(f"[bold red]The first attention layer that differs is {parity.first}.")
    if parity.leaks:
        console.print(
            f"[bold red]{len(parity.leaks)} tokens of other documents saw a changed token: {parity.leaks[:SHOWN]}"
        )
    if not parity.moved:
        console.print("[bold red]A changed token changed nothing.")
    console.print("[green]passed" if parity.passed else "[bold red]FAILED")
