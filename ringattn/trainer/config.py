"""What a run is asked to do: every option once, with its type, default, limits and help."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer

import ringattn
from ringattn import kernels, layouts, schedules
from ringattn.errors import CheckpointError, InputError, MissingDependencyError, RingAttentionError
from ringattn.naming import by_name
from ringattn.rendezvous import Launch
from ringattn.trainer.model import Shape
from ringattn.trainer.run_folder import CHECKPOINTS, WEIGHTS, holds_a_run
from ringattn.transports.mpi import end_job

DEFAULT_RANKS = 4
Positions = Literal["document", "global"]
Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "sgd"]
Wrap = Literal["none", "ddp", "fsdp2", "deepspeed"]
HELP = """Train a byte-level language model whose attention is sharded over ranks.

\b
Examples:
  ringattn train                               16,384 tokens, four ranks
  ringattn train --ranks 2 --length 4096 --steps 50 --folder runs/small
  ringattn train --sample "def " --folder runs/small
  ringattn train --data texts/ --width 256 --optimizer sgd --lr 0.3
  ringattn train --steps 0 --check 3           four ranks and one, compared
  ringattn train --wrap deepspeed --zero 3 --checkpoint-activations
  ringattn train --folder runs/long --save-every 100 --resume auto
  torchrun --nproc-per-node 8 launch/train.py --replicas 2 --batch 2 --wrap fsdp2
  torchrun --nproc-per-node 8 launch/train.py --ulysses 2   rings of 4, heads for sequence in pairs
