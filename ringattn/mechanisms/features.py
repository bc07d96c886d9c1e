"""Feature maps phi of linear attention, each with the way back of gradients.

``elu``     phi(x) = elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236, equation 7)
``taylor``  phi(x) = (1, x / |x|), so that phi(q) . phi(k) is the first-order Taylor series of exp(q . k) for vectors of
            length 1 (Linear Attention Mechanism, arXiv 2007.14902, equations 13 to 17); 0 is its own direction
``given``   phi(x) = x: features that were computed before
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch


class FeatureMap(ABC):
    """Features of queries and keys ``[..., D]``: ``[..., size(D)]``."""

    def size(self, dim: int) -> int:
        """Features of this many dims."""
        return dim

    @abstractmethod
    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The features."""

    @abstractmethod
    def back(self, x: torch.Tensor, dfeatures: torch.Tensor) -> torch.Tensor:
        """The gradient of x from that of its features."""


class Elu(FeatureMap):
    """``elu(x) + 1``, written so that exp(x) keeps its digits far below 0."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(max=0).exp_().add_(x.clamp(min=0))

    def back(self, x: torch.Tensor, dfeatures: torch.Tensor) -> torch.Tensor:
        return dfeatures * x.clamp(max=0).exp_()


class Taylor(FeatureMap):
    """One, and the direction."""

    def size(self, dim: int) -> int:
        return dim + 1

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(x[..., :1]), x / _length(x)], dim=-1)

    def back(self, x: torch.Tensor, dfeatures: torch.Tensor) -> torch.Tensor:
        length, slope = _length(x), dfeatures[..., 1:]
        direction = x / length
        return (slope - direction * (direction * slope).sum(dim=-1, keepdim=True)) / length


class Given(FeatureMap):
    """What is given."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def back(self, x: torch.Tensor, dfeatures: torch.Tensor) -> torch.Tensor:
        return dfeatures


def _length(x: torch.Tensor) -> torch.Tensor:
    """Euclidean, ``[..., 1]``; infinite for 0, which has no direction, and none to move in."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length == 0, torch.inf, length)


MAPS: Mapping[str, FeatureMap] = {"elu": Elu(), "taylor": Taylor(), "given": Given()}
"""By the names that `Linear` knows them by."""
