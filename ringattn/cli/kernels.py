"""`ringattn kernels`: how fast the kernels were measured to be on this machine, and measuring again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ringattn.cli import options
from ringattn.errors import InputError
from ringattn.kernels.choice import renewed
from ringattn.kernels.store import Entry, Store

Renew = Annotated[bool, typer.Option("--renew", help="Measure again what was measured on this machine.")]
Clear = Annotated[bool, typer.Option("--clear", help="Forget all rates: the next calls measure again.")]


def kernels(renew: Renew = False, clear: Clear = False, as_json: options.AsJson = False) -> None:
    """Show which kernel is fastest on this machine, as measured, for each class of problems; renew or forget it.

    A call with kernel="auto" takes the kernel that was measured to be the fastest where it runs. It measures a class of
    problems the first time it meets one, in a fraction of a second, and keeps the seconds in the user's cache
    directory, under the processor, the threads and the version of PyTorch. Renew them after a change of the machine
    that these do not show, or where it was busy when it measured.

    [bold]Examples[/bold]

      ringattn kernels

      ringattn kernels --renew

      ringattn kernels --clear

      ringattn kernels --json
    """
    if renew and clear:
        raise InputError("--renew measures again and --clear forgets; give one of them.")
    store = Store.of_user()
    if clear:
        _clear(store, as_json)
        return
    entries = store.entries()
    if renew:
        entries = [_renewed(store, entry) for entry in options.track("measuring", entries)]
    if as_json:
        options.print_json(_for_machines(store, entries))
    elif entries:
        _show(store, entries)
    else:
        typer.echo(f"No rates are kept in {_place(store)}.")
        typer.echo('The first large call of ringattn.attention with kernel="auto" measures.')
    if not set(entries) <= set(store.entries()):
        typer.echo(f"ringattn kernels: these rates could not be kept in {_place(store)}.", err=True)


def _clear(store: Store, as_json: bool) -> None:
    try:
        count = store.clear()
    except OSError as error:
        raise InputError(f"{_place(store)} cannot be removed: {error.strerror}.") from error
    if as_json:
        options.print_json({"file": str(store.path), "cleared": count})
    else:
        typer.echo(f"Forgot {count} measurement{'s' * (count != 1)} in {_place(store)}.")


def _renewed(store: Store, entry: Entry) -> Entry:
    """The entry measured again, and kept; another machine's, or of what is not of this package, as it is."""
    again = renewed(entry) if entry.machine.is_here else None
    if again is None:
        return entry
    store.keep(again)
    return again


def _show(store: Store, entries: Sequence[Entry]) -> None:
    """One table per machine, this one first."""
    console = options.console()
    ordered = sorted(entries, key=lambda entry: (not entry.machine.is_here, str(entry.machine)))
    for (machine, here), group in itertools.groupby(ordered, key=lambda x: (str(x.machine), x.machine.is_here)):
        console.print(f"{escape(machine)}{'' if here else ' (another machine)'}", highlight=False)
        console.print(_table(list(group)))
    console.print(escape(_place(store)), highlight=False)


def _table(entries: Sequence[Entry]) -> Table:
    names = list(dict.fromkeys(name for entry in entries for name in entry.rates.names))
    table = Table("class of problems", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(f"{name}\nms", justify="right")
    table.add_column("taken")
    for entry in sorted(entries, key=lambda entry: str(entry.rates.workload)):
        seconds, best = dict(entry.rates.seconds), entry.rates.best
        cells = (f"{seconds[name] * 1e3:.1f}" if name in seconds else "—" for name in names)
        table.add_row(str(entry.rates.workload), *cells, best)
    return table


def _for_machines(store: Store, entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "file": None if store.path is None else str(store.path),
        "rates": [
            {
                **{name: value for name, value in dataclasses.asdict(entry.machine).items() if name != "kernels"},
                "here": entry.machine.is_here,
                "workload": dataclasses.asdict(entry.rates.workload),
                "seconds": dict(entry.rates.seconds),
                "taken": entry.rates.best,
            }
            for entry in entries
        ],
    }


def _place(store: Store) -> str:
    return "a cache directory, of which this user has none" if store.path is None else str(store.path)
