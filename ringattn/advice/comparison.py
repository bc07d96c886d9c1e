"""Layouts times schedules for one mask: what each combination costs, and which one to take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

import ringattn
from ringattn import bands, layouts
from ringattn.bands import Array, Regions
from ringattn.checking import integer, tokens
from ringattn.errors import InputError, PlanError, UnsupportedError
from ringattn.masks import Mask, checked
from ringattn.mechanisms.base import Mechanism
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.softmax import Softmax
from ringattn.mesh import Mesh
from ringattn.naming import by_name, name_of
from ringattn.plans.plan import Plan
from ringattn.readable import dtype_name, readable_count, shortened
from ringattn.schedules import FLAT, Ulysses

Track = Callable[[list[tuple[str, str]]], Iterable[tuple[str, str]]]
COMPARED_TILES = 4_000_000  # beyond, a combination takes many seconds and gigabytes and is left out of a comparison
SPARING = {"ring": "ring(double=True)", "route": "route(node_aware=True)"}
MOST_RANKS = 8192  # a schedule's phases are a table of ranks by ranks
MOST = 1 << 20  # heads and dims
PLANNED_TILES = 20_000_000  # beyond, planning needs more memory than most machines have


def schedules_for(mechanism: Mechanism, ulysses: int = 1) -> tuple[str, ...]:
    """The names of the schedules that may serve a mechanism: what they exchange is all it needs."""
    if isinstance(mechanism, Ordered):
        return ("wave",)
    flat = tuple(name for name, member in by_name(FLAT).items() if member.serves(mechanism))
    return (*flat, name_of(Ulysses)) if ulysses > 1 else flat


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned: a mask over `length` tokens on ranks, the heads of the call and what attends.

    Attributes:
        ring, ulysses: the ranks' axes, as `ringattn.init` takes them.
        node: how many neighbouring ranks share a node; None where all do.
    """

    mask: Mask
    length: int
    ring: int
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    mechanism: Mechanism = Softmax()  # noqa: RUF009 (an immutable value)
    ulysses: int = 1
    node: int | None = None

    def __post_init__(self) -> None:
        checked(self.mask)
        tokens(self.length, "The sequence's length")
        for axis in ("ring", "ulysses"):
            needed = "a number of ranks, all of which are planned"
            integer(getattr(self, axis), axis, least=1, below=MOST_RANKS + 1, needed=needed)
        if self.ranks > MOST_RANKS:
            raise InputError(f"At most {MOST_RANKS} ranks are planned together; got {self.ranks}.")
        for name in ("heads", "kv_heads", "dim", "value_dim"):
            integer(getattr(self, name), name, least=1, below=MOST)
        if self.heads % self.kv_heads:
            raise InputError(
                f"Query heads must be a multiple of key heads; got {self.heads} and {self.kv_heads}. "
                f"Use {self.heads} key heads, or a divisor of it."
            )

    @property
    def mesh(self) -> Mesh:
        """Of the first of the ranks."""
        return Mesh.virtual(self.ring, self.ulysses, node=self.node)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.ring * self.ulysses

    @property
    def shown_ranks(self) -> str:
        """How many, in words, and on which axes where there are two."""
        return f"{self.ranks} ranks" + f" ({self.ring} x {self.ulysses})" * (self.ulysses > 1)

    @property
    def schedules(self) -> tuple[str, ...]:
        """Those that may serve the mechanism, on several nodes those that spare what is between them too."""
        found = schedules_for(self.mechanism, self.ulysses)
        several = self.node is not None and self.node < self.ranks
        return (*found, *(spare for name, spare in SPARING.items() if several and name in found))

    def plans(self, layout: str, schedule: str) -> list[Plan]:
        return ringattn.plan_all(
            self.mask,
            self.length,
            layout=layout,
            schedule=schedule,
            ring=self.ring,
            ulysses=self.ulysses,
            node=self.node,
            heads=(self.heads, self.kv_heads),
            head_dims=(self.dim, self.value_dim),
            dtype=self.dtype,
            mechanism=self.mechanism,
        )

    def layout_named(self, layout: str) -> str:
        """The layout's name, where ``auto`` is what the mask makes it."""
        taken, _ = layouts.named(layout, self.mask, self.length)
        return str(taken).partition("(")[0] if layout == "auto" else layout

    def spans(self, layout: str) -> Array:
        """Who holds what, as `layouts` describes it."""
        return layouts.named(layout, self.mask, self.length)[0].spans(self.length, self.ranks)

    def tiles(self, layout: str) -> int:
        """How many tiles the layout cuts the mask into, or some more."""
        return tile_count(self.mask.regions(self.length, self.length), self.spans(layout))

    def __str__(self) -> str:
        return (
            f"{self.mechanism}, {shortened(str(self.mask))}, {self.length} tokens on {self.shown_ranks}, "
            f"{self.heads} query and {self.kv_heads} key heads of {self.dim}, {dtype_name(self.dtype)}"
        )


