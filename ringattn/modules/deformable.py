"""Deformable convolution with bounded offsets (Dai et al., arXiv 1703.06211, equations 2 to 4), over a sharded image.

Tap n of a kernel does not look at its place p_n but at p_n + dp_n, an offset that a convolution of the input finds for
each pixel; between pixels the image is interpolated bilinearly, outside it is 0. Offsets are at most a bound, ``bound
tanh(.)``, so that no rank needs rows further away than the kernel's reach and the bound.
"""

from __future__ import annotations

import math

import torch

from ringattn.errors import InputError
from ringattn.modules.images import Convolution, Rows


class DeformableConvolution(torch.nn.Module):
    """A convolution whose taps move.

    Args:
        channels: in and out.
        kernel: its side, odd.
        bound: the largest offset in pixels, in either direction.
    """

    def __init__(self, channels: tuple[int, int], kernel: int = 3, bound: float = 2.0) -> None:
        super().__init__()
        if not bound > 0 or not math.isfinite(bound):
            raise InputError(f"A deformable convolution's bound is a number of pixels above 0; got {bound}.")
        self.kernel, self.bound = kernel, bound
        self.offsets = Convolution((channels[0], 2 * kernel * kernel), kernel)
        for parameter in self.offsets.parameters():
            torch.nn.init.zeros_(parameter)
        self.taps = Convolution(channels, kernel)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``[B, C_in, S_local]`` to ``[B, C_out, S_local]``."""
        reach = self.kernel // 2 + math.ceil(self.bound)
        offsets = self.bound * torch.tanh(self.offsets(x, rows))
        found = []
        for part, moved in zip(rows.neighbourhoods(x, reach), rows.parts(offsets), strict=True):
            found.append(self._convolved(part, moved, reach))
        return rows.joined(found)

    def _convolved(self, image: torch.Tensor, offsets: torch.Tensor, reach: int) -> torch.Tensor:
        """One run: an image with ``reach`` further rows above and below; offsets ``[B, 2 K K, rows, W]``."""
        height, width = offsets.shape[2:]
        down, right = offsets.unflatten(1, (2, -1)).unbind(1)  # of each tap
        middle, device = self.kernel // 2, image.device
        taps = torch.arange(-middle, middle + 1, device=device, dtype=offsets.dtype)
        y = torch.arange(height, device=device)[:, None] + taps.repeat_interleave(self.kernel)[:, None, None] + reach
        x = torch.arange(width, device=device) + taps.repeat(self.kernel)[:, None, None]
        sampled = _interpolated(image, y + down, x + right)
        weight, bias = self.taps.weight.flatten(2), self.taps.bias
        return torch.einsum("bcnhw,ocn->bohw", sampled, weight) + bias[:, None, None]


def _interpolated(image: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[B, C, taps, rows, W]`` of an image ``[B, C, H, W]`` at places ``[B, taps, rows, W]``; 0 outside of it."""
    height, width = image.shape[2:]
    top, left = y.floor(), x.floor()
    total = image.new_zeros(*image.shape[:2], *y.shape[1:])
    for row, near_row in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, near_column in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().flatten(1)
            pixels = image.flatten(2).gather(2, at.unsqueeze(1).expand(-1, image.shape[1], -1))
            total = total + pixels.unflatten(2, y.shape[1:]) * (near_row * near_column * inside).unsqueeze(1)
    return total
