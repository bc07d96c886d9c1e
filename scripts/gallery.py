"""Draws the README's pictures: every mask, layout and mechanism, and one plan with the words that the code uses.

Masks and layouts draw themselves; the plan is drawn from its tiles and messages, so that the pictures show what runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import ringattn
from ringattn import layouts, masks
from ringattn.advice.figures import PALETTE, draw_matrix, draw_timelines, rank_colours
from ringattn.advice.gallery import draw_gallery
from ringattn.plans import tiles
from ringattn.plans.plan import Plan
from scripts.benchmarks.waiting import Distance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parents[1] / ".pictures"
LENGTH = 24
INK = "#333333"


def even(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Every second key to either side."""
    return (q - k) % 2 == 0


PACKED = ringattn.Documents([9, 4, 11])
MASKS: tuple[tuple[str, ringattn.Mask], ...] = (
    ("Full()", ringattn.Full()),
    ("Causal()", ringattn.Causal()),
    ("Window(5)", ringattn.Window(5)),
    ("Documents([9, 4, 11])", PACKED),
    ("Prefix(7)", ringattn.Prefix(7)),
    ("SinkTokens(3)", ringattn.SinkTokens(3)),
    ("Blocks(bitmap, 6)", ringattn.Blocks([[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 1]], 6)),
    ("Predicate(even)", ringattn.Predicate(even)),
    ("Documents(…) & Causal()", PACKED & ringattn.Causal()),
    ("Window(5) | SinkTokens(3)", ringattn.Window(5) | ringattn.SinkTokens(3)),
    ("Causal() | Prefix(7)", ringattn.Causal() | ringattn.Prefix(7)),
    ("Causal() & ~Window(3)", ringattn.Causal() & ~ringattn.Window(3)),
)
LAYOUTS: tuple[tuple[str, ringattn.Layout], ...] = (
    ("Contiguous()", ringattn.Contiguous()),
    ("Zigzag()", ringattn.Zigzag()),
    ("Striped()", ringattn.Striped()),
    ("Balanced(Documents(…) & Causal())", ringattn.Balanced(PACKED & ringattn.Causal())),
    ("Explicit(runs)", ringattn.Explicit([[(0, 3), (20, 24)], [(3, 12)], [(12, 20)]])),
)


def draw_masks(path: Path) -> None:
    """Every class of masks, and some combinations: queries down, keys across."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    for axes, (title, mask) in zip(figure.subplots(3, 4).flat, MASKS, strict=True):
        mask.draw(axes, LENGTH)
        axes.set(title="", xlabel="", ylabel="", xticks=(), yticks=())
        axes.set_title(title, fontsize=10, color=INK, family="monospace")
    figure.supxlabel("keys", fontsize=9, color=INK)
    figure.supylabel("queries", fontsize=9, color=INK)
    figure.savefig(path, dpi=90)


def draw_layouts(path: Path) -> None:
    """Every layout of 24 tokens on three ranks: a row per rank, positions across."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.subplots(2, 3).flat
    for axes, (title, layout) in zip(grid, LAYOUTS, strict=False):
        layout.draw(axes, LENGTH, 3)
        axes.set(title="", xlabel="", ylabel="", xticks=range(0, LENGTH + 1, 4), yticks=range(3))
        axes.set_yticklabels([f"rank {rank}" for rank in range(3)], fontsize=8)
        axes.set_title(title, fontsize=10, color=INK, family="monospace")
        axes.tick_params(labelsize=8)
    for axes in grid:
        axes.axis("off")
    list(figure.axes)[-1].axis("off")
    figure.savefig(path, dpi=90)


def draw_words(path: Path) -> None:
    """One rank's plan of three, by phases, with the words of the glossary."""
    mask = ringattn.Documents([15, 9]) & ringattn.Causal()
    plans = ringattn.plan_all(mask, LENGTH, "zigzag", "route", ring=3)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_tiles(left, plans[1])
    _draw_phases(right, plans[1])
    figure.suptitle("the plan of rank 1 of 3: causal documents of 15 and 9 tokens, zigzag, by route", fontsize=11)
    figure.savefig(path, dpi=90)


