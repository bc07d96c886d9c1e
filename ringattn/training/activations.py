"""Activation checkpointing around attention: its outputs are kept, everything else is recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

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
