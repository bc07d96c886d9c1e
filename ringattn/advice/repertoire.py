"""The repertoire: what each mechanism keeps, moves and costs, found out by asking it and by running it.

Nothing here is written down by hand but the variants worth showing: a new mechanism is in the table on arrival.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from ringattn.functional import attention
from ringattn.kernels import MEMBERS as KERNELS
from ringattn.kernels.choice import chosen_kernel
from ringattn.kernels.reference import Reference
from ringattn.masks import Causal, Full, Mask
from ringattn.mechanisms import MEMBERS, Entmax, Gated, Hard, Linear, Mechanism, Problem, Sampled, Softmax
from ringattn.mechanisms.base import Summarising
from ringattn.mechanisms.ordered import Ordered
from ringattn.mesh import Mesh
from ringattn.naming import name_of
from ringattn.schedules import MEMBERS as SCHEDULES
from ringattn.sharding import Sharding
from ringattn.simulator import simulate

ROUNDS = 3  # of measuring, of which the median counts


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call: tokens, query and key heads, dims of a key and of a value, ranks."""

    length: int = 1024
    heads: int = 4
    kv_heads: int = 4
    dim: int = 64
    value_dim: int = 64
    ring: int = 4


Make = Callable[[Sizes, torch.Generator], Mechanism]


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A mechanism to be shown.

    Attributes:
        title: what it is called.
        make: it, with the learned tensors of the whole sequence.
    """

    title: str
    make: Make

    def made(self, sizes: Sizes) -> Mechanism:
        """It, the same every time."""
        return self.make(sizes, torch.Generator().manual_seed(0))


def variants() -> tuple[Specimen, ...]:
    """Those worth showing beside what each class is without arguments."""

    def softmax(**made: Callable[[Sizes, torch.Generator], object]) -> Make:
        return lambda sizes, g: Softmax(**{name: value(sizes, g) for name, value in made.items()})  # type: ignore[arg-type]

    def decays(sizes: Sizes, g: torch.Generator) -> torch.Tensor:
        return -torch.rand(1, sizes.kv_heads, sizes.length, generator=g)

    slopes = torch.tensor([0.4, 0.2, 0.1, 0.05])
    return (
        Specimen("Softmax(alibi)", softmax(alibi=lambda sizes, _: slopes.repeat(sizes.heads)[: sizes.heads])),
        Specimen("Softmax(additive)", softmax(additive=lambda s, g: torch.randn(s.heads, s.dim, generator=g))),
        Specimen(
            "Softmax(centres, width)",
            softmax(
                centres=lambda s, g: torch.rand(1, s.heads, s.length, generator=g) * s.length,
                width=lambda s, _: max(s.length / 4, 1),
            ),
        ),
        Specimen("Hard(top=4)", lambda *_: Hard(top=4)),
        Specimen("Entmax(2): sparsemax", lambda *_: Entmax(2)),
        Specimen("Entmax(alpha)", lambda sizes, g: Entmax(1.05 + 0.95 * torch.rand(sizes.heads, generator=g))),
        Specimen("Sampled(straight_through)", lambda *_: Sampled(straight_through=1.0)),
        Specimen("Linear(taylor)", lambda *_: Linear("taylor")),
        Specimen("Gated(log_decay)", lambda sizes, g: Gated(decays(sizes, g))),
    )


def specimens() -> Iterator[Specimen]:
    """All mechanisms, each followed by its variants."""
    others = variants()
    for member in MEMBERS:
        yield Specimen(f"{member.__name__}()", lambda *_, member=member: member())
        yield from (x for x in others if x.title.startswith(f"{member.__name__}("))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found out of one mechanism.

    Attributes:
        state: numbers kept for a query and head, as a formula of D and Dv.
        travels: what of a key head travels, as a formula.
        received_bytes: what the rank that receives most receives forward.
        mask: the masks it takes.
        schedules, kernels: those that serve it.
        times: its time, forward and backward on one rank, as a multiple of softmax's; None where it was not measured.
        times_reference: the same, both on the reference kernel; None too where it runs on another.
    """

    title: str
    state: str
    travels: str
    received_bytes: int
    mask: str
    schedules: tuple[str, ...]
    kernels: tuple[str, ...]
    times: float | None = None
    times_reference: float | None = None


Track = Callable[[Iterable[Specimen]], Iterable[Specimen]]


def facts(sizes: Sizes, *, measured: bool = True, track: Track = iter) -> list[Facts]:
    """What is found out of every mechanism in calls of these sizes."""
    return [_facts(specimen, sizes, measured) for specimen in track(list(specimens()))]


def _facts(specimen: Specimen, sizes: Sizes, measured: bool) -> Facts:
    mechanism = specimen.made(sizes)
    mask = mask_for(mechanism)
    problem = _problem(mechanism, sizes)
    kernel, _ = (None, "") if isinstance(mechanism, Ordered) else chosen_kernel("auto", problem)
    times = times_reference = None
    if measured:
        times = _times(specimen, sizes, mask, "auto")
        times_reference = _times(specimen, sizes, mask, "reference") if kernel == Reference() else None
    return Facts(
        title=specimen.title,
        state=_state(mechanism, sizes),
        travels=_travels(mechanism),
        received_bytes=max(simulate(_received, specimen, sizes, mask, ring=sizes.ring).results),
        mask=_masks(mechanism),
        schedules=_schedules(mechanism),
        kernels=("its own",) if kernel is None else tuple(_kernels(problem)),
        times=times,
        times_reference=times_reference,
    )


