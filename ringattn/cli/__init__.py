"""The command line, `ringattn`: one file a command, the options they share in `options`."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ringattn.cli import plan, simulate, train, verify
from ringattn.errors import InputError, MissingDependencyError


class _Commands(TyperGroup):
    """Ends with one readable line and exit code 2 where an argument is wrong or an extra is not installed."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, MissingDependencyError) as error:
            typer.echo(f"ringattn {ctx.invoked_subcommand}: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="ringattn",
    cls=_Commands,
    help="Exact attention over sequences too long for one device: plan it, simulate it, verify it, train with it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(simulate.simulate)
app.command()(plan.plan)
app.command()(verify.verify)
app.command(context_settings=train.PASS_ON)(train.train)


def main() -> None:
    """The console script."""
    app()
