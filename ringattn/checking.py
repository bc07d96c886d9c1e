"""One way to check arguments: each check returns the value as the type it is used as, or raises an `InputError`.

A public function checks what it is given with these, once and before it does anything; what it calls may then trust it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ringattn.errors import InputError, RingAttentionError
from ringattn.readable import dtype_name

T = TypeVar("T")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What attention is computed for."""
MAX_TOKENS = 1 << 40
"""Lengths and positions stay below it, so that sums of a few fit into int64."""

MAX_RANKS = 1 << 20
"""Ranks of a mesh, at most."""


def shown(value: object, most: int = 80) -> str:
    """The value as an error shows it: the beginning of its text, where that is long.

    >>> shown("causal"), shown([0] * 1000, 9)
    ("'causal'", '[0, 0, 0,… (3000 characters)')
    """
    try:
        text = repr(value)
    except Exception as error:
        return f"a {type(value).__name__} whose text failed ({type(error).__name__})"
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def instance(value: object, kind: type[T], name: str, needed: str) -> T:
    """The value, if it is of this class; ``needed`` says what is, as in ``a ringattn mask, such as Causal()``."""
    if isinstance(value, kind):
        return value
    raise InputError(f"{name} must be {needed}; got {shown(value)}.")


def integer(value: object, name: str, *, least: int = 0, below: int = MAX_TOKENS, needed: str = "an integer") -> int:
    """The value as an int in ``[least, below)``; booleans and floats are no integers, NumPy's are."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value < below:
        return int(value)
    limits = f"below {_power(below)} and at least {least}" if least else f"from 0 to below {_power(below)}"
    raise InputError(f"{name} is {needed}, {limits}; got {shown(value)}.")


def tokens(value: object, name: str, *, least: int = 0) -> int:
    """A number of tokens as an int."""
    return integer(value, name, least=least, needed="a number of tokens")


def number(
    value: object,
    name: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    unit: str = "",
) -> float:
    """A finite number, ``least`` or more, above ``above`` and up to ``most``, as a float."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        found = float(value)
        if above < found <= most and found >= least:
            return found
    limit = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
    upto = f" and at most {most:g}" if most < math.inf else ""
    raise InputError(f"{name} must be a finite number{f' of {unit}' if unit else ''}{limit}{upto}; got {shown(value)}.")


def flag(value: object, name: str) -> bool:
    """True or False, and nothing that is merely true or false when asked."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InputError(f"{name} must be True or False; got {shown(value)}.")


def choice(value: object, name: str, options: Sequence[str]) -> str:
    """One of some words."""
    if isinstance(value, str) and value in options:
        return value
    raise InputError(f"{name} must be one of {', '.join(map(repr, options))}; got {shown(value)}.")


def sequence(value: object, kind: type[T], name: str, needed: str) -> list[T]:
    """Items of one class, at least one, as a list."""
    items = list(value) if isinstance(value, (list, tuple)) else []
    if items and all(isinstance(item, kind) for item in items):
        return items
    raise InputError(f"{name} must be {needed}, in a list, at least one; got {shown(value)}.")


def listed(value: object) -> list[Any] | None:
    """What iterating over it gives; None where it cannot be iterated over. Errors of ours pass, as of a generator."""
    try:
        return list(value)  # type: ignore[call-overload, no-any-return]
    except RingAttentionError:
        raise
    except Exception:  # of whatever iterates
        return None


def pair(value: object, name: str, needed: str, *, least: int = 1) -> tuple[int, int]:
    """Two integers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InputError(f"{name} must be {needed}; got {shown(value)}.")
    first, second = (integer(each, f"Each of {name}", least=least) for each in value)
    return first, second


def dtype(value: object, name: str = "dtype") -> torch.dtype:
    """One of `DTYPES`, or its name such as ``bfloat16``."""
    found: Any = getattr(torch, value, None) if isinstance(value, str) else value
    if isinstance(found, torch.dtype) and found in DTYPES:
        return found
    names = ", ".join(map(dtype_name, DTYPES))
    raise InputError(f"{name} must be a torch dtype or its name, one of {names}; got {shown(value)}.")


def positions(value: object, name: str = "positions", below: int = MAX_TOKENS) -> npt.NDArray[np.int64]:
    """Positions as int64, in the value's shape: a tensor, array, range or list of integers in ``[0, below)``."""
    try:
        found = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if found.size and found.dtype.kind not in "iu":
            raise TypeError(f"they are {found.dtype}")
    except Exception as error:
        raise InputError(f"{name} must be a tensor, array or list of integers; got {shown(value)}: {error}.") from error
    if found.size and not (found.min() >= 0 and found.max() < below):
        wrong = int(found.min()) if found.min() < 0 else int(found.max())
        raise InputError(f"{name} must be positions from 0 to below {_power(below)}; got {wrong}.")
    return found.astype(np.int64)


def finite(value: object, name: str) -> float:
    """A finite number as a float, or an InputError that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name} must be a finite number; got {shown(value)}.")
    number = float(value)
    if not -math.inf < number < math.inf:  # which compiled code can ask of a number it holds as a symbol
        raise InputError(f"{name} must be a finite number; got {shown(value)}.")
    return number


def _power(value: int) -> str:
    exponent = value.bit_length() - 1
    return f"2^{exponent}" if exponent > 20 and value == 1 << exponent else str(value)
