"""Images whose pixels are sharded row by row, and convolutions over them: neighbours come by `halo`.

An image of H rows of W pixels is a sequence of H W positions. Every run of positions that a rank holds must be whole
rows: a contiguous or zigzag layout of a number of rows that the ranks divide, or an explicit one.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from torch.nn import functional

from ringattn.checking import integer
from ringattn.collectives.neighbours import halo
from ringattn.errors import InputError
from ringattn.layouts.base import COUNT, RANK, START, STRIDE, make_runs
from ringattn.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a sharded image.

    Attributes:
        sharding: who holds which pixels.
        width: pixels in a row, W.
    """

    sharding: Sharding
    width: int

    def __post_init__(self) -> None:
        """Raises InputError, on every rank, where a run of pixels on any of them is no whole rows."""
        integer(self.width, "An image's width", least=1)
        spans = self.sharding.spans
        runs = make_runs(np.stack([spans[:, RANK], spans[:, START], spans[:, START] + spans[:, COUNT]], axis=1))
        apart = self.width > 1 and ((spans[:, STRIDE] > 1) & (spans[:, COUNT] > 1)).any()
        if apart or (runs[:, [START, COUNT]] % self.width).any():
            raise InputError(
                f"Every run of pixels that a rank holds must be whole rows of {self.width}; got {self.sharding.layout} "
                f"of {self.sharding.length} pixels over {self.sharding.mesh.sequence_size} ranks. Take as many rows as "
                f"the ranks divide and a contiguous layout, or ringattn.Explicit."
            )

    @property
    def runs(self) -> tuple[int, ...]:
        """How many pixels each run of positions on this rank has."""
        positions = self.sharding.positions
        cuts = (positions.diff() != 1).nonzero().flatten() + 1
        edges = [0, *cuts.tolist(), len(positions)]
        return tuple(stop - start for start, stop in itertools.pairwise(edges) if start < stop)

    def neighbourhoods(self, x: torch.Tensor, reach: int) -> list[torch.Tensor]:
        """Each run of ``[B, C, S_local]`` with ``reach`` rows above and below it, ``[B, C, rows + 2 reach, W]``.

        Rows outside of the image are 0.
        """
        extended = halo(x, self.sharding, 2, reach * self.width, reach * self.width)
        return self._apart(extended, reach)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The runs of ``[B, C, S_local]``, ``[B, C, rows, W]`` each."""
        return self._apart(x, 0)

    def _apart(self, x: torch.Tensor, reach: int) -> list[torch.Tensor]:
        """Runs with so many further rows above and below. A rank without pixels works on a row of zeros.

        What comes of that row is left out in the end, and leads back to x: all ranks take part in the backward pass.
        """
        further = 2 * reach * self.width
        counts = [count + further for count in self.runs]
        if not counts:
            counts = [self.width + further]
            x = functional.pad(x, (0, counts[0]))
        return [part.unflatten(2, (-1, self.width)) for part in x.split(counts, dim=2)]

    def joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Runs ``[B, C, rows, W]`` as one tensor ``[B, C, S_local]``."""
        return torch.cat([part.flatten(2) for part in parts], dim=2)[:, :, : self.sharding.count]

    def convolve(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int = 1
    ) -> torch.Tensor:
        """The convolution of the whole image with zeros around it, ``[B, C_out, S_local]``.

        Args:
            x: ``[B, C_in, S_local]``.
            weight: ``[C_out, C_in, K, K]``, K odd.
            dilation: pixels from one tap to the next.
        """
        reach = weight.shape[2] // 2 * dilation
        found = [
            functional.conv2d(part, weight, bias, padding=(0, reach), dilation=dilation)
            for part in self.neighbourhoods(x, reach)
        ]
        return self.joined(found)


class Convolution(torch.nn.Module):
    """A convolution of a sharded image, with weights as `torch.nn.Conv2d` draws them.

    Args:
        channels: in and out.
        kernel: its side, odd.
        dilation: pixels from one tap to the next.
    """

    def __init__(self, channels: tuple[int, int], kernel: int, dilation: int = 1) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise InputError(f"A convolution's kernel has an odd side, so that it has a middle; got {kernel}.")
        drawn = torch.nn.Conv2d(*channels, kernel)
        assert drawn.bias is not None  # which it has unless it is told otherwise
        self.weight, self.bias, self.dilation = drawn.weight, drawn.bias, dilation

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``[B, C_in, S_local]`` to ``[B, C_out, S_local]``."""
        return rows.convolve(x, self.weight, self.bias, self.dilation)
