"""Bar charts of a comparison: what each combination receives, and how long its busiest rank computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringattn.advice.comparison import Combination, Comparison
from ringattn.readable import readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN, MOST, TAKEN, INK = "#4477aa", "#b7cbe2", "#228833", "#333333"


def draw_received(axes: Axes, comparison: Comparison, taken: Combination) -> None:
    """Bytes received forward, by the mean rank and at most, beside the least that a balanced layout must receive."""
    from matplotlib.ticker import EngFormatter

    shown = comparison.combinations
    rows = range(len(shown))
    axes.barh(rows, [x.received_bytes_max for x in shown], 0.7, color=MOST, label="the rank that receives most")
    axes.barh(rows, [x.received_bytes_mean for x in shown], 0.36, color=MEAN, label="the mean rank")
    if comparison.bound:
        label = "the least for a layout balanced to 2 %, mean rank"
        axes.axvline(comparison.bound_bytes, color=INK, linestyle="--", linewidth=1.2, label=label)
    _name_rows(axes, [(x.name, x == taken) for x in shown])
    for row, x in enumerate(shown):
        _annotate(axes, row, x.received_bytes_max, readable_bytes(x.received_bytes_max))
    axes.set_title("bytes received, forward", fontsize=12, color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlim(0, 1.15 * max(1, *(x.received_bytes_max for x in shown), comparison.bound_bytes))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=9, frameon=False)


def draw_balance(axes: Axes, comparison: Comparison, taken: Combination) -> None:
    """Pairs of the busiest rank over the mean: one bar per layout, as keys that travel do not change who computes."""
    by_layout: dict[str, Combination] = {}
    for x in comparison.combinations:
        by_layout.setdefault(x.layout, x)
    shown = list(by_layout.values())
    colours = [TAKEN if x.layout == taken.layout else MEAN for x in shown]
    axes.barh(range(len(shown)), [x.area for x in shown], 0.5, color=colours)
    axes.axvline(1.0, color=INK, linestyle="--", linewidth=1.2)
    _name_rows(axes, [(x.layout, x.layout == taken.layout) for x in shown])
    for row, x in enumerate(shown):
        _annotate(axes, row, x.area, f"{x.area:.2f}")
    axes.set_title("pairs of the busiest rank, over the mean (1 is balanced)", fontsize=12, color=INK)
    axes.set_xlim(0, 1.15 * max(x.area for x in shown))


def _name_rows(axes: Axes, names: list[tuple[str, bool]]) -> None:
    """Names beside the bars, from the top, that of the recommended one in its colour."""
    axes.set_yticks(range(len(names)), [name for name, _ in names])
    for label, (_, taken) in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(TAKEN if taken else INK)
        label.set_fontweight("bold" if taken else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _annotate(axes: Axes, row: int, value: float, text: str) -> None:
    axes.annotate(text, (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
