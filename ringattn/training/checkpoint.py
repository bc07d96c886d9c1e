"""Checkpoints: saved by any number of ranks and wrapper, loaded by any other.

    state = checkpoint.load("run/checkpoints", model=model, optimizer=optimizer, mesh=mesh)
    for step in range(state.step + 1, steps + 1):
        ...
        checkpoint.save("run/checkpoints", model=model, optimizer=optimizer, step=step, data=loader.state_dict(),
                        mesh=mesh, keep=2)

What is on the disk does not depend on who wrote it: each parameter's weight and optimizer states, whole, by its name in
the user's model. torch.distributed.checkpoint plans who writes what; replicated tensors are written once, by turns.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.optim import Optimizer

from ringattn.checking import flag, integer, shown
from ringattn.errors import AgreementError, CheckpointError, InputError
from ringattn.mesh import Mesh
from ringattn.readable import differing, shortened
from ringattn.training import random_states
from ringattn.training.contents import Contents, of_deepspeed
from ringattn.training.ranks import Ranks
from ringattn.training.storage import MANIFEST, Manifest, Reader, Writer, complete
from ringattn.training.zero import Zero, of_zero


@dataclasses.dataclass(frozen=True)
class State:
    """What `load` has found.

    Attributes:
        step: of the checkpoint.
        data: what was passed to `save`.
        path: its folder.
    """

    step: int
    data: Any
    path: Path


class Saving:
    """A checkpoint that may still be on its way to the disk.

    Attributes:
        path: where it will be.
    """

    def __init__(self, path: Path, written: concurrent.futures.Future[None]) -> None:
        self.path = path
        self._written = written

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._written.done()

    def wait(self) -> Path:
        """Waits until it is on the disk, whole; all ranks' parts are then.

        Raises:
            CheckpointError: it could not be written, on this rank or another. The checkpoints before it are there.
        """
        self._written.result()
        return self.path


def save(
    folder: str | Path,
    *,
    model: nn.Module,
    step: int,
    mesh: Mesh,
    optimizer: Optimizer | None = None,
    data: Any = None,
    keep: int | None = None,
    background: bool = False,
) -> Saving:
    """Writes a checkpoint into ``folder/step-NNNNNNNN``. Every rank of the mesh calls it with the same arguments.

    It takes that name when all of it is on the disk. A job that is killed before leaves the checkpoints that were
    there, whole, and `load` finds the last of them.

    Args:
        folder: of all checkpoints of a run; one that all ranks share.
        model: plain, or wrapped by DDP, FSDP2, torch.compile or DeepSpeed.
        step: its number, by which it is found. One that is there already is replaced.
        mesh: the ranks.
        optimizer: made of the wrapped model's parameters; a DeepSpeed engine brings its own. Loss scales of float16
            are not saved.
        data: whatever else is to be saved that JSON can hold: where the loader is, the state of a scheduler.
        keep: how many checkpoints to leave in the folder, this one included; None for all.
        background: return as soon as everything has been copied to memory, and write while training goes on. Wait
            for the result before the next save.

    Returns:
        With ``wait()``, which raises what has gone wrong; without ``background`` it has been waited for.

    Raises:
        InputError: an argument is wrong.
        AgreementError: the ranks passed different arguments.
        CheckpointError: it could not be written; on every rank.

    Example:
        >>> import tempfile, torch, ringattn
        >>> from ringattn.training import checkpoint
        >>> model, mesh, folder = torch.nn.Linear(2, 3), ringattn.init(), tempfile.mkdtemp()
        >>> checkpoint.save(folder, model=model, step=20, data={"epoch": 1}, mesh=mesh).path.name
        'step-00000020'
        >>> checkpoint.load(folder, model=model, mesh=mesh).data
        {'epoch': 1}
    """
    ranks = Ranks(mesh)
    where = ranks.together(lambda: _folder(folder))
    contents = ranks.together(lambda: _contents(model, optimizer, mesh))
    words = ranks.together(lambda: _checked(contents, where, step, data, keep, background))
    said = ranks.gathered((mesh.coordinates["data"], random_states.digest(), words))
    if different := differing([each for *_, each in said], words):
        raise AgreementError(f"The ranks save different checkpoints: they differ in {different}.")
    tensors = {**contents.tensors(), **random_states.tensors(mesh.rank)}
    content = {
        "step": int(step),
        "data": data,
        "optimizer": contents.outline(),
        "random": random_states.outline(mesh, [each[:2] for each in said]),
    }
    writer = Writer(where, int(step), content, keep)
    if not background:
        _write(tensors, writer, ranks)
        return Saving(writer.path, _finished())
    staged = BlockingAsyncStager().stage(tensors)
    return Saving(writer.path, _started(functools.partial(_write, staged, writer, ranks.apart())))


def load(
    folder: str | Path,
    *,
    model: nn.Module,
    mesh: Mesh,
    optimizer: Optimizer | None = None,
    step: int | None = None,
) -> State:
    """Loads the last checkpoint of a folder, or the one of a step. Every rank of the mesh calls it.

    It may have been saved by another number of ranks, another layout and another wrapper. Random states are given
    back where a rank's place is the same: that of its sequence where the ranks of a sequence drew the same numbers, its
    own where they did not. Elsewhere they are derived from the checkpoint, the same in every attempt.

    Numbers are converted to the model's dtype. When this raises while reading, the model may hold some of them.

    Args:
        folder: that was passed to `save`, or one ``step-NNNNNNNN`` in it.
        model: wrapped already.
        optimizer: made of the wrapped model's parameters; None to load weights alone. A DeepSpeed engine brings its
            own.
        step: None for the last one.

    Raises:
        CheckpointError: there is none, or it is damaged or of another model; on every rank.
        InputError: an argument is wrong.
    """
    ranks = Ranks(mesh)
    path = ranks.gathered(ranks.together(lambda: _found(_folder(folder), step)))[0]
    manifest = ranks.together(lambda: Manifest.read(path))
    contents = ranks.together(lambda: _contents(model, optimizer, mesh))
    tensors = ranks.together(lambda: contents.targets(manifest))
    states = random_states.targets(manifest, mesh)
    ranks.together(lambda: _read({**tensors, **states}, manifest))
    contents.adopt(tensors, manifest)
    random_states.adopt(states, manifest, mesh)
    return State(manifest.content["step"], manifest.content["data"], path)


def last(folder: str | Path, mesh: Mesh) -> Path | None:
    """The last checkpoint of a folder, as the first rank finds it; None where there is none. All ranks ask together."""
    ranks = Ranks(mesh)
    there = ranks.together(lambda: complete(_folder(folder)))
    return ranks.gathered(there[max(there)] if there else None)[0]


def _contents(model: nn.Module, optimizer: Optimizer | None, mesh: Mesh) -> Contents | Zero:
    if not of_deepspeed(model):
        return Contents(model, optimizer)
    engine: Any = model
    if optimizer is not None and optimizer is not engine.optimizer:
        raise InputError("A DeepSpeed engine brings its own optimizer: pass engine.optimizer, or none.")
    if of_zero(engine):
        return Zero(engine, mesh)
    return Contents(engine.module, engine.optimizer)


def _checked(
    contents: Contents | Zero, folder: Path, step: Any, data: Any, keep: Any, background: Any
) -> dict[str, str]:
    """What the ranks compare before anything is written."""
    integer(step, "step", needed="the number of a step")
    if keep is not None:
        integer(keep, "keep, how many checkpoints are left,", least=1)
    flag(background, "background")
    try:
        text = json.dumps(data, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"data must be what JSON can hold; got {shown(data)}: {error}.") from error
    dtypes = {name: str(parameter.dtype) for name, parameter in contents.parameters.items()}
    names = json.dumps([contents.shapes(), dtypes, contents.outline()], sort_keys=True)
    return {
        "folder": str(folder),
        "step": str(step),
        "data": f"{shortened(text)} #{_hash(text)}",
        "keep": str(keep),
        "background": str(background),
        "parameters and options of the optimizer": f"#{_hash(names)}",
    }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _folder(path: object) -> Path:
    if isinstance(path, (str, os.PathLike)) and "\0" not in os.fspath(path):
        return Path(path)
    raise InputError(f"folder must be the path of a folder; got {shown(path)}.")


def _found(folder: Path, step: int | None) -> Path:
    """The folder of one checkpoint."""
    if step is not None:
        integer(step, "step", needed="the number of a step")
    if step is None and (folder / MANIFEST).is_file():
        return folder
    there = complete(folder)
    if not there:
        raise CheckpointError(f"{folder} holds no checkpoint: there is no step-NNNNNNNN in it that is whole.")
    if step is not None and step not in there:
        raise CheckpointError(f"{folder} has no step {shown(step)}; it has {', '.join(map(str, sorted(there)))}.")
    return there[max(there) if step is None else step]


def _write(tensors: Mapping[str, Tensor], writer: Writer, ranks: Ranks) -> None:
    """Every rank works out who writes what: torch's planner sees to it that each part is written once."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    first = ranks.rank == 0

    def plan() -> SavePlan:
        writer.set_up_storage_writer(first)
        planner.set_up_planner(dict(tensors), is_coordinator=first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans, metadata = planner.create_global_plan(ranks.gathered(ranks.together(plan)))
    own = planner.finish_plan(writer.prepare_global_plan(plans)[ranks.rank])
    written = ranks.gathered(ranks.together(lambda: writer.write_data(own, planner).wait()))
    ranks.together(lambda: writer.finish(metadata, written) if first else None)


def _read(tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Every rank reads what it needs by itself."""
    planner, reader = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False), Reader(manifest)
    planner.set_up_planner(dict(tensors), reader.read_metadata(), is_coordinator=False)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _started(job: Callable[[], None]) -> concurrent.futures.Future[None]:
    executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = executor.submit(job)
    executor.shutdown(wait=False)
    return future


def _finished() -> concurrent.futures.Future[None]:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_result(None)
    return future
