"""The command line, `ringattn`: one file per command, the options they share in `options`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import ringattn
from ringattn.cli import doctor, kernels, mechanisms, plan, simulate, train, verify
from ringattn.errors import InputError, MissingDependencyError, RingAttentionError
from ringattn.transports.mpi import end_job


class _Commands(TyperGroup):
    """Ends with one readable line where something is wrong, and exit code 2 where it is an argument or an extra."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, MissingDependencyError) as error:
            code, words = 2, str(error)
        except RingAttentionError as error:
            code, words = 1, str(error)
        except KeyboardInterrupt:
            code, words = 130, "stopped"
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate" not in str(error):  # torch has no error of its own
                raise
            code, words = 1, f"out of memory ({str(error).splitlines()[0]}). Take fewer tokens or ranks."
        typer.echo(f"ringattn {ctx.invoked_subcommand}: {' '.join(words.split())}", err=True)
        end_job(code)
        raise typer.Exit(code)


app = typer.Typer(
    name="ringattn",
    cls=_Commands,
    help="Exact attention over sequences too long for one device: plan it, simulate it, verify it, train with it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ringattn {ringattn.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(simulate.simulate)
app.command()(plan.plan)
app.command()(verify.verify)
app.command()(kernels.kernels)
app.command()(mechanisms.mechanisms)
app.command()(doctor.doctor)
app.command(context_settings=train.PASS_ON)(train.train)


def main() -> None:
    """The console script."""
    app()
