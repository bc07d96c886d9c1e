"""Pictures of mechanisms: the attention matrix of each, of one small input, as `attention_rows` gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ringattn.advice.repertoire import Sizes, Specimen, mask_for, sharded, specimens
from ringattn.collectives.chosen_rows import attention_rows
from ringattn.errors import MissingDependencyError
from ringattn.mechanisms.ordered import Ordered
from ringattn.mesh import Mesh
from ringattn.sharding import Sharding
from ringattn.simulator import simulate

SMALL = Sizes(length=24, heads=1, kv_heads=1, dim=8, value_dim=8, ring=3)
COLUMNS = 5


def draw_gallery(path: Path) -> None:
    """Draws all mechanisms into a PNG file: queries down, keys across; each is computed on three virtual ranks."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Drawing needs matplotlib; install ringattn[plot].") from error
    shown = [(specimen.title, matrix(specimen)) for specimen in specimens()]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, (title, weights) in zip(grid, shown, strict=False):
        signed = bool((weights < 0).any())
        most = float(np.abs(weights).max()) or 1.0
        axes.imshow(weights, cmap="RdBu_r" if signed else "Blues", vmin=-most if signed else 0, vmax=most)
        axes.set(xticks=(), yticks=())
        axes.set_title(title, fontsize=9, family="monospace")
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("keys", fontsize=9)
    figure.supylabel("queries", fontsize=9)
    figure.savefig(path, dpi=90)


def matrix(specimen: Specimen) -> NDArray[np.float64]:
    """The attention matrix ``[queries, keys]`` of the small input, where near tokens resemble each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for mechanisms that draw
        found: torch.Tensor = simulate(_matrix, specimen, ring=SMALL.ring).results[0]
    return found[0, 0].double().numpy()


def _matrix(mesh: Mesh, specimen: Specimen) -> torch.Tensor:
    mechanism = specimen.made(SMALL)
    mask, layout = mask_for(mechanism), "contiguous" if isinstance(mechanism, Ordered) else "zigzag"
    sharding = Sharding(SMALL.length, mesh, layout)
    q, k = (sharding.split(x, 2) for x in tokens())
    rows = attention_rows(q, k, mask, range(SMALL.length), sharding=sharding, mechanism=sharded(mechanism, sharding))
    return sharding.join(rows, 3)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys ``[1, 1, 24, 8]`` that walk around slowly."""
    g = torch.Generator().manual_seed(3)
    steps = torch.randn(2, SMALL.length, SMALL.dim, generator=g)
    shared = torch.randn(SMALL.length, SMALL.dim, generator=g).cumsum(dim=0)
    q, k = (shared / shared.std() + 0.3 * x for x in steps)
    return 2 * q[None, None], k[None, None]
