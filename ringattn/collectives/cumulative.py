"""Cumulative sums in the order of global positions, however the sequence is dealt."""

from __future__ import annotations

import torch

from ringattn.checking import DTYPES, shown
from ringattn.errors import InputError
from ringattn.functional import running_sum
from ringattn.runtime import agreement
from ringattn.sharding import Sharding


def cumsum(x: torch.Tensor, sharding: Sharding, dim: int) -> torch.Tensor:
    """The inclusive cumulative sum of a sharded tensor, in the order of global positions. Every rank calls it.

    It is attention under ``Causal()`` by an unnormalised sum: where keys need not travel (contiguous, zigzag and
    balanced layouts), ranks exchange one sum for each run of positions, of as many numbers as ``x`` has at one.

    Args:
        x: this rank's part, in the order of ``sharding.positions`` along ``dim``: float64, float32, bfloat16, float16.
        sharding: who holds which positions.
        dim: the dimension that is sharded.

    Returns:
        The same shape and dtype, summed in float32 (float64 for float64). Differentiable.

    Raises:
        InputError: x is not this rank's part of a tensor that can be summed, or has no such dimension.
        AgreementError: the ranks called with different arguments; raised on all of them.
    """
    if not isinstance(sharding, Sharding):
        raise InputError(f"cumsum needs a ringattn.Sharding; got {shown(sharding)}.")
    wrong = _wrong(x, sharding, dim)
    if wrong:
        error = InputError(wrong)
        if sharding.mesh.transport is not None:
            agreement.refuse(sharding.mesh.transport, error)
        raise error
    first = x.movedim(dim, 0)
    if 0 in first.shape[1:]:
        return x * 1  # nothing to sum at any position
    return running_sum(first.unsqueeze(-1).flatten(1)[None, None], sharding)[0, 0].reshape(first.shape).movedim(0, dim)


def _wrong(x: object, sharding: Sharding, dim: object) -> str | None:
    """What is wrong with the arguments, in words."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.is_nested:
        return f"cumsum sums a dense tensor; got {shown(x)}."
    if x.dtype not in DTYPES:
        return f"cumsum sums float64, float32, bfloat16 and float16; got {x.dtype}."
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        return f"dim must be a dimension of x, whose shape is {list(x.shape)}; got {shown(dim)}."
    if not torch.compiler.is_compiling() and x.shape[dim] != sharding.count:  # compiled code asks when it runs
        return (
            f"Rank {sharding.mesh.sequence_rank} holds {sharding.count} of the {sharding.length} positions; got x "
            f"{list(x.shape)} with dim={dim}. Pass this rank's part, as sharding.split(x, dim) gives it."
        )
    return None
