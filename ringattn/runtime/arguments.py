"""Arguments of calls, checked before anything else: tensors, a rank's part of them, and the results asked for."""

from __future__ import annotations

import torch

from ringattn.checking import DTYPES, shown
from ringattn.errors import InputError, UnsupportedError
from ringattn.mechanisms.base import Mechanism
from ringattn.sharding import Sharding


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: str) -> None:
    """Raises InputError where the tensors do not fit together. ``call`` shows them."""
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise InputError(f"attention takes [batch, heads, tokens, dim]; got {call}.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        said = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise InputError(f"q, k and v must have one dtype and device; got {said}.")
    if q.dtype not in DTYPES:
        raise InputError(f"attention computes float64, float32, bfloat16 and float16; got {q.dtype}.")
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or k.shape[3] != dim:
        raise InputError(f"q, k, v must be [B, Hq, S, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv]; got {call}.")
    if not min(batch, heads, k.shape[1], dim, v.shape[3]):
        raise InputError(f"The batch, the heads and their dims must not be empty; got {call}.")
    if heads % k.shape[1]:
        raise InputError(f"Query heads must be a multiple of key heads; got {heads} and {k.shape[1]}.")


def check_part(x: torch.Tensor, owner: Sharding, what: str, call: str) -> None:
    """Raises InputError where these are not as many tokens as this rank holds. ``call`` shows all of them."""
    if x.shape[2] != owner.count:
        raise InputError(
            f"Rank {owner.mesh.sequence_rank} holds {owner.count} of the {owner.length} {what}; got {call}. "
            f"Pass this rank's part, as sharding.split(x, dim=2) gives it."
        )


def check_extras(mechanism: Mechanism, extras: object) -> None:
    """Raises an error where these are no names, or not of results that the mechanism has."""
    if not isinstance(extras, (tuple, list)) or not all(isinstance(x, str) for x in extras):
        raise InputError(f"extras are a tuple of names, such as ('lse',); got {shown(extras)}.")
    for name in extras:
        if name not in mechanism.extras:
            has = ", ".join(mechanism.extras) or "none"
            raise UnsupportedError(f"{mechanism} has no extra {name!r} to return; it has {has}.")


def is_dense(x: object) -> bool:
    """Whether it is a tensor that kernels can read."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested
