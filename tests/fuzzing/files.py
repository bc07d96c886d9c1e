"""Files that are not what they were: cut off, empty, changed, of something else, in the place of a folder, unwritable.

A reader gives what was written, or an error of ours; of a file that is kept for speed alone, nothing. A writer finds a
full disk, a file in the place of a folder, or a name that no disk takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import torch
from torch import nn
from typer.testing import CliRunner

import ringattn
from ringattn.cli import app
from ringattn.errors import InputError
from ringattn.kernels.machine import Machine
from ringattn.kernels.rates import Rates, Workload
from ringattn.kernels.store import Entry, Store
from ringattn.profile import Profile
from ringattn.trainer.config import run_command
from ringattn.trainer.data import read_corpus
from ringattn.trainer.model import Decoder, Shape
from ringattn.trainer.run_folder import RunFolder
from ringattn.training import checkpoint
from tests.fuzzing.judging import Report, judged

MESH = ringattn.Mesh.local()
TEXTS = (
    *(
        b"",
        b"\n",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"{",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"format": "x"}',
        b"\xff\xfe",
    ),
    *(
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        pickle.dumps({"step": 1}),
        bytes(range(256)) * 40,
        b"\0" * 100,
        b"step,loss\n1,2\n",
    ),
)
LINKS = "nowhere", "itself", "/dev/zero", "/dev/null", "/proc/self/mem", "/", "."


def _cut(file: Path, random: Random) -> None:
    os.truncate(file, random.randrange(max(file.stat().st_size, 1)))


def _changed(file: Path, random: Random) -> None:
    raw = bytearray(file.read_bytes()) or bytearray(b"x")
    for _ in range(random.choice((1, 1, 8))):
        raw[random.randrange(len(raw))] = random.randrange(256)
    file.write_bytes(raw)


def _longer(file: Path, random: Random) -> None:
    with file.open("ab") as end:
        end.write(random.choice(TEXTS) or b" ")


def _foreign(file: Path, random: Random) -> None:
    file.write_bytes(random.choice(TEXTS))


def _gone(file: Path, _: Random) -> None:
    file.unlink()


def _a_folder(file: Path, _: Random) -> None:
    file.unlink()
    file.mkdir()


def _a_link(file: Path, random: Random) -> None:
    file.unlink()
    target = random.choice(LINKS)
    file.symlink_to(file.name if target == "itself" else target)


def _a_pipe(file: Path, _: Random) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Callable[[Path, Random], None]] = {
    "cut off": _cut,
    "changed": _changed,
    "longer": _longer,
    "foreign": _foreign,
    "gone": _gone,
    "a folder": _a_folder,
    "a link": _a_link,
    "a pipe": _a_pipe,
}


class NotEqualError(Exception):
    """What was read is not what was written."""


def _need(equal: bool) -> None:
    if not equal:
        raise NotEqualError("took what was never written")


# -- what is written, and how it is read -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reader:
    """What the package reads: a folder made anew, one of whose files is then damaged."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]


def _model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def _save(folder: Path, step: int = 3) -> None:
    checkpoint.save(folder, model=_model(), step=step, data={"epoch": 1}, mesh=MESH)


def _load(folder: Path) -> None:
    model, expected = nn.Linear(3, 2), _model()
    found = checkpoint.load(folder, model=model, mesh=MESH)
    _need(found.data == {"epoch": 1} and torch.equal(model.weight, expected.weight))


def _save_beside(folder: Path) -> None:
    checkpoint.save(folder, model=_model(), step=4, data={"epoch": 1}, mesh=MESH, keep=1)
    _load(folder)


def _run(folder: Path) -> RunFolder:
    """A run of two steps."""
    made = RunFolder(folder, {"length": 8, "layers": 1, "width": 8, "heads": 2, "kv_heads": 1})
    for step in (1, 2):
        made.record(step=step, loss=1.0)
    made.save(Decoder(Shape(1, 8, 2, 1), 0).state_dict())
    return made


def _sampled(trainer: ModuleType, folder: Path) -> None:
    _command(trainer, ["--sample", "d", "--sample-bytes", "1", "--folder", str(folder)])