"""
EXTRAS = ("matplotlib", "safetensors")  # what a run folder is written with


def _option(panel: str, text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **limits)


def _names(members: Iterable[str]) -> str:
    """The members of a folder, or one from outside the package, for help."""
    return f"{', '.join(members)} or module:Name"


_data, _ranks, _model, _training, _record, _sampling = (
    partial(_option, panel) for panel in ("Data", "Ranks", "Model", "Training", "Run", "Sampling")
)


@dataclass(frozen=True)
class Config:
    """The options of a run. --help shows them from here."""

    data: Annotated[Path | None, _data("Text file or folder; default: Python's standard library.")] = None
    length: Annotated[int, _data("Tokens (bytes) of the context.", min=2)] = 16_384
    batch: Annotated[int, _data("Sequences per step.", min=1)] = 1
    positions: Annotated[Positions, _data("RoPE turns by the place in document or sequence.")] = "document"
    seed: Annotated[int, _data("Seed of the weights, the packs and the samples.", min=0)] = 0

    ranks: Annotated[int | None, _ranks("Processes to start here; default 4, or as launched.", min=1)] = None
    replicas: Annotated[int, _ranks("Groups of ranks, each with sequences of its own.", min=1)] = 1
    ulysses: Annotated[int, _ranks("Neighbouring ranks of a sequence that exchange heads for tokens.", min=1)] = 1
    timeout: Annotated[float, _ranks("Seconds after which a wait for another rank is an error.", min=1)] = 600.0
    layout: Annotated[str, _ranks(f"Who holds which tokens: auto, {_names(layouts.NAMED)}.")] = "auto"
    schedule: Annotated[str, _ranks(f"What moves when: auto, {_names(by_name(schedules.MEMBERS))}.")] = "auto"
    kernel: Annotated[str, _ranks(f"How attention is computed: auto, {_names(by_name(kernels.MEMBERS))}.")] = "auto"
    profile: Annotated[Path | None, _ranks("What ringattn doctor --profile measured: auto goes by it.")] = None
    wrap: Annotated[Wrap, _ranks("What is around the model.")] = "none"
    zero: Annotated[int, _ranks("Stage of DeepSpeed's ZeRO.", min=0, max=3)] = 2
    dtype: Annotated[Dtype, _ranks("Arithmetic of the model; its weights stay float32.")] = "float32"

    layers: Annotated[int, _model("Decoder blocks.", min=1)] = 2
    width: Annotated[int, _model("Features per token.", min=1)] = 128
    heads: Annotated[int, _model("Query heads.", min=1)] = 4
    kv_heads: Annotated[int, _model("Key and value heads, shared by the query heads.", min=1)] = 2

    steps: Annotated[int, _training("Optimizer steps.", min=0)] = 80
    optimizer: Annotated[Optimizer, _training("Optimizer.")] = "adamw"
    lr: Annotated[float, _training("Peak learning rate; a cosine takes it to a tenth.", min=0)] = 0.006
    warmup: Annotated[int, _training("Steps of linear warm-up.", min=0)] = 10
    clip: Annotated[float, _training("Largest norm of the gradient.", min=0)] = 1.0
    compile: Annotated[bool, _training("Compile the decoder blocks.")] = False
    checkpoint_activations: Annotated[bool, _training("Recompute blocks in the backward pass, but no attention.")] = (
        False
    )

    folder: Annotated[Path | None, _record("Run folder; default: runs/ and the time.")] = None
    overwrite: Annotated[bool, _record("Replace a run that is in the folder already.")] = False
    eval_every: Annotated[int, _record("Steps from one held-out loss to the next.", min=1)] = 20
    eval_packs: Annotated[int, _record("Sequences of the held-out loss, as many for each replica.", min=1)] = 2
    save_every: Annotated[int, _record("Steps from one checkpoint to the next; 0 for none.", min=0)] = 0
    resume: Annotated[str | None, _record("Go on from a checkpoint: auto for --folder's last, or a path.")] = None
    check: Annotated[int, _record("Then N SGD steps on all ranks and on one; exit 1 if unlike.", min=0)] = 0

    check_finite: Annotated[bool, _record("Name the rank and call of the first NaN; reads every tensor again.")] = False

    sample: Annotated[str | None, _sampling("Train nothing: print what follows this text by --folder.")] = None
    sample_bytes: Annotated[int, _sampling("Bytes to print.", min=1)] = 400
    temperature: Annotated[float, _sampling("0 takes the likeliest byte each time.", min=0)] = 0.7
    top_k: Annotated[int, _sampling("Draw among so many of the likeliest bytes.", min=1)] = 40

    @property
    def shape(self) -> Shape:
        return Shape(self.layers, self.width, self.heads, self.kv_heads)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        assert self.folder is not None  # validated
        return self.folder / CHECKPOINTS

    @property
    def source(self) -> Path | None:
        """The folder of the checkpoints to go on from."""
        if self.resume in (None, "auto"):
            return None if self.resume is None else self.checkpoints
        inner = Path(self.resume) / CHECKPOINTS
        return inner if inner.exists() else inner.parent

    @property
    def world(self) -> int:
        """Ranks of the run: the launcher's, or those we are to start."""
        launch = Launch.found(os.environ)
        return launch.world if launch.started else self.ranks or DEFAULT_RANKS

    @property
    def ring(self) -> int:
        """Ranks on the ring axis: those that replicas and the ulysses axis leave."""
        return self.world // (self.replicas * self.ulysses)

    def validate(self) -> None:
        """Raises InputError at the first thing that cannot work, before any process or connection is made."""
        if self.sample is not None:
            _need(self.sample != "", "--sample needs at least one character to go on from.")
            trained = self.folder is not None and (self.folder / WEIGHTS).exists()
            _need(trained, f"--sample needs the --folder of a run with weights; got {self.folder}.")
            return
        self._validate_numbers()
        for name in EXTRAS:
            if importlib.util.find_spec(name) is None:
                raise MissingDependencyError(f"Training needs {name}: pip install 'ringattn[train]'")
        if self.folder is not None:
            try:
                self._validate_folder(self.folder)
            except OSError as error:  # a name that no disk takes
                raise InputError(f"--folder cannot be used: {error}.") from error
        self._rehearse()

    def _validate_folder(self, folder: Path) -> None:
        free = self.overwrite or self.resume == "auto" or not holds_a_run(folder)
        _need(
            free,
            f"{folder} holds a run. Choose another --folder, go on with it by --resume auto, or replace it with "
            f"--overwrite.",
        )
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        _need(there.is_dir() and os.access(there, os.W_OK), f"{there} is no folder that can be written to.")

    def _rehearse(self) -> None:
        """The library itself says whether it knows these names: this rank's plan, and attention over two tokens."""
        mask, length, head_dim = ringattn.Causal(), 2, self.shape.head_dim
        mesh = ringattn.Mesh.virtual(
            self.ring, self.ulysses, Launch.found(os.environ).rank % (self.ring * self.ulysses)
        )
        sharding, heads = ringattn.Sharding(self.length, mesh, self.layout, mask), (self.heads, self.kv_heads)
        ringattn.plan(mask, sharding, self.schedule, heads=heads, head_dims=(head_dim, head_dim), dtype=self.dtype)
        sharding = ringattn.Sharding(length, ringattn.init(transport="local"), layout=self.layout, mask=mask)
        q, k, v = (
            torch.zeros(1, heads, length, head_dim, dtype=getattr(torch, self.dtype))
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        ringattn.attention(q, k, v, mask, sharding=sharding, schedule=self.schedule, kernel=self.kernel)

    def _validate_numbers(self) -> None:
        world, heads, kv_heads = self.world, self.heads, self.kv_heads
        _need(self.steps > 0 or self.check > 0, "--steps 0 leaves nothing to do; add --check N to compare.")
        _need(self.lr > 0, f"--lr must be above 0; got {self.lr}.")
        _need(self.clip > 0, f"--clip must be above 0; got {self.clip}.")
        _need(heads % kv_heads == 0, f"--kv-heads {kv_heads} does not divide --heads {heads}.")
        _need(self.width % (2 * heads) == 0, f"--width {self.width} must be even times --heads {heads}.")
        _need(self.ranks in (None, world), f"The launcher started {world} ranks; got --ranks {self.ranks}.")
        _need(world % self.replicas == 0, f"--replicas {self.replicas} does not divide the {world} ranks.")
        sequence = world // self.replicas
        divided = sequence % self.ulysses == 0
        _need(divided, f"--ulysses {self.ulysses} does not divide the {sequence} ranks of a sequence.")
        _need(self.batch % self.replicas == 0, f"--replicas {self.replicas} does not divide --batch {self.batch}.")
        alone = self.wrap != "none" and world == 1
        _need(not alone, f"--wrap {self.wrap} is for several ranks; got one. Leave it out, or set --ranks.")
        if self.wrap == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
            raise MissingDependencyError("--wrap deepspeed needs DeepSpeed: pip install 'ringattn[deepspeed]'")
        found_again = self.folder is not None or not (self.save_every or self.resume == "auto")
        _need(found_again, "--save-every and --resume auto need a --folder, where checkpoints are found again.")
        _need(not (self.overwrite and self.resume), "--overwrite begins anew, --resume goes on: choose one of them.")
        there = self.source is None or self.resume == "auto" or self.source.exists()
        _need(there, f"There is no checkpoint at {self.resume}; --resume wants auto or the folder of one.")
        compared = self.check == 0 or self.dtype == "float32"
        _need(compared, f"--check compares float32; got --dtype {self.dtype}.")


def launched() -> bool:
    """Whether torchrun or its like started this process."""
    return Launch.found(os.environ).started


def _speaker() -> str:
    """Which rank says it, where there are several."""
    with contextlib.suppress(InputError):  # what is wrong with the environment is being said
        launch = Launch.found(os.environ)
        return f"rank {launch.rank}: " if launch.started else ""
    return ""


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def run_command(run: Callable[[Config, Sequence[str]], int], arguments: Sequence[str], name: str | None = None) -> int:
    """Parses the command line into a Config and runs it; what is wrong with it is one line, and exit code 2.

    1 where a run has begun, and ends because of another rank.
    """

    def command(**options: Any) -> int:
        config = Config(**options)
        config.validate()
        try:
            return run(config, arguments)
        except KeyboardInterrupt:
            if not launched():  # of the ranks of a launcher, none speaks for all
                sys.stderr.write("stopped\n")
            return 130

    command.__signature__ = inspect.signature(Config, eval_str=True)  # type: ignore[attr-defined]
    command.__annotations__ = inspect.get_annotations(Config, eval_str=True)
    app = typer.Typer(add_completion=False)
    app.command(help=HELP)(command)
    code = 2
    # typer's parse errors are click's or, in newer versions, its own: a subclass it exports names it.
    parse_error = cast(type[typer.BadParameter], typer.BadParameter.__mro__[2])
    try:
        return int(typer.main.get_command(app).main(arguments, name, standalone_mode=False) or 0)
    except parse_error as error:
        message = error.format_message()
    except (CheckpointError, InputError, MissingDependencyError) as error:
        message = str(error)
    except RingAttentionError as error:  # of a run under way: another rank is lost, or was started otherwise
        message, code = str(error), 1
    except typer.Abort:  # typer's word for Ctrl-C
        return 130
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)):
            raise
        message, code = f"A wrapper's collective failed, for another rank is lost: {str(error).splitlines()[0]}", 1
    sys.stderr.write(f"{_speaker()}error: {' '.join(message.split())}\n")
    end_job(code)
    return code
