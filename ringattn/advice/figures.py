"""Pictures of plans: who computes which pair of the attention matrix, and what every rank does when.

The matrix is painted from the tiles of the plans, not from mask and layout: what the picture shows is what will run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringattn.advice import charts
from ringattn.advice.comparison import Combination, Comparison
from ringattn.errors import MissingDependencyError
from ringattn.plans import tiles
from ringattn.plans.exchanges import Exchange, Step
from ringattn.plans.plan import Plan
from ringattn.plans.ulysses import UlyssesPlan
from ringattn.readable import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pixels = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

PIXELS = 600  # of the matrix, a side
HATCHES = 80  # stripes along a side of the matrix
SAMPLES = 3  # a pixel's side is averaged over so many positions of a long sequence
NAMED_RANKS = 16  # beyond these, lanes are too thin for names and numbers
PALETTE = ("#4477aa", "#ee7733", "#228833", "#cc3377", "#66ccee", "#bbaa22", "#7744aa", "#999999")  # colour-blind safe
PAPER, WAIT, INK = "#ffffff", "#f2d7d5", "#333333"


class Segment(NamedTuple):
    """A stretch of one rank's time, in the units of `timelines`."""

    rank: int
    kind: str  # "compute", "exchange" or "wait"
    start: float
    stop: float
    peers: tuple[int, ...]  # whose keys are attended to, or who sends them; none where a rank only sends


def draw_plans(
    plans: Sequence[Plan], length: int, path: Path, compared: tuple[Comparison, Combination] | None = None
) -> None:
    """Draws the plans of all ranks into a PNG file; below them the comparison they were taken from, where there is one.

    Args:
        compared: the comparison, and the combination whose plans these are.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Drawing needs matplotlib; install ringattn[plot].") from error
    figure = Figure(figsize=(15, 11 if compared else 7), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    heights = (7, 4) if compared else (7,)
    (left, right), *below = figure.subplots(
        len(heights), 2, width_ratios=(1, 1.15), height_ratios=heights, squeeze=False
    )
    colours = rank_colours(len(plans))
    draw_matrix(left, plans, length, colours)
    draw_timelines(right, plans, colours)
    if compared:
        charts.draw_balance(below[0][0], *compared)
        charts.draw_received(below[0][1], *compared)
    figure.suptitle(shortened(plans[0].description, 130), fontsize=13, color=INK)
    figure.savefig(path, dpi=110)


def rank_colours(ranks: int) -> Pixels:
    """A colour [ranks, 3] for every rank: told apart by eye up to eight, a scale of hues beyond."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if ranks <= len(PALETTE):
        return np.array([to_rgb(colour) for colour in PALETTE[:ranks]])
    return np.asarray(colormaps["turbo"](np.linspace(0.05, 0.95, ranks)))[:, :3]


