"""Random draws that know no layout: a hash of a seed and of global indices.

A generator's stream depends on who draws what in which order. A hash does not: the draw for (batch, head, query,
key) is the same on any rank, in any schedule, forward and backward, and nothing is stored. The hash is the
finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16), applied to one index after the other.
"""

from __future__ import annotations

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 wraps, as the hash wants it
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def kept(seed: int, probability: float, *indices: torch.Tensor) -> torch.Tensor:
    """Whether each element is kept, a boolean of the indices' broadcast shape; dropped with this probability.

    Args:
        seed: from 0 to below 2^63.
        indices: int64 tensors, the widest last.
    """
    bits = torch.full((), seed, dtype=torch.int64, device=indices[-1].device)
    for index in indices:
        bits = _mixed(bits + (index + 1) * _GOLDEN)
    return _shifted(bits, 11) >= round(probability * (1 << 53))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right: PyTorch's repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
