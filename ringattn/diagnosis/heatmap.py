"""The heat-map of an examination: latency and bandwidth of every pair of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ringattn.diagnosis.examination import Examination
from ringattn.errors import MissingDependencyError
from ringattn.readable import readable_bytes, readable_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUMBERED = 12  # ranks up to which each cell has its number


def draw(found: Examination, path: Path) -> None:
    """Writes it as a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("A heat-map needs matplotlib: pip install 'ringattn[plot]'") from error
    figure = Figure(figsize=(12, 5.2), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    _show(left, found.latency, "latency, one way", "viridis")
    _show(right, found.bandwidth, "bandwidth each way, per second", "viridis_r")
    hosts = len({each.host for each in found.facts})
    figure.suptitle(f"{found.size} ranks on {hosts} host{'s' * (hosts != 1)} over {found.transport}")
    figure.savefig(path)


def _show(axes: Axes, table: tuple[tuple[float, ...], ...], title: str, colours: str) -> None:
    """Dark is good in both: colours go by the logarithm."""
    values = np.array(table)
    shown = np.where(values > 0, np.log10(np.maximum(values, 1e-12)), np.nan)
    known = shown[values > 0]
    middle = float(np.median(known)) if known.size else 0.0
    reach = max([0.5, *abs(known - middle)])  # what is alike is of one colour
    axes.imshow(shown, cmap=colours, vmin=middle - reach, vmax=middle + reach)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("rank")
    axes.set_ylabel("rank")
    ticks = range(0, len(table), max(1, len(table) // 16))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    if len(table) > NUMBERED:
        return
    words = readable_seconds if "latency" in title else readable_bytes
    for row, column in np.argwhere(values > 0):
        text = words(values[row, column])
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
        axes.text(column, row, text, ha="center", va="center", fontsize=7, bbox=box)