def matrix(plans: Sequence[Plan], length: int, colours: Pixels) -> Pixels:
    """The attention matrix as an image [side, side, 3], queries down and keys across."""
    side = min(length, PIXELS)
    fine = min(length, side * SAMPLES) // side * side
    # one position from every stretch, drawn at random so that strided layouts do not beat against the grid
    edges = np.arange(fine) * length // fine
    room = np.diff(np.append(edges, length))
    sampled = edges + np.random.default_rng(0).integers(0, room)
    image = np.ones((fine, fine, 3))
    for plan in plans:
        # the members of a group compute the same pairs, each of other heads: they are hatched in their colours
        members = len(plan.swap.members) if isinstance(plan, UlyssesPlan) else 1
        stripes = np.add.outer(np.arange(fine), np.arange(fine)) * HATCHES // fine % members
        for row in plan.tile_rows:
            _paint(image, row, sampled, colours[plan.rank], stripes == plan.rank % members)
    blocks = image.reshape(side, fine // side, side, fine // side, 3)
    return np.asarray(blocks.mean(axis=(1, 3)))


def _paint(image: Pixels, tile: Ints, sampled: Ints, colour: Pixels, where: Bools) -> None:
    """Colours those pairs of sampled positions that lie in a tile, some of them."""
    rows, i = _inside(sampled, tile[tiles.Q_POSITION], tile[tiles.Q_STRIDE], tile[tiles.M])
    columns, j = _inside(sampled, tile[tiles.K_POSITION], tile[tiles.K_STRIDE], tile[tiles.N])
    if rows.size and columns.size:
        offset = i[:, None] - j[None, :]
        box = np.ix_(rows, columns)
        inside = (tile[tiles.LOW] <= offset) & (offset <= tile[tiles.HIGH]) & where[box]
        image[box] = np.where(inside[..., None], colour, image[box])


def _inside(sampled: Ints, start: int, stride: int, count: int) -> tuple[Ints, Ints]:
    """Which samples are among start, start + stride, …, and their numbers in that series."""
    first, last = np.searchsorted(sampled, [start, start + stride * (count - 1) + 1])
    offsets = sampled[first:last] - start
    hit = np.flatnonzero(offsets % stride == 0)
    return first + hit, offsets[hit] // stride


def timelines(plans: Sequence[Plan], pairs_per_position: float) -> list[Segment]:
    """When each rank computes and exchanges in the forward pass, a pair taking one unit of time.

    A step starts its exchange, computes, and waits; a message starts when both ends have come to its exchange and
    takes `pairs_per_position` units for each key position. Exchanges of one phase depend on earlier phases only.
    """
    clock = dict.fromkeys(range(len(plans)), 0.0)
    segments: list[Segment] = []

    def compute(plan: Plan, step: Step) -> float:
        began = clock[plan.rank]
        done = began + step.area
        if step.tiles:
            segments.append(Segment(plan.rank, "compute", began, done, _origins(plan, step.phase)))
        return done

    def bare(plan: Plan, steps: list[Step]) -> None:
        """Steps before the next exchange."""
        while steps and not steps[0].exchange:
            clock[plan.rank] = compute(plan, steps.pop(0))

    left = {plan.rank: list(plan.steps) for plan in plans}
    for plan in plans:
        bare(plan, left[plan.rank])
    for phase in sorted({step.exchange.phase for plan in plans for step in plan.steps if step.exchange}):
        now = [plan for plan in plans if left[plan.rank] and left[plan.rank][0].exchange.phase == phase]
        began = {plan.rank: clock[plan.rank] for plan in now}
        for plan in now:
            rank, step = plan.rank, left[plan.rank].pop(0)
            done = compute(plan, step)
            start, stop = _exchange(step.exchange, rank, began, pairs_per_position)
            senders = tuple(sorted({item.peer for item in step.exchange.receives}))
            segments.append(Segment(rank, "exchange", start, stop, senders))
            if stop > done:
                segments.append(Segment(rank, "wait", done, stop, ()))
            clock[rank] = max(done, stop)
        for plan in now:
            bare(plan, left[plan.rank])
    end = max(clock.values(), default=0.0)
    idle = [Segment(rank, "wait", time, end, ()) for rank, time in clock.items() if time < end]
    return segments + idle


def _exchange(exchange: Exchange, rank: int, began: dict[int, float], cost: float) -> tuple[float, float]:
    """When it begins, with the first message, and ends: each way, messages share the rank's link."""
    starts = [max(began[rank], began.get(item.peer, 0.0)) for item in (*exchange.sends, *exchange.receives)]
    rows = max(sum(item.rows * item.share for item in side) for side in (exchange.sends, exchange.receives))
    return min(starts), max(starts) + rows * cost


def _origins(plan: Plan, phase: int) -> tuple[int, ...]:
    if phase == 0:
        return (plan.rank,)
    return tuple(sorted({int(hold[2]) for hold in plan.receives if hold[0] == phase}))


def draw_matrix(axes: Axes, plans: Sequence[Plan], length: int, colours: Pixels) -> None:
    """Draws who computes which pair."""
    from matplotlib.ticker import EngFormatter

    axes.set_title("who computes which pair", fontsize=12, color=INK)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
    if length:
        image = matrix(plans, length, colours)
        axes.imshow(image, extent=(0, length, length, 0), interpolation="nearest", aspect="equal")
    if len(plans) > NAMED_RANKS:
        return
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=tuple(colours[plan.rank]), label=f"rank {plan.rank}: {plan.tokens} tokens, {_share(plan, plans)}")
        for plan in plans
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=9, framealpha=0.9, title="share of the pairs")


def _share(plan: Plan, plans: Sequence[Plan]) -> str:
    total = sum(other.area for other in plans)
    return f"{plan.area / total:.1%}" if total else "nothing"


def draw_timelines(axes: Axes, plans: Sequence[Plan], colours: Pixels) -> None:
    """Draws a lane a rank: what it computes, coloured by whose keys, above what it receives, coloured by who sends."""
    from matplotlib.ticker import EngFormatter

    area = sum(plan.area for plan in plans)
    received = sum(plan.traffic().received_tokens for plan in plans)
    cost = area / received / 2 if received else 0.0
    for segment in timelines(plans, cost):
        _draw_segment(axes, segment, colours)
    axes.set_title(
        "when, forward: computing above, receiving below, idle in pink\n"
        "(as if receiving took half as long as computing)",
        fontsize=12,
        color=INK,
    )
    axes.set_ylim(len(plans) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("time, in pairs computed")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    every = max(1, len(plans) // NAMED_RANKS)
    axes.set_yticks(range(0, len(plans), every), [f"rank {rank}" for rank in range(0, len(plans), every)])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_segment(axes: Axes, segment: Segment, colours: Pixels) -> None:
    """Keys of several ranks at once are bands above each other; an exchange that only sends is an outline."""
    width, lane, compute = segment.stop - segment.start, segment.rank, segment.kind == "compute"
    thin = len(colours) > NAMED_RANKS
    if segment.kind == "wait":
        hatch = None if thin else "///"
        axes.barh(lane - 0.14, width, 0.46, segment.start, color=WAIT, hatch=hatch, edgecolor=PAPER, linewidth=0)
        return
    centre, height = (lane - 0.14, 0.46) if compute else (lane + 0.25, 0.22)
    edge = 0.0 if thin else 0.8
    if not segment.peers:
        axes.barh(centre, width, height, segment.start, color=PAPER, edgecolor=colours[lane], linewidth=1.2)
    for nth, peer in enumerate(segment.peers):
        each = height / len(segment.peers)
        bottom = centre - height / 2 + (nth + 0.5) * each
        axes.barh(bottom, width, each, segment.start, color=colours[peer], edgecolor=PAPER, linewidth=edge)
    if thin or len(segment.peers) > 3 or width < 0.07 * axes.dataLim.x1:
        return
    names = ", ".join(map(str, segment.peers))
    if compute:
        text = "own keys" if segment.peers == (lane,) else f"keys of {names}"
    else:
        text = f"from {names}" if names else "sends"
    axes.annotate(
        text,
        (segment.start + width / 2, centre),
        ha="center",
        va="center",
        fontsize=8 if compute else 7,
        color=PAPER if segment.peers else INK,
        clip_on=True,
    )
