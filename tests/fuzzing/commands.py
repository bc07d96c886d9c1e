"""The commands, with words that make no sense."""

from __future__ import annotations

from random import Random

from typer.testing import CliRunner

from ringattn.cli import app
from tests.fuzzing.judging import PATIENCE, Report, TooLongError, within

TEXTS = (
    *("", "x", "0", "1", "-1", "3", "12", "64", "1.5", "1e3", "nan", "99999999999999999999", "1099511627776", "١٢"),
    *(
        "full",
        "causal",
        "~full",
        "documents:3,4",
        "documents:30,34&causal",
        "(" * 3000,
        "~" * 3000,
        "window:-1",
        "&",
        "|",
    ),
    *(
        "window:3,,",
        "blocks:0/1",
        "blocks:2/1x",
        "os:abort",
        "no.such:Thing",
        ":",
        "\x00",
        "prefix:1e9",
        "documents:" + "1," * 99,
    ),
    *(
        "auto",
        "all",
        "zigzag",
        "ring",
        "route",
        "scan",
        "softmax",
        "linear",
        "hard",
        "float32",
        "bfloat16",
        "none",
        "x.jpg",
    ),
    *("/missing/x.png", "/dev/null/x.png", "--", "--help", "--json", "--ring"),
)
SMALL = {
    "simulate": ("--length", "12", "--dim", "4"),
    "plan": ("--length", "64"),
    "verify": ("--length", "12", "--dim", "4"),
    "train": ("--steps", "0"),  # which is nothing to do, whatever else it says
}
SHAPE = ("length", "heads", "kv-heads")
MEMBERS = ("layout", "schedule", "dtype")
MORE = ("dim", "mask", "mechanism")
OPTIONS = {
    "simulate": (*SHAPE, *MEMBERS, *MORE, "kernel", "ring", "value-dim", "batch", "seed"),
    "plan": (*SHAPE, *MEMBERS, *MORE, "ring", "value-dim", "verify", "rank", "draw"),
    "verify": (*SHAPE, *MEMBERS, *MORE, "kernel", "seed"),
    "train": (
        *(*SHAPE, *MEMBERS, "kernel", "data", "batch", "positions", "ranks", "replicas", "layers", "lr", "folder"),
        *("wrap", "zero", "width", "optimizer", "warmup", "clip", "seed", "eval-every", "eval-packs", "save-every"),
        *("resume", "sample", "sample-bytes", "temperature", "top-k", "timeout"),
    ),
}


def fuzzed(count: int, seed: int = 0) -> Report:
    """So many command lines, each with an option or two that may be anything."""
    random, runner, report = Random(seed), CliRunner(), Report()
    for nth in range(count):
        command = list(OPTIONS)[nth % len(OPTIONS)]
        words = [command, *SMALL[command]]
        for option in random.sample(OPTIONS[command], random.randint(1, 2)):
            words += [f"--{option}", random.choice(TEXTS)]
        report.add(command, _said(runner, words), f"{[word[:60] for word in words]}")
    return report


def _said(runner: CliRunner, words: list[str]) -> Exception | str | None:
    try:
        with within(PATIENCE):
            shown = runner.invoke(app, words, catch_exceptions=True)
    except TooLongError:
        return "does not come back"
    readable = shown.exception is None or isinstance(shown.exception, SystemExit)
    if not readable or shown.exit_code not in (0, 2) or (shown.exit_code and not shown.stderr.strip()):
        return f"{shown.exit_code} {shown.exception!r} {shown.output[-300:]}"
    return UsageError(shown.stderr) if shown.exit_code else None


class UsageError(Exception):
    """One line on the standard error, and exit code 2."""
