"""Attention blocks of images that put several kinds together; each is torch over `halo` and one `reduce`.

Shapes: x ``[B, C, S_local]``, this rank's rows of pixels.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ringattn.modules.channel import SqueezeExcitation, mean_over_positions
from ringattn.modules.deformable import DeformableConvolution
from ringattn.modules.images import Convolution, Rows


class HybridAttention(torch.nn.Module):
    """Spatial, channel and aligned attention (HAR-Net, Li et al., arXiv 1904.11141, section 3).

    Spatial attention is a stack of dilated convolutions that ends in a gate a pixel, channel attention
    squeeze-and-excitation, aligned attention a deformable convolution of what the two gates let through:

        y = aligned(x sigmoid(spatial(x)) sigmoid(channel(x)))

    Args:
        channels: C.
        dilations: of the stacked convolutions.
        bound: of the offsets, in pixels.
    """

    def __init__(self, channels: int, dilations: tuple[int, ...] = (1, 2, 4), bound: float = 2.0) -> None:
        super().__init__()
        self.spatial = torch.nn.ModuleList(Convolution((channels, channels), 3, dilation) for dilation in dilations)
        self.score = Convolution((channels, 1), 1)
        self.channel = SqueezeExcitation(channels)
        self.aligned = DeformableConvolution((channels, channels), 3, bound)

    def gate(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The weight of each pixel, ``[B, 1, S_local]``."""
        y = x
        for convolution in self.spatial:
            y = torch.relu(convolution(y, rows))
        return torch.sigmoid(self.score(y, rows))

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``[B, C, S_local]``."""
        gated = x * self.gate(x, rows) * self.channel.gate(x, rows.sharding)
        return self.aligned(gated, rows)  # type: ignore[no-any-return]


class AttentionInAttention(torch.nn.Module):
    """Attention that decides how much attention a block takes (A2N, Chen et al., arXiv 2104.09497, equations 3 to 7):

        y = W x        p = softmax(MLP(mean(y)) / T)
        out = V leaky_relu(p_0 attention(y) + p_1 conv(y)) + x        attention(y) = conv(conv(y) sigmoid(U y))

    with U, V, W of each pixel, and p of the whole image.

    Args:
        channels: C.
        temperature: T, which falls from 30 to 1 in the paper's training.
    """

    def __init__(self, channels: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        both = channels, channels
        self.enter, self.leave, self.look = (Convolution(both, 1) for _ in range(3))
        self.seen, self.attended, self.plain = (Convolution(both, 3) for _ in range(3))
        middle = max(channels // 4, 1)
        self.decide = torch.nn.Sequential(
            torch.nn.Linear(channels, middle), torch.nn.ReLU(), torch.nn.Linear(middle, 2)
        )

    def shares(self, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        """How much of the branch with attention and of the one without is taken, ``[B, 2]``."""
        return torch.softmax(self.decide(mean_over_positions(y, rows.sharding)) / self.temperature, dim=1)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """``[B, C, S_local]``."""
        y = self.enter(x, rows)
        attention = self.attended(self.seen(y, rows) * torch.sigmoid(self.look(y, rows)), rows)
        with_attention, without = self.shares(y, rows).unsqueeze(2).unsqueeze(3).unbind(1)
        mixed = with_attention * attention + without * self.plain(y, rows)
        return self.leave(functional.leaky_relu(mixed, 0.2), rows) + x  # type: ignore[no-any-return]
