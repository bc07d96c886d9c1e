"""Random cases: any mask, layout, mechanism and shape, drawn with a `random.Random`.

Nothing else is random: a seed repeats a case, and the tests hand in a generator whose draws hypothesis can shrink.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from random import Random

import torch

from ringattn import layouts, mechanisms, schedules
from ringattn.conformance.case import FEATURES, Case
from ringattn.kernels import Kernel
from ringattn.layouts import Balanced, Explicit, Layout
from ringattn.masks import Blocks, Causal, Documents, Full, Mask, Predicate, Prefix, SinkTokens, Window
from ringattn.mechanisms.ordered import Ordered
from ringattn.naming import by_name
from ringattn.schedules import Schedule, Scheme, Ulysses

SCHEDULES: tuple[Schedule, ...] = tuple(
    member(lookahead=lookahead) for lookahead in (1, 0) for member in schedules.FLAT if member.payload.per_key
)
"""Those that can serve any call."""

FORMS: tuple[Schedule, ...] = (
    schedules.Route(stages=2),
    schedules.Route(stages=9, buffer=24),
    schedules.Route(node_aware=True),
    schedules.Route(buffer=24, node_aware=True, lookahead=0),
)
"""Other forms of these."""

PARTIAL: tuple[Schedule, ...] = (
    *(member(lookahead=x) for x in (1, 0) for member in schedules.FLAT if not member.payload.per_key),
    schedules.Ring(double=True),
)
"""Those that refuse some mechanisms, masks or meshes."""

LAYOUTS: tuple[Layout, ...] = tuple(member() for member in layouts.NAMED.values() if member is not Balanced)
"""Those that need no arguments."""

MECHANISMS = (*(["softmax"] * len(mechanisms.MEMBERS)), *by_name(mechanisms.MEMBERS))

RANKS = (1, 2, 3, 4, 6, 7, 8)
HEADS = ((8, 1), (2, 4), (1, 8), (3, 2), (5, 1), (1, 7), (1, 1))  # key heads, and the query heads of each
DTYPES = (torch.float32, torch.float64)
LONGEST = 257


def sparse(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Pairs without an order that bands could see."""
    return (q * 7 + k * 3) % 5 < 2


