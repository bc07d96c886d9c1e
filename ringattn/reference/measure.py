"""What the oracles give, and how far anything is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ringattn.errors import InputError

Array: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Allowed: TypeAlias = ArrayLike | Callable[[int, int], ArrayLike]
"""Which pairs count: a boolean [Sq, Sk], or a function (start, stop) -> boolean [stop − start, Sk]."""

_BLOCK_ELEMENTS = 1 << 21  # scores of one key head held at once (16 MiB): larger blocks gain nothing


@dataclass(frozen=True)
class Gradients:
    """dq [B, Hq, Sq, D], dk [B, Hkv, Sk, D], dv [B, Hkv, Sk, Dv], and those of the learned tensors, by name."""

    dq: Array
    dk: Array
    dv: Array
    params: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Magnitudes:
    """The scale of rounding errors in out [B, Hq, Sq, Dv], and in dq, dk, dv and params (shaped as in `Gradients`)."""

    out: Array
    dq: Array
    dk: Array
    dv: Array
    params: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All there is to compare with, from one pass: out [B, Hq, Sq, Dv], and lse [B, Hq, Sq], NaN without one."""

    out: Array
    lse: Array
    gradients: Gradients
    magnitudes: Magnitudes


def error(actual: ArrayLike, expected: ArrayLike, magnitude: ArrayLike) -> float:
    """‖actual − expected‖ / ‖magnitude‖, a multiple of the precision of whatever computed `actual`.

    Equal infinities (the lse of unreachable rows) are no difference and add nothing to the magnitude; any
    other infinity or NaN gives inf, and so does a difference where nothing was to be added up. 0 when both
    norms are 0.
    """
    a, e = floats(actual, "actual"), floats(expected, "expected")
    if a.shape != e.shape:
        raise InputError(f"cannot compare shape {a.shape} with the expected {e.shape}")
    difference = np.subtract(a, e, out=np.zeros_like(e), where=a != e)
    if not np.isfinite(difference).all():
        return float("inf")
    sizes = floats(magnitude, "magnitude")
    numerator = float(np.linalg.norm(difference))
    denominator = float(np.linalg.norm(sizes[np.isfinite(sizes)]))
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else float("inf")
    return numerator / denominator


def zeros(q: Array, k: Array, v: Array, params: Mapping[str, Array]) -> Magnitudes:
    """Sums to be added to."""
    empty = {name: np.zeros_like(x) for name, x in params.items()}
    return Magnitudes(np.zeros((*q.shape[:3], v.shape[3])), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), empty)


def floats(value: ArrayLike, name: str, shape: tuple[int, ...] | None = None) -> Array:
    """The value in float64, if it is numbers, and of this shape where one is named."""
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "fiub":
            raise TypeError(f"they are {found.dtype}")
    except Exception as error:  # whatever a user's __array__ raises
        raise InputError(f"{name} must be an array of real numbers: {error}") from error
    if shape is not None and found.shape != shape:
        raise InputError(f"{name} needs shape {shape}; got {found.shape}")
    return found.astype(np.float64, copy=False)


def finite(value: ArrayLike, name: str) -> float:
    """The value as a finite number."""
    found = float(floats(value, name, ()))
    if not np.isfinite(found):
        raise InputError(f"{name} must be a finite number; got {found}")
    return found


def checked(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[Array, Array, Array]:
    """The inputs in float64, if their shapes fit."""
    query, key, value = (floats(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    if not query.ndim == key.ndim == value.ndim == 4:
        raise InputError(f"q, k, v need 4 dims; got shapes {query.shape}, {key.shape}, {value.shape}")
    fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    if not fits or key.shape[:3] != value.shape[:3]:
        raise InputError(f"shapes disagree: q {query.shape}, k {key.shape}, v {value.shape}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise InputError(f"{query.shape[1]} query heads cannot be shared among {key.shape[1]} key heads")
    if query.shape[3] == 0:
        raise InputError(f"q and k need at least one dim a head; got shape {query.shape}")
    return query, key, value


def output_gradient(dout: ArrayLike | None, q: Array, v: Array) -> Array:
    """The gradient [B, Hq, Sq, Dv] of the output in float64; zeros where there is none."""
    shape = (*q.shape[:3], v.shape[3])
    return np.zeros(shape) if dout is None else floats(dout, "dout", shape)


def blocks(q: Array, k: Array, allowed: Allowed) -> Iterator[tuple[slice, slice, Bools]]:
    """Blocks of rows, each with the span of keys that its rows may see; blocks that see none are left out."""
    heads, length, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if not callable(allowed):
        dense = _booleans(allowed)
        if dense.shape != (length, keys):
            raise InputError(f"allowed needs shape {(length, keys)}; got {dense.shape}")
    size = max(1, min(256, _BLOCK_ELEMENTS // max(1, heads * keys)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        block = _booleans(_asked(allowed, start, stop)) if callable(allowed) else dense[start:stop]
        if block.dtype != np.bool_ or block.shape != (stop - start, keys):
            raise InputError(
                f"allowed needs booleans of shape {(stop - start, keys)} for rows {start} to {stop}; "
                f"got {block.dtype} of shape {block.shape}"
            )
        touched = np.flatnonzero(block.any(axis=0))
        if touched.size:
            span = slice(int(touched[0]), int(touched[-1]) + 1)
            yield slice(start, stop), span, block[:, span]


def _asked(allowed: Callable[[int, int], ArrayLike], start: int, stop: int) -> ArrayLike:
    try:
        return allowed(start, stop)
    except Exception as error:  # whatever a user's function raises
        raise InputError(f"allowed failed for rows {start} to {stop}: {type(error).__name__}: {error}") from error


def _booleans(allowed: ArrayLike) -> Bools:
    """An array; whether it is one of booleans is for `blocks` to say, of which rows."""
    try:
        return np.asarray(allowed)
    except Exception as error:  # whatever a user's __array__ raises
        raise InputError(f"allowed must be a matrix of booleans: {error}") from error
