"""Less memory for activations: checkpointing that runs no attention twice, and modules computed in tiles of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringattn.checking import instance, integer

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def save_attention() -> Callable[[], Contexts]:
    """The ``context_fn`` of `torch.utils.checkpoint.checkpoint` with which no attention runs twice.

    Plain checkpointing runs a block's forward pass again in the backward pass, and with it the whole ring. With this
    the outputs of attention are kept, ``[B, Hq, S_local, Dv]`` and a log-sum-exp per call, and the rest of the block
    is recomputed. In eager mode and inside torch.compile alike.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> block, x = torch.nn.Linear(4, 4), torch.ones(2, 4)  # a block of the model, with attention in it
        >>> y = checkpoint(block, x, use_reentrant=False, context_fn=save_attention())
    """
    return functools.partial(create_selective_checkpoint_contexts, _policy)


def _policy(_ctx: Any, op: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    # A call is numbered and compared with the other ranks' when it is prepared: that too happens once.
    kept = (torch.ops.ringattn.attention.default, torch.ops.ringattn.prepare.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


TILE = 1024  # tokens


def tiled(module: nn.Module, tokens: int = TILE) -> nn.Module:
    """The module itself, which from now on computes a tile of tokens at a time and keeps only its input for backward.

    For modules that treat every token alike, as MLPs do: a long shard's activations within it, such as ``[B, S_local,
    4 * width]``, exist for one tile at a time, in the backward pass too, where each tile is computed again. Parameters
    keep their names.

    Args:
        module: takes one tensor ``[B, S_local, width]``, or ``[tokens, width]``, and returns one of as many tokens.
        tokens: of a tile, at most.

    Example:
        >>> mlp = tiled(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)), tokens=3)
        >>> mlp(torch.ones(2, 10, 4)).shape
        torch.Size([2, 10, 4])
    """
    kind = type(instance(module, nn.Module, "module", "a torch module that treats every token alike"))
    size = integer(tokens, "tokens, of a tile,", least=1)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        whole = functools.partial(kind.forward, self)
        if x.shape[-2] <= size:
            return checkpoint(whole, x, use_reentrant=False)  # type: ignore[no-any-return]
        return torch.cat([checkpoint(whole, tile, use_reentrant=False) for tile in x.split(size, dim=-2)], dim=-2)

    module.__class__ = type(f"Tiled{kind.__name__}", (kind,), {"forward": forward})
    return module
