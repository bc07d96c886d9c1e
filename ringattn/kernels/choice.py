"""Which kernel computes a problem, and why."""

from __future__ import annotations

import itertools
from typing import Any

from ringattn.errors import InputError, UnsupportedError
from ringattn.kernels.base import Kernel
from ringattn.kernels.chunked import Chunked
from ringattn.kernels.onednn import OneDNN
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.mechanisms.base import Problem

CANDIDATES: tuple[Kernel, ...] = (OneDNN(), Sdpa(), Chunked(), Reference())
"""What ``auto`` chooses from, fastest first; the last can do everything."""


def chosen(kernel: Any, problem: Problem) -> tuple[Kernel, str]:
    """The kernel and the reason. A kernel asked for by name is taken or refused, never replaced.

    Raises:
        UnsupportedError: the kernel asked for cannot do the problem; says what of it.
    """
    named = {str(candidate): candidate for candidate in CANDIDATES}
    if kernel == "auto":
        refusals = [(candidate, candidate.refusal(problem)) for candidate in CANDIDATES if candidate.supports(problem)]
        taken = next(candidate for candidate, refusal in refusals if refusal is None)
        words = "; ".join(itertools.takewhile(bool, (refusal or "" for _, refusal in refusals)))
        return taken, f"auto fell to it: {words}" if words else "auto took the fastest kernel for this mechanism"
    asked = named.get(kernel) if isinstance(kernel, str) else kernel
    if not isinstance(asked, Kernel):
        raise InputError(f"kernel must be a Kernel or one of {['auto', *named]}; got {kernel!r}.")
    refusal = asked.refusal(problem)
    if refusal is not None:
        raise UnsupportedError(f"{refusal}. Use kernel='reference', or 'auto', which takes what can do it.")
    return asked, "as asked"
