"""The loss of a language model over a sharded batch: each rank's share of one mean over all labels.

A mean over a shard would weigh shards instead of tokens, and have no value on a shard without labels. So each rank sums
its token losses and divides by the labels of the whole batch: the loss is the sum of all shares, and its gradient the
sum of all ranks' gradients, over data, ring and ulysses and over accumulated batches alike.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ringattn.checking import integer, number, shown
from ringattn.errors import InputError, UnsupportedError
from ringattn.training import fused  # noqa: F401 (defines the op)
from ringattn.training.sample import IGNORED

CHUNK = 1 << 24  # logits computed at once: 64 MB in float32


class Labelled(Protocol):
    """What a loss needs of a batch: a `Batch` is one.

    Attributes:
        labels: ``[B, S_local]`` int64, -100 where there is nothing to predict.
        count: labels on all ranks.
    """

    labels: Tensor
    count: int


def token_loss(logits: Tensor, batch: Labelled, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """This rank's share of the mean cross-entropy over all labels of the batch, in float32 (float64 for float64).

    Args:
        logits: ``[B, S_local, V]``.
        batch: whose labels these are, already shifted.
        label_smoothing: weight of the uniform distribution in the target.
        z_loss: weight of the squared log-sum-exp of each token's logits, added to its loss (PaLM, section 5).

    Raises:
        InputError: the logits are not of this batch, or a weight is out of its range.
    """
    _check_tensors({"logits": logits}, batch)
    if logits.dim() != 3 or logits.shape[:2] != batch.labels.shape:
        raise InputError(f"logits must be {[*batch.labels.shape, 'V']}, as the batch; got {list(logits.shape)}.")
    smoothing, z_weight = _weights(label_smoothing, z_loss)
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    labels = batch.labels.flatten().to(logits.device)
    losses = functional.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    if z_weight:
        lse = torch.where(labels != IGNORED, wide.logsumexp(1), 0)  # picking rows would not compile
        losses = losses + z_weight * lse.square().sum()
    return losses / max(batch.count, 1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    batch: Labelled,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
) -> Tensor:
    """`token_loss` of ``hidden @ weight.T``, without ever holding the logits of a shard.

    Logits are computed for some words of the vocabulary at a time, reduced to a log-sum-exp, and computed again in the
    backward pass: a third more products, for a memory of ``chunk`` logits (Cut Cross-Entropy, arXiv:2411.09009).
    Tokens without a label are left out.

    Args:
        hidden: ``[B, S_local, H]``, the last hidden states. Where autocast is on, they, the weight and the bias are
            converted to its dtype, as by a linear layer.
        weight: ``[V, H]``, of the language model's head, whole.
        bias: ``[V]``.
        softcap: logits are ``softcap * tanh(logits / softcap)``; 0 for none.
        chunk: logits held at once.

    Raises:
        InputError: shapes do not fit, or a number is out of its range.
        UnsupportedError: the weight is only a shard of itself (FSDP2, ZeRO-3).
    """
    numbers = [number(softcap, "softcap", least=0), *_weights(label_smoothing, z_loss)]
    integer(chunk, "chunk", least=1)
    _check_tensors({"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias}), batch)
    hidden, weight = _as_linear(hidden), _as_linear(weight)
    bias = None if bias is None else _as_linear(bias)
    _check_shapes(hidden, weight, bias, batch)
    labels = batch.labels.flatten().to(hidden.device)
    losses, _ = torch.ops.ringattn.linear_cross_entropy(hidden.flatten(0, 1), weight, bias, labels, numbers, chunk)
    total: Tensor = losses
    return total / max(batch.count, 1)


def _as_linear(x: Tensor) -> Tensor:
    """In the dtype in which a linear layer would take it."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _weights(label_smoothing: float, z_loss: float) -> tuple[float, float]:
    return number(label_smoothing, "label_smoothing", least=0, most=1), number(z_loss, "z_loss", least=0)


def _check_tensors(tensors: dict[str, Tensor], batch: Labelled) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta:
            raise InputError(f"{name} must be a tensor of floating-point numbers, with data; got {shown(x)}.")
    if not isinstance(getattr(batch, "labels", None), Tensor) or not isinstance(getattr(batch, "count", None), int):
        raise InputError(f"batch must be a ringattn.training.Batch, or have its labels and count; got {shown(batch)}.")


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Labelled) -> None:
    if hasattr(weight, "full_tensor") or (hasattr(weight, "ds_id") and weight.dim() != 2):
        raise UnsupportedError(
            "The weight is a shard of itself: compute the loss inside the wrapped module's forward, where it is whole; "
            "or pass weight.full_tensor() (FSDP2), or gather it (deepspeed.zero.GatheredParameters)."
        )
    if hidden.dim() != 3 or hidden.shape[:2] != batch.labels.shape:
        raise InputError(f"hidden must be {[*batch.labels.shape, 'H']}, as the batch; got {list(hidden.shape)}.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2] or weight.dtype != hidden.dtype:
        raise InputError(
            f"weight must be [V, {hidden.shape[2]}] in {hidden.dtype}, as hidden is; got {list(weight.shape)} in "
            f"{weight.dtype}."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != hidden.device):
        raise InputError(f"bias must be [{len(weight)}], where hidden is; got {list(bias.shape)} on {bias.device}.")
    if weight.device != hidden.device or not len(weight):
        raise InputError(
            f"weight must have words, and be where hidden is; got {list(weight.shape)} on {weight.device}."
        )
