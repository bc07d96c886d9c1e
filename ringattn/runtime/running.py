"""What a pass runs in: without autograd and autocast, and heard of where it fails."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from ringattn.errors import AgreementError, TransportError
from ringattn.transports.base import Transport


def running(transport: Transport, what: str, device: str) -> contextlib.ExitStack:
    """One pass, whose exceptions the ranks that wait for this one hear of.

    Without autograd, which is ours, and without autocast: what is computed in float32 is so on purpose.

    And without the caller's default device: every tensor says where it is.
    """
    transport.doing = what
    stack = contextlib.ExitStack()
    stack.push(functools.partial(_abandon, transport))
    if torch._C._len_torch_function_stack():
        stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(torch._C._AutoDispatchBelowADInplaceOrView())
    if torch.is_autocast_enabled(device):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _abandon(transport: Transport, _: Any, error: BaseException | None, __: Any) -> None:
    """What all ranks have raised together, nobody needs to be told."""
    if error is not None and not isinstance(error, (AgreementError, TransportError)):
        transport.abandon(error)