def mask_for(mechanism: Mechanism) -> Mask:
    """A causal mask, or that which the mechanism asks for."""
    return Full() if isinstance(mechanism, Ordered) else Causal()


def _masks(mechanism: Mechanism) -> str:
    if isinstance(mechanism, Ordered):
        return "full, contiguous"
    return "causal" if getattr(mechanism, "causal", False) else "any"


def _schedules(mechanism: Mechanism) -> tuple[str, ...]:
    if isinstance(mechanism, Ordered):
        return ("wave",)
    return tuple(name_of(x) for x in SCHEDULES if x.serves(mechanism))


def _kernels(problem: Problem) -> Iterator[str]:
    return (name_of(member) for member in KERNELS if member().refusal(problem) is None)


def _problem(mechanism: Mechanism, sizes: Sizes) -> Problem:
    shape = 1, sizes.heads, sizes.kv_heads, sizes.dim, sizes.value_dim
    return Problem(mechanism.without_tensors, *shape, torch.float32, torch.device("cpu"), mechanism.params)


def _state(mechanism: Mechanism, sizes: Sizes) -> str:
    """Numbers kept for a query of a head."""
    if isinstance(mechanism, Ordered):
        return "1, and 1 a key"

    def count(dim: int, value_dim: int) -> int:
        problem = _problem(mechanism, dataclasses.replace(sizes, dim=dim, value_dim=value_dim))
        problem = problem.unprepared(1)
        return sum(x.numel() for x in mechanism.empty(problem, 1)) // sizes.heads

    return _formula(count)


def _travels(mechanism: Mechanism) -> str:
    """What stands for a head of one key head, or of a run of keys."""
    if isinstance(mechanism, Ordered):
        return "D + Dv + 1 a query and rank"
    if isinstance(mechanism, Summarising):
        return f"{_formula(mechanism.summary_size)} a run of keys"
    before = "" if mechanism.preparation is None else ", D in each pass before"
    return f"D + Dv a key{before}"


def _formula(count: Callable[[int, int], int]) -> str:
    """A count of numbers as a formula of D and Dv, which it must be up to their product."""
    a, b, c, d = (count(dim, value_dim) for dim in (16, 32) for value_dim in (16, 48))
    both = (a - b - c + d) // (16 * 32)
    by_dim, by_value = (c - a) // 16 - 16 * both, (b - a) // 32 - 16 * both
    rest = a - 16 * (by_dim + by_value) - 256 * both
    terms = ((both, "D Dv"), (by_dim, "D"), (by_value, "Dv"), (rest, ""))
    return " + ".join(f"{n if n != 1 or not x else ''} {x}".strip() for n, x in terms if n) or "0"


def _received(mesh: Mesh, specimen: Specimen, sizes: Sizes, mask: Mask) -> int:
    """Bytes that this rank receives forward."""
    counters = mesh.connected().counters
    before = counters.received_bytes
    with torch.no_grad():
        _call(mesh, specimen, sizes, mask, "auto")()
    return counters.received_bytes - before


def _times(specimen: Specimen, sizes: Sizes, mask: Mask, kernel: str) -> float:
    """The median of its time over softmax's, measured in turns on one rank; forward and backward."""
    mesh = Mesh.local()
    calls = [_call(mesh, x, sizes, mask, kernel) for x in (specimen, Specimen("", lambda *_: Softmax()))]
    for call in calls:
        call()
    ratios = []
    for _ in range(ROUNDS):
        took = []
        for call in calls:
            started = time.perf_counter()
            call()
            took.append(time.perf_counter() - started)
        ratios.append(took[0] / took[1])
    return statistics.median(ratios)


def _call(mesh: Mesh, specimen: Specimen, sizes: Sizes, mask: Mask, kernel: str) -> Callable[[], None]:
    """One call of this rank, and where gradients are enabled its backward pass."""
    g = torch.Generator().manual_seed(0)
    mechanism = specimen.made(sizes)
    layout = "contiguous" if isinstance(mechanism, Ordered) else "auto"
    sharding = Sharding(sizes.length, mesh, layout, mask)
    shapes = (sizes.heads, sizes.dim), (sizes.kv_heads, sizes.dim), (sizes.kv_heads, sizes.value_dim)
    q, k, v = (sharding.split(torch.randn(1, h, sizes.length, d, generator=g), 2) for h, d in shapes)
    mechanism = sharded(mechanism, sharding)
    kernel = "auto" if isinstance(mechanism, Ordered) else kernel

    def call() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, mask, sharding=sharding, mechanism=mechanism, kernel=kernel)  # type: ignore[call-overload]
        if torch.is_grad_enabled():
            out.sum().backward()

    return call


def sharded(mechanism: Mechanism, sharding: Sharding) -> Mechanism:
    """The mechanism with this rank's part of the tensors that are cut."""
    tensors = {x: sharding.split(mechanism.params[x], d) for x, d in mechanism.sharded.items() if x in mechanism.params}
    return dataclasses.replace(mechanism, **tensors) if tensors else mechanism