@dataclasses.dataclass(frozen=True)
class Combination:
    """What one layout with one schedule costs. Per rank, unless it says otherwise; forward, unless it says backward.

    Attributes:
        area, tokens: the largest share of allowed pairs and of queries, over the mean.
        area_max: allowed pairs of the busiest rank.
        received_tokens_mean, received_tokens_max, sent_tokens_max: key positions.
        received_bytes_mean, received_bytes_max, sent_bytes_max: payload.
        backward_received_bytes_mean, backward_received_bytes_max, backward_sent_bytes_max: keys and values once more,
            and their gradients.
        between_nodes_tokens: key positions that all ranks together receive from other nodes.
        messages, backward_messages: of all ranks together.
        steps: of the rank that has most.
        memory: bytes of every buffer of forward and backward, of the rank that needs most.
        over_bound: key positions all ranks receive, over the least that a layout balanced to 2 % must; None where that
            is nothing, or sums over keys travel. Layouts that are less balanced may fall below 1.
    """

    layout: str
    schedule: str
    area: float
    tokens: float
    area_max: int
    received_tokens_mean: float
    received_tokens_max: int
    sent_tokens_max: int
    received_bytes_mean: float
    received_bytes_max: int
    sent_bytes_max: int
    backward_received_bytes_mean: float
    backward_received_bytes_max: int
    backward_sent_bytes_max: int
    between_nodes_tokens: int
    messages: int
    backward_messages: int
    steps: int
    memory: int
    over_bound: float | None

    @property
    def name(self) -> str:
        return f"{self.layout} with {self.schedule}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All combinations of a request.

    Attributes:
        bound: key positions that all ranks together must receive, if each is within 2 % of the mean share.
        auto: what the library's ``auto`` takes for both; None where its layout is left out.
        left_out: layouts that would cut the mask into too many tiles, and how many.
        refused: schedules that a layout does not suit, and why.
        verified: which plans were checked: ``all``, those of the one that is ``recommended``, or ``none``.
    """

    request: Request
    bound: float
    combinations: list[Combination]
    auto: Combination | None
    left_out: dict[str, int]
    refused: dict[str, str]
    verified: str

    @property
    def bound_bytes(self) -> float:
        """The bound in bytes, of the mean rank."""
        asked = self.request
        row = asked.kv_heads * (asked.dim + asked.value_dim) * asked.dtype.itemsize
        return self.bound / asked.ranks * row


def tile_count(regions: Regions, spans: Array) -> int:
    """An upper bound of the tiles that these spans cut a mask's regions into, without cutting them.

    Queries are cut as in `tiles.cut`; then the spans that overlap each part's keys are counted, not listed.
    """
    start = spans[:, layouts.START]
    stop = start + (spans[:, layouts.COUNT] - 1) * spans[:, layouts.STRIDE] + 1
    region, span = bands.overlaps(regions[:, bands.Q0], regions[:, bands.Q1], start, stop)
    part = regions[region]
    part[:, bands.Q0] = np.maximum(part[:, bands.Q0], start[span])
    part[:, bands.Q1] = np.minimum(part[:, bands.Q1], stop[span])
    part, _ = bands.tighten(part)
    first, last = part[:, bands.K0], part[:, bands.K1]
    touched = np.searchsorted(np.sort(start), last) - np.searchsorted(np.sort(stop), first, side="right")
    return int(np.minimum(touched, last - first).sum())


def check(plans: Sequence[Plan], name: str = "") -> None:
    """Verifies plans together; the error says of which combination they are."""
    try:
        ringattn.verify(plans)
    except PlanError as error:
        raise PlanError(f"{name}: {error}" if name else str(error)) from error


def compare(
    request: Request,
    names: Sequence[str] = tuple(layouts.NAMED),
    schedules: Sequence[str] | None = None,
    verified: str = "none",
    track: Track = iter,
) -> Comparison:
    """Plans every layout with every schedule, and keeps what it costs, not the plans.

    Layouts that give every rank the same tokens are planned once: balanced is zigzag for one causal sequence.

    Args:
        names: of layouts, or ``module:Name``.
        schedules: names of schedules; None for all that may serve the mechanism.
        verified: ``all`` checks every combination's plans, all ranks' together.
        track: walks the combinations, and may show how far it has come.
    """
    sizes = {name: request.tiles(name) for name in names}
    left_out = {name: size for name, size in sizes.items() if size > COMPARED_TILES}
    compared = [name for name in names if name not in left_out]
    if not compared:
        raise InputError(_too_many(left_out, request.ranks))
    bound = ringattn.lower_bound(request.mask, request.length, request.ranks)
    known: dict[tuple[bytes, str], Combination] = {}
    combinations, refused = [], {}
    asked = request.schedules if schedules is None else schedules
    for layout, schedule in track(list(itertools.product(compared, asked))):
        key = (request.spans(layout).tobytes(), schedule)
        try:
            if key not in known:
                plans = request.plans(layout, schedule)
                known[key] = measured(plans, layout, schedule, bound)
                if verified == "all":
                    check(plans, known[key].name)
            combinations.append(dataclasses.replace(known[key], layout=layout))
        except UnsupportedError as error:
            refused[f"{layout} with {schedule}"] = str(error)
    if not combinations:
        raise UnsupportedError(next(iter(refused.values())))
    auto = _auto(request, combinations, bound)
    return Comparison(request, bound, combinations, auto, left_out, refused, verified)


def _auto(request: Request, combinations: Sequence[Combination], bound: float) -> Combination | None:
    if request.tiles("auto") > COMPARED_TILES:
        return None
    sharding = ringattn.Sharding(request.length, request.mesh, mask=request.mask)
    shape = {"heads": (request.heads, request.kv_heads), "head_dims": (request.dim, request.value_dim)}
    one = ringattn.plan(request.mask, sharding, mechanism=request.mechanism, dtype=request.dtype, **shape)  # type: ignore[arg-type]
    layout, schedule = request.layout_named("auto"), schedule_of(one)
    same = [x for x in combinations if (x.layout, x.schedule) == (layout, schedule)]
    return same[0] if same else measured(request.plans(layout, schedule), layout, schedule, bound)


def refuse_too_many(request: Request, layout: str) -> None:
    """An error where a layout would cut the mask into more tiles than fit into memory."""
    size = request.tiles(layout)
    if size > PLANNED_TILES:
        raise InputError(_too_many({layout: size}, request.ranks))


def _too_many(sizes: dict[str, int], ranks: int) -> str:
    found = ", ".join(f"{name} into {readable_count(size)}" for name, size in sizes.items())
    return f"On {ranks} ranks this mask would be cut into too many tiles to plan: {found}. Take another layout."


def schedule_of(plan: Plan) -> str:
    """The name of the schedule of a plan, which ``auto`` may have taken."""
    return plan.description.partition(":")[0]


def measured(plans: Sequence[Plan], layout: str, schedule: str, bound: float) -> Combination:
    """What these plans cost, under the names they were asked for by. They need a shape."""
    moved = [plan.traffic() for plan in plans]
    even = ringattn.balance(plans)

    def most(name: str) -> int:
        return max(int(getattr(t, name)) for t in moved)

    def mean(name: str) -> float:
        return float(sum(getattr(t, name) for t in moved)) / len(moved)

    of_keys = plans[0].payload.per_key and not plans[0].queries_travel
    return Combination(
        layout=layout,
        schedule=schedule_of(plans[0]) if schedule == "auto" else schedule,
        area=even.area,
        tokens=even.tokens,
        area_max=max(plan.area for plan in plans),
        received_tokens_mean=mean("received_tokens"),
        received_tokens_max=most("received_tokens"),
        sent_tokens_max=most("sent_tokens"),
        received_bytes_mean=mean("received_bytes"),
        received_bytes_max=most("received_bytes"),
        sent_bytes_max=most("sent_bytes"),
        backward_received_bytes_mean=mean("backward_received_bytes"),
        backward_received_bytes_max=most("backward_received_bytes"),
        backward_sent_bytes_max=most("backward_sent_bytes"),
        between_nodes_tokens=sum(t.between_nodes_tokens for t in moved),
        messages=sum(t.messages for t in moved),
        backward_messages=sum(t.backward_messages for t in moved),
        steps=max(len(plan.steps) for plan in plans),
        memory=max(plan.memory().total for plan in plans),
        over_bound=sum(t.received_tokens for t in moved) / bound if bound and of_keys else None,
    )
