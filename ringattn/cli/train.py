"""`ringattn train`: the trainer of `launch/train.py`, started by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import typer

import ringattn
from ringattn.errors import InputError

# The trainer parses its own options, so that they are written down once: everything is passed on to it.
PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def trainer() -> Path:
    """The trainer: in a wheel inside the package, in a checkout beside it."""
    package = Path(ringattn.__file__).parent
    places = [folder / "launch" / "train.py" for folder in (package, package.parent)]
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"The trainer is missing; looked for {' and '.join(map(str, places))}. Install ringattn again.")


def train(context: typer.Context) -> None:
    """Train a byte-level language model with sharded attention; all options: ringattn train --help."""
    from ringattn.trainer.config import run_command  # no other command needs the trainer's modules

    spec = importlib.util.spec_from_file_location("ringattn_trainer", trainer())
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    raise typer.Exit(run_command(module.main, context.args, "ringattn train"))
