"""The options that commands share, and what they mean."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from ringattn import layouts, masks, schedules
from ringattn.advice.comparison import MOST
from ringattn.checking import DTYPES, integer
from ringattn.conformance import Case
from ringattn.errors import InputError
from ringattn.kernels import MEMBERS as KERNELS
from ringattn.kernels import Kernel
from ringattn.mechanisms import MEMBERS, Mechanism
from ringattn.mesh import Mesh
from ringattn.naming import by_name, named
from ringattn.readable import dtype_name, readable_bytes

LAYOUTS = tuple(layouts.NAMED)
SCHEDULES = tuple(by_name(schedules.MEMBERS))


def listed(names: Iterable[str]) -> str:
    """Members of a folder, for help."""
    return f"{', '.join(names)}, or module:Name of one outside the package"


Length = Annotated[int, typer.Option(help="Tokens of the sequence.", min=0)]
RingSize = Annotated[int, typer.Option("--ring", help="Ranks that share the sequence; with --ulysses, groups.", min=1)]
UlyssesSize = Annotated[
    int, typer.Option("--ulysses", help="Ranks of a group, which exchange heads for tokens.", min=1)
]
Node = Annotated[
    int | None, typer.Option("--node", help="How many neighbouring ranks share a node; all unless given.", min=1)
]
Heads = Annotated[int, typer.Option(help="Query heads.", min=1)]
KvHeads = Annotated[int | None, typer.Option(help="Key and value heads; as many as query heads unless given.", min=1)]
Dim = Annotated[int, typer.Option(help="Size of a query and key.", min=1)]
ValueDim = Annotated[int | None, typer.Option(help="Size of a value; that of a key unless given.", min=1)]
Batch = Annotated[int, typer.Option(help="Sequences at once.", min=1)]
MaskText = Annotated[str, typer.Option("--mask", help=f"Which pairs are allowed: {escape(masks.spellings())}.")]
LayoutName = Annotated[str, typer.Option("--layout", help=f"Who holds which tokens: auto, {listed(LAYOUTS)}.")]
ScheduleName = Annotated[
    str | None,
    typer.Option("--schedule", help=f"What moves when: auto, {listed(SCHEDULES)}; all that apply unless given."),
]
MechanismName = Annotated[str, typer.Option("--mechanism", help=f"What attends: {listed(by_name(MEMBERS))}.")]
KernelName = Annotated[str, typer.Option("--kernel", help=f"How tiles are computed: auto, {listed(by_name(KERNELS))}.")]
DtypeName = Annotated[str, typer.Option("--dtype", help="float64, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random inputs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]

T = TypeVar("T")


def dtype_named(name: str) -> torch.dtype:
    known = {dtype_name(dtype): dtype for dtype in DTYPES}
    if name not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}; got {name!r}.")
    return known[name]


def mechanism_named(name: str) -> Mechanism:
    return named("--mechanism", name, Mechanism, MEMBERS)


def kernel_named(name: str) -> Kernel | str:
    return name if name == "auto" else named("--kernel", name, Kernel, KERNELS, also=("auto",))


def case_of(
    mask: str,
    length: int,
    heads: int,
    kv_heads: int | None,
    dim: int,
    value_dim: int | None,
    dtype: str,
    mechanism: str,
    kernel: str,
    **more: Any,
) -> Case:
    """The attention call that these options name."""
    shared = kv_heads or heads
    sizes = {"--heads": heads, "--kv-heads": shared, "--dim": dim, "--value-dim": value_dim or dim}
    for name, size in sizes.items():
        integer(size, name, least=1, below=MOST)
    if heads % shared:
        raise InputError(
            f"Query heads must be a multiple of key heads; got {heads} and {shared}. "
            f"Use --kv-heads {heads}, or a divisor of it."
        )
    return Case(
        length,
        masks.parse(mask),
        kv_heads=shared,
        groups=heads // shared,
        dim=dim,
        value_dim=value_dim or dim,
        dtype=dtype_named(dtype),
        mechanism=mechanism_named(mechanism),
        kernel=kernel_named(kernel),
        **more,
    )


def refuse_too_large(case: Case) -> None:
    """An error where the inputs, their float64 copies, the results and the oracle's would not fit into memory."""
    numbers = case.batch * case.length * (case.heads + case.kv_heads) * (case.dim + case.value_dim)
    needed, there = 4 * 8 * numbers, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"The float64 oracle would need some {readable_bytes(needed)}; this machine has {readable_bytes(there)}. "
            f"Take fewer tokens, heads or dims, or ringattn plan, which computes nothing."
        )


def console() -> Console:
    """For results, on stdout: wide enough for the tables when it is not a terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def progress_bar(*columns: ProgressColumn | str, shown: bool = True) -> Progress:
    """A bar on stderr, so that results can be piped; none where that is not a terminal."""
    screen = Console(stderr=True)
    return Progress(*columns, console=screen, transient=True, disable=not (shown and screen.is_terminal))


def where(mesh: Mesh) -> str:
    """The ranks of a mesh, and how they talk."""
    return f"{mesh.size} rank{'s' * (mesh.size > 1)}, transport {mesh.connected().name}"


def check_writable(path: Path | None, option: str, suffix: str = "") -> None:
    """Refuses a file that cannot be written, before anything is measured for it.

    Raises:
        InputError: its name does not end so, or there is no folder for it that can be written to.
    """
    if path is None:
        return
    if not path.name.lower().endswith(suffix):
        raise InputError(f"{option} writes a {suffix[1:].upper()}: the file's name must end in {suffix}; got {path}.")
    folder = path.absolute().parent
    try:
        if not folder.is_dir():
            raise InputError(f"{option} cannot write {path}: there is no folder {path.parent}.")
        if path.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{option} cannot write {path}: it is a folder, or lies in one that cannot be written to.")
    except OSError as error:  # a name that no disk takes
        raise InputError(f"{option} cannot write {path}: {error.strerror}.") from error


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@contextlib.contextmanager
def working(label: str) -> Iterator[None]:
    """A moving bar and the time it has taken, for work whose end is not known beforehand."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with progress_bar(*columns) as progress:
        progress.add_task(label, total=None)
        yield


@contextlib.contextmanager
def bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A progress bar, and what moves it on by one; on a rank that shows nothing, nothing is shown."""
    with progress_bar(shown=shown) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def track(label: str, items: Sequence[T]) -> Iterator[T]:
    """The items, under a progress bar."""
    with bar(label, len(items)) as advance:
        for item in items:
            yield item
            advance()
