"""Random draws that know no layout: a hash of a seed and of global indices. For dropout, and to sample.

A generator's stream depends on who draws what in which order. A hash does not: the draw for (batch, head, query,
key) is the same on any rank, in any schedule, forward and backward, and nothing is stored. The hash is the
finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16), applied to one index after the other.
"""

from __future__ import annotations

import numbers

import torch

from ringattn.checking import shown
from ringattn.errors import InputError
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.blocks import Block

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 wraps, as the hash wants it
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_OTHER = 0x5851F42D4C957F2D  # the seeds of a stream beside that of dropout
_SECOND = 0x94D049BB133111EB - (1 << 64)


def seed_of(value: int | None, name: str) -> int | None:
    """A seed from 0 to below 2^63, or None for one that is drawn; else an InputError that names it."""
    if value is None:
        return None
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise InputError(f"{name} is a number from 0 to below 2^63; got {shown(value)}.")
    # compiled code holds one as a symbol, and another seed is no other graph
    return value if type(value) is int else int(value)


def fresh(seed: int | None) -> int | torch.Tensor:
    """This seed or, for None, one of PyTorch's default CPU generator, as `Mechanism.new_seed` gives it."""
    return torch.randint(1 << 62, (), device="cpu") if seed is None else seed


def indices(problem: Problem, block: Block) -> tuple[torch.Tensor, ...]:
    """Batch, query heads, and global positions of queries and keys, which broadcast to ``[B, Hq, M, N]``."""
    device = problem.device
    return (
        torch.arange(problem.batch, device=device)[:, None, None, None],
        (torch.arange(problem.heads, device=device) + problem.first_head)[:, None, None],
        block.q_positions(device)[:, None],
        block.k_positions(device),
    )


def kept(seed: int, probability: float, *indices: torch.Tensor) -> torch.Tensor:
    """Whether each element is kept, a boolean of the indices' broadcast shape; dropped with this probability.

    Args:
        seed: from 0 to below 2^63.
        indices: int64 tensors, the widest last.
    """
    return _shifted(_bits(seed, *indices), 11) >= round(probability * (1 << 53))


def uniform(seed: int, *indices: torch.Tensor) -> torch.Tensor:
    """A number between 0 and 1, neither of both, for each element, in float64.

    Args:
        seed, indices: as for `kept`, of whose draws these are independent.
    """
    return (_shifted(_bits(seed ^ _OTHER, *indices), 12).double() + 0.5) * 2.0**-52


def _bits(seed: int, *indices: torch.Tensor) -> torch.Tensor:
    """64 random bits, of the indices' broadcast shape."""
    bits = torch.full((), seed, dtype=torch.int64, device=indices[-1].device)
    for index in indices:
        bits = _mixed(bits + (index + 1) * _GOLDEN)
    return bits


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right: PyTorch's repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