def dilated(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Every eighth key to either side."""
    return (q - k).abs() % 8 == 0


def everything(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A predicate that bands could say."""
    return (q >= 0) & (k >= 0)


PREDICATES = tuple(map(Predicate, (sparse, dilated, everything)))


def draw(
    random: Random,
    *,
    served_by: Sequence[Scheme | str] | None = None,
    kernels: Sequence[Kernel | str] = ("auto", "reference"),
    dtypes: Sequence[torch.dtype] = DTYPES,
    ranks: Sequence[int] = RANKS,
) -> Case:
    """Any call that no schedule or kernel refuses, if those are of the package.

    Args:
        served_by: schedules along one axis; None for all, on meshes of two axes too.
    """
    length = random.randint(0, random.choice((40, LONGEST)))
    size, dim = random.choice(ranks), random.choice((1, 4, 8, 16))
    kv_heads, groups = random.choice(HEADS)
    mechanism = random.choice(MECHANISMS)
    made, causal = mask(random, length), by_name(mechanisms.MEMBERS)[mechanism].causal
    softmax, scaled = mechanism == "softmax", hasattr(by_name(mechanisms.MEMBERS)[mechanism], "scale")
    scores = mechanism in ("softmax", "entmax")
    features = [name for name in FEATURES if random.random() < 0.3] if scores and random.random() < 0.5 else []
    ordered = issubclass(by_name(mechanisms.MEMBERS)[mechanism], Ordered)
    every: Sequence[Scheme | str] = ("auto", *SCHEDULES, *FORMS)
    schedule = random.choice(every if served_by is None else served_by)
    ulysses = 1 if served_by else random.choice([n for n in range(1, size + 1) if size % n == 0])
    if 1 < ulysses <= kv_heads * groups:
        schedule = random.choice((schedule, in_groups(random), in_groups(random)))
    case = Case(
        length=length,
        mask=made & Causal() if causal else made,
        ranks=size,
        batch=random.randint(1, 2),
        kv_heads=kv_heads,
        groups=groups,
        dim=dim,
        value_dim=random.choice((dim, dim, 3, 12)),
        layout=layout(random, length, size),
        schedule=schedule,
        ulysses=ulysses,
        kernel=random.choice(kernels),
        dtype=random.choice(dtypes),
        use_lse=softmax and random.random() < 0.5,
        seed=random.randint(0, 2**16),
        mechanism=mechanism,
        features=frozenset(random.choice(((), ("bias",))) if ordered else features),
        scale=random.choice((None, None, 0.3)) if scaled else None,
    )
    return in_order(case) if ordered else case


def in_groups(random: Random) -> Ulysses:
    """Heads exchanged for sequence, around any schedule."""
    inner: Sequence[Schedule | str] = ("auto", *SCHEDULES, *FORMS)
    return Ulysses(random.choice(inner), random.randint(1, 3), keep=random.random() < 0.7)


def in_order(case: Case) -> Case:
    """The case as mechanisms take it that walk the keys in order: all keys, contiguous, by the wave."""
    schedule = Ulysses() if isinstance(case.schedule, Ulysses) else "auto"
    return dataclasses.replace(
        case, mask=Full(), layout="contiguous", kv_layout="contiguous", schedule=schedule, kernel="auto"
    )


def mask(random: Random, length: int, *, predicates: bool = True) -> Mask:
    """Every class of masks, and random combinations of them."""
    size = max(length, 1)
    simple: list[Callable[[], Mask]] = [
        Full,
        Causal,
        lambda: Window(random.randint(0, size), random.randint(0, size)),
        lambda: Documents(document_lengths(random, length)),
        lambda: Prefix(random.randint(0, size)),
        lambda: SinkTokens(random.randint(0, size)),
        lambda: bitmap(random, length, random.randint(1, 64)),
        *([lambda: random.choice(PREDICATES)] if predicates else []),
    ]

    def combined(depth: int) -> Mask:
        kind = random.randint(0, 5 if depth else 2)  # the deeper, the likelier to end
        if kind < 3:
            return random.choice(simple)()
        first = combined(depth - 1)
        if kind == 3:
            return ~first
        return first & combined(depth - 1) if kind == 4 else first | combined(depth - 1)

    return combined(3)


def document_lengths(random: Random, length: int) -> list[int]:
    """Lengths that sum to ``length``; one-token and empty documents among them."""
    cuts = sorted(random.randint(0, length) for _ in range(random.randint(0, 6)))
    return [b - a for a, b in itertools.pairwise([0, *cuts, length])]


def bitmap(random: Random, length: int, size: int) -> Blocks:
    """Half of the blocks of this many tokens."""
    side = -(-length // size)
    generator = torch.Generator().manual_seed(random.randint(0, 999))
    return Blocks(torch.rand(side, side, generator=generator) < 0.5, size)


def layout(random: Random, length: int, ranks: int) -> Layout | str:
    """Every layout; of the explicit ones, runs dealt at random."""
    kind = random.randint(0, 4)
    if kind < 2:
        return ("auto", "balanced")[kind]
    if kind < 4:
        return random.choice(LAYOUTS)
    owners = [random.randint(0, ranks - 1) for _ in range(random.randint(1, 9))]
    edges = [length * i // len(owners) for i in range(len(owners) + 1)]
    runs: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for owner, run in zip(owners, itertools.pairwise(edges), strict=True):
        if run[0] < run[1]:
            runs[owner].append(run)
    return Explicit(runs)


def draw_cross(random: Random, **choices: Sequence[object]) -> Case:
    """Any call of queries with the keys of another sequence; strides of the two layouts need not be equal."""
    case = draw(random, **choices)  # type: ignore[arg-type]
    length, kv_length = random.randint(0, 60), random.randint(0, 60)
    made, causal = cross_mask(random, length, kv_length), by_name(mechanisms.MEMBERS)[str(case.mechanism)].causal
    scale = random.choice((None, 0.3, 0.0, -0.7)) if case.mechanism == "softmax" else case.scale
    crossed = dataclasses.replace(
        case,
        length=length,
        kv_length=kv_length,
        mask=made & Causal() if causal else made,
        layout=random.choice(LAYOUTS),
        kv_layout=random.choice(LAYOUTS),
        scale=scale,
    )
    return in_order(crossed) if isinstance(case.attends, Ordered) else crossed


def cross_mask(random: Random, length: int, kv_length: int) -> Mask:
    """Masks of a query and a key sequence, packed documents of both among them."""
    count = random.randint(0, 4)
    cuts = ([random.randint(0, n) for _ in range(count)] for n in (length, kv_length))
    sides = zip(cuts, (length, kv_length), strict=True)
    both = Documents(*([b - a for a, b in itertools.pairwise([0, *sorted(cut), n])] for cut, n in sides))
    window = Window(random.randint(0, 9), random.randint(0, 9))
    return random.choice(
        (
            both,
            window,
            both & window,
            window | Prefix(random.randint(0, 9)),
            ~window,
            Causal(),
            Full(),
            SinkTokens(2),
            PREDICATES[0],
            PREDICATES[1] & Causal(),
        )
    )
