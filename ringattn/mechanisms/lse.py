"""Log-sum-exps, which are -inf where no key is, and the averages that they weigh."""

from __future__ import annotations

import math

import torch

from ringattn.mechanisms.base import State


def without_infinity(lse: torch.Tensor) -> torch.Tensor:
    """Lse with 0 for -inf: the scores it is taken from are all -inf, and exp(-inf - 0) is the 0 wanted."""
    return torch.where(lse == -math.inf, 0.0, lse)


def average(into: State, part: State) -> None:
    """Merges a log-sum-exp ``[...]`` and what its weights average, ``[...]`` or ``[..., Dv]``, in place."""
    (lse, mean), (part_lse, part_mean) = into, part
    # -inf - -inf, where neither side has a key, is nan: such a row keeps its zeros.
    weight = torch.sigmoid(torch.nan_to_num_(part_lse - lse, nan=-math.inf, posinf=math.inf, neginf=-math.inf))
    weight = weight.unsqueeze(-1) if mean.dim() > lse.dim() else weight
    mean.lerp_(part_mean.to(mean.dtype), weight.to(mean.dtype))
    torch.logaddexp(lse, part_lse, out=lse)
