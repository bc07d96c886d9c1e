"""Transforms of PyTorch that would compute something else without a word, or fail somewhere inside: refused by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad

from ringattn.errors import UnsupportedError

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Compiled code breaks its graph to call the function, and looks at nothing that it does.

    As ``torch.compiler.disable`` would have it, which takes two seconds to import.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    skip = eval_frame._FrameAction.SKIP
    # neither this frame nor those below it are looked at, where the caller's graph was broken to call it
    eval_frame.set_code_exec_strategy(outside.__code__, eval_frame._FrameExecStrategy(skip, skip))  # type: ignore[attr-defined]
    name = f"ringattn.{function.__name__}"
    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside._torchdynamo_disable_msg = f"{name} talks to other ranks, and is called between graphs"  # type: ignore[attr-defined]
    return outside


def refuse_export(what: str) -> None:
    """Raises UnsupportedError inside torch.export."""
    if torch.compiler.is_exporting():
        raise UnsupportedError(
            f"{what} cannot be exported: a program holds no plan, and would be run by other ranks than it was made on. "
            f"Use torch.compile, or export the parts of the model between the calls."
        )


def refuse_transforms(what: str, *tensors: torch.Tensor) -> None:
    """Raises UnsupportedError inside torch.func's transforms and forward-mode differentiation.

    Ranks differentiate by exchanging gradients in the backward pass; forward mode and batching have no exchange of
    their own.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            f"{what} cannot be called inside torch.func.grad, vjp, jvp, vmap or jacrev. Use torch.autograd.grad or "
            f"backward() for gradients, and the batch dimension in place of vmap."
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedError(
            f"{what} has no forward-mode derivative. Use torch.autograd.grad or backward(), which are exact."
        )


def outside_transforms() -> contextlib.AbstractContextManager[object]:
    """Tensors made within are plain ones, whatever torch.func is doing around it."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    cleared: contextlib.AbstractContextManager[object] = temporarily_clear_interpreter_stack()
    return cleared


class Once(torch.autograd.Function):
    """Gradients that can be used and not differentiated again: a second backward pass is refused by name."""

    @staticmethod
    def forward(what: str, inputs: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors behind the first ``inputs``, which are what they were computed from."""
        return tuple(x.view_as(x) for x in tensors[inputs:])

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[object, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.what = inputs[0]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise UnsupportedError(
            f"{ctx.what} has no second derivative. Differentiate once, without create_graph=True, or keep "  # type: ignore[attr-defined]
            f"what is differentiated twice (a gradient penalty, say) away from it."
        )