def _command(trainer: ModuleType, words: Sequence[str]) -> None:
    """The trainer's own command; its one line on the standard error as an error of ours."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run_command(trainer.main, words)
    if code:
        _need(code == 2 and len(said.getvalue().splitlines()) == 1)
        raise InputError(said.getvalue())


ENTRY = Entry(
    Machine("a processor", 1, "2.13", ("sdpa 1", "onednn 1")),
    Rates(Workload("Softmax", "float32", 8, 8, 2, 1, 64, True), (("sdpa", 0.5), ("onednn", 0.25))),
)
PROFILE = Profile("gloo", np.array([[0.0, 1e-5], [2e-5, 0.0]]), np.array([[0.0, 1e9], [2e9, 0.0]]), (ENTRY,))


def _profiled(folder: Path) -> None:
    found = Profile.read(folder / "profile.json")
    _need(found.entries == PROFILE.entries and np.array_equal(found.latency, PROFILE.latency))
    ringattn.init(transport="local", profile=folder / "profile.json")


def _rated(folder: Path) -> None:
    """A damaged file of rates costs a measurement, and is written again."""
    store = Store(folder / "kernels.json", wait=0.1)
    store.entries()
    store.found_or_measured(ENTRY.machine, ENTRY.rates.workload, lambda: ENTRY.rates)


def _texts(folder: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text(f"some text of {name}\n" * 9)


def _corpus(folder: Path) -> None:
    train, held = read_corpus(folder)
    _need(all(isinstance(x, bytes) and x for x in (*train, *held)) and bool(train) and bool(held))


def readers(trainer: ModuleType) -> list[Reader]:
    """Everything that the package reads from the disk."""
    return [
        Reader("checkpoint.load", _save, _load),
        Reader("checkpoint.save beside", _save, _save_beside),
        Reader("checkpoint.last", _save, lambda folder: checkpoint.last(folder, MESH)),
        Reader("train --sample", _run, partial(_sampled, trainer)),
        Reader("a run gone on with", _run, lambda folder: RunFolder(folder, {}, start=1).save({})),
        Reader("init(profile=)", lambda folder: PROFILE.write(folder / "profile.json"), _profiled),
        Reader("rates", lambda folder: Store(folder / "kernels.json").keep(ENTRY), _rated),
        Reader("--data FOLDER", _texts, _corpus),
        Reader("--data FILE", _texts, lambda folder: read_corpus(folder / "a.txt")),
    ]


def fuzzed(count: int, trainer: ModuleType, seed: int = 0) -> Report:
    """So many readings of a file that is damaged."""
    random, report, every = Random(seed), Report(), readers(trainer)
    with tempfile.TemporaryDirectory() as temporary:
        for nth in range(count):
            reader, folder = every[nth % len(every)], Path(temporary) / str(nth)
            folder.mkdir()
            reader.write(folder)
            file = random.choice(sorted(x for x in folder.rglob("*") if x.is_file() and not x.name.endswith(".lock")))
            damage = random.choice(list(DAMAGES))
            DAMAGES[damage](file, random)
            said = judged(partial(reader.read, folder))
            report.add(reader.name, said, f"{file.relative_to(folder)} is {damage}")
            shutil.rmtree(folder)
    return report


# -- what cannot be written -------------------------------------------------------------------------------------------

SMALL = ("--ranks", "1", "--steps", "1", "--length", "16", "--layers", "1", "--width", "8", "--heads", "2")
UNWRITABLE = "/proc/x", "/dev/null/x", "/dev/full/x", "FILE/x", "x" * 300, "FILE"
"""FILE is a file, where a folder is needed."""


def unwritable(trainer: ModuleType) -> Report:
    """Everything that the package writes, where it cannot be."""
    report = Report()
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "file"
        file.write_text("text")
        for place in UNWRITABLE:
            path = Path(temporary) / place.replace("FILE", str(file))
            picture = path.with_name(f"{path.name}.png") if place != "FILE" else Path("/dev/full")
            words = [*SMALL, "--folder", str(path)]
            writers: dict[str, Callable[[], object]] = {
                "checkpoint.save": partial(_save, path),
                "RunFolder": partial(_run, path),
                "Profile.write": partial(PROFILE.write, path / "x" if place == "FILE" else path),
                "train --folder": partial(_command, trainer, words),
                "plan --draw": partial(_drawn, picture),
            }
            for name, write in writers.items():
                report.add(name, judged(write, place[:20]), place[:20])
            for option, value in (("plot", picture), ("profile", path / "x")) if place != "/proc/x" else ():
                report.add(f"doctor --{option}", judged(partial(_examined, option, value), place[:20]), place[:20])
            report.add("rates", judged(partial(Store(path / "x").keep, ENTRY)), place[:20])
    return report


def _drawn(picture: Path) -> None:
    _invoked("plan", "--length", "64", "--draw", str(picture))


def _examined(option: str, path: Path) -> None:
    _invoked("doctor", f"--{option}", str(path))


def _invoked(*words: str) -> None:
    """A command; what it says on the standard error as an error of ours."""
    done = CliRunner().invoke(app, words, catch_exceptions=True)
    if done.exit_code:
        _need(done.exit_code == 2 and isinstance(done.exception, SystemExit) and bool(done.stderr.strip()))
        raise InputError(done.stderr)
