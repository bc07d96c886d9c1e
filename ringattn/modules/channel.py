"""Attention over channels: what of a whole sequence or image weighs each channel; one sum over the ranks.

Shapes: x ``[B, C, S_local]``, this rank's positions.
"""

from __future__ import annotations

import torch

from ringattn.collectives.reduction import reduce
from ringattn.sharding import Sharding


def mean_over_positions(x: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """The mean over all positions of the sequence, ``[B, C]``, the same on every rank."""
    return reduce(x.sum(dim=2), sharding.mesh, "sum") / sharding.length


class SqueezeExcitation(torch.nn.Module):
    """Squeeze-and-excitation (Hu et al., arXiv 1709.01507, equations 2 to 4): ``x_c sigmoid(W2 relu(W1 mean(x)))_c``.

    Args:
        channels: C.
        reduction: by which the middle layer is smaller.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        middle = max(channels // reduction, 1)
        self.squeeze = torch.nn.Linear(channels, middle)
        self.excite = torch.nn.Linear(middle, channels)

    def gate(self, x: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        """The weight of each channel, ``[B, C, 1]``."""
        mean = mean_over_positions(x, sharding)
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(mean)))).unsqueeze(2)

    def forward(self, x: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        """``[B, C, S_local]``."""
        return x * self.gate(x, sharding)


class ChannelAttention(torch.nn.Module):
    """Channels that attend to each other over all positions (DANet, arXiv 1809.02983, equations 3 and 4):

        A = softmax(scale X X^T)        y = beta A X + X        X ``[C, S]``, of all ranks' positions

    Args:
        scale: of the products; 1 as in the paper, where they grow with the number of positions.

    Attributes:
        beta: learned, 0 at first.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.beta = torch.nn.Parameter(torch.zeros(()))

    def weights(self, x: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        """What channel j weighs in channel i, ``[B, C, C]``."""
        products = reduce(x @ x.transpose(1, 2), sharding.mesh, "sum")
        return torch.softmax(self.scale * products, dim=2)

    def forward(self, x: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        """``[B, C, S_local]``."""
        return self.beta * (self.weights(x, sharding) @ x) + x