def draw_axes(path: Path) -> None:
    """Four ranks on two axes; and twelve with an exchange for every distance, and with staged ones."""
    length, mask = 4096, ringattn.Documents([1500, 1, 2595]) & ringattn.Causal()
    both = ringattn.plan_all(mask, length, "auto", ringattn.Ulysses("route"), 2, 2, heads=(4, 4))
    random, packed, lengths = np.random.default_rng(1), 4 * length, list[int]()
    while sum(lengths) < packed:
        lengths.append(int(np.clip(random.lognormal(np.log(500), 1.2), 32, packed - sum(lengths))))
    documents = ringattn.Documents(lengths) & ringattn.Causal()
    figure = Figure(figsize=(15, 12), layout="constrained")
    grid = figure.subplots(2, 2)
    draw_matrix(grid[0][0], both, length, rank_colours(4))
    draw_timelines(grid[0][1], both, rank_colours(4))
    grid[0][0].set_title("2 x 2 ranks: two groups, whose members compute other heads", fontsize=12, color=INK)
    for axes, words, schedule in zip(
        grid[1], ("an exchange for every distance", "staged exchanges"), (Distance(), ringattn.Route()), strict=True
    ):
        plans = ringattn.plan_all(documents, packed, ringattn.Balanced(documents), schedule, ring=12)
        draw_timelines(axes, plans, rank_colours(12))
        axes.set_title(f"12 ranks, {len(lengths)} documents, by route: {words}", fontsize=12, color=INK)
    grid[1][1].set_xlim(grid[1][0].get_xlim())
    figure.savefig(path, dpi=80)


def _draw_tiles(axes: Axes, plan: Plan) -> None:
    """The rank's tiles in the attention matrix, each in the colour of its phase."""
    axes.set(xlim=(0, LENGTH), ylim=(LENGTH, 0), xlabel="keys", ylabel="queries", aspect="equal")
    for rank, _, start, count, _ in ringattn.Zigzag().spans(LENGTH, 3).tolist():
        axes.axvline(start, color="#cccccc", linewidth=1)
        axes.text(start + count / 2, -0.5, str(rank), ha="center", fontsize=8, color=INK)
    for phase, each in plan.tiles.items():
        image = np.zeros((LENGTH, LENGTH), dtype=bool)
        for row in each.rows:
            i, j = np.arange(row[tiles.M]), np.arange(row[tiles.N])
            inside = (row[tiles.LOW] <= i[:, None] - j) & (i[:, None] - j <= row[tiles.HIGH])
            q = row[tiles.Q_POSITION] + row[tiles.Q_STRIDE] * i
            k = row[tiles.K_POSITION] + row[tiles.K_STRIDE] * j
            image[np.ix_(q, k)] |= inside
            axes.text(k.mean() + 0.5, q.mean() + 0.5, "tile", ha="center", va="center", fontsize=8, color="black")
        colour = np.zeros((LENGTH, LENGTH, 4))
        colour[image] = (*(int(PALETTE[phase][n : n + 2], 16) / 255 for n in (1, 3, 5)), 0.75)
        axes.imshow(colour, extent=(0, LENGTH, LENGTH, 0))
    axes.set_title("tiles, by phase; above, who holds each span of keys\n", fontsize=10, color=INK)


def _draw_phases(axes: Axes, plan: Plan) -> None:
    """What the rank computes and receives in each phase, and how its state grows."""
    done = 0
    for row, step in enumerate(plan.steps):
        received = " and ".join(f"{item.rows} of rank {item.peer}" for item in step.exchange.receives)
        pairs = step.tiles.area if step.tiles else 0
        done += pairs
        lines = (
            f"phase {step.phase}",
            f"computes {pairs} pairs over {'its own keys' if step.phase == 0 else 'what it received'}",
            f"meanwhile receives rows: {received} (the payload)" if received else "receives nothing more",
            f"merged into the state (out, lse): {done} of {plan.area} pairs",
        )
        axes.add_patch(_box(row, PALETTE[step.phase]))
        for nth, line in enumerate(lines):
            weight = "bold" if nth == 0 else "normal"
            axes.text(0.05, row + 0.19 + nth * 0.19, line, fontsize=9.5, va="center", color=INK, fontweight=weight)
    axes.set(xlim=(0, 1), ylim=(len(plan.steps), 0))
    axes.axis("off")


def _box(row: int, colour: str) -> FancyBboxPatch:
    return FancyBboxPatch(
        (0.02, row + 0.06), 0.96, 0.84, boxstyle="round,pad=0,rounding_size=0.03", facecolor=colour, alpha=0.25
    )


def main() -> int:
    """Draws all of them."""
    parser = argparse.ArgumentParser(prog="scripts/pictures", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to (default .pictures)")
    folder = parser.parse_args().folder
    shown = {type(atom) for _, mask in MASKS for atom in (mask, *getattr(mask, "parts", ()))}
    assert shown >= set(masks.MEMBERS) and {type(layout) for _, layout in LAYOUTS} == set(layouts.MEMBERS)
    for name, draw in (
        ("masks", draw_masks),
        ("layouts", draw_layouts),
        ("words", draw_words),
        ("axes", draw_axes),
        ("mechanisms", draw_gallery),
    ):
        draw(folder / f"{name}.png")
        print(folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
