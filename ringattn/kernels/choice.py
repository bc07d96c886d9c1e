"""Which kernel computes a problem, and why."""

from __future__ import annotations

from typing import Any

from ringattn.errors import InputError, UnsupportedError
from ringattn.kernels.base import Kernel
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.mechanisms.base import Problem


def chosen(kernel: Any, problem: Problem) -> tuple[Kernel, str]:
    """The kernel and the reason. A kernel asked for by name is taken or refused, never replaced.

    Raises:
        UnsupportedError: the kernel asked for cannot do the problem; says what of it.
    """
    match kernel:
        case "auto":
            refusal = Sdpa().refuses(problem)
            if refusal is None:
                return Sdpa(), "auto took sdpa: PyTorch's flash kernels can do it"
            return Reference(), f"auto took the reference kernel: {refusal}"
        case "sdpa":
            asked: Kernel = Sdpa()
        case "reference":
            asked = Reference()
        case Kernel():
            asked = kernel
        case _:
            raise InputError(f"kernel must be a Kernel or one of 'auto', 'reference', 'sdpa'; got {kernel!r}.")
    refusal = asked.refuses(problem)
    if refusal is not None:
        raise UnsupportedError(f"{refusal}. Use kernel='reference', or 'auto', which takes what can do it.")
    return asked, "as asked"
