"""What the arguments of fuzzed calls may be, and nonsense to put in their place."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import ringattn
from ringattn import layouts, mechanisms, schedules
from ringattn.kernels import Kernel

MESH = ringattn.Mesh.local()
VIRTUAL = ringattn.Mesh.virtual(3, rank=1)
OWN = ringattn.Sharding(12, MESH)
PART = ringattn.Sharding(12, VIRTUAL, "zigzag")
MASK = ringattn.Documents([5, 0, 7]) & ringattn.Causal()
Q = torch.randn(1, 2, 12, 4)
PLANS = ringattn.plan_all(MASK, 12, ring=3)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Liar:
    """Has every attribute, and each is nonsense."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


NONSENSE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**40, 2**63, -(2**63) - 1, 10**30),
    *(0.5, -0.0, 1e308, math.nan, math.inf, 1j, np.float32(2), np.int8(3), np.bool_(True), np.nan),
    *("", "x", "auto", "causal", "zigzag", "ring", "float32", "(" * 3000, "os:abort", "no.such:Thing", ":", "\0", b"x"),
    *([], [1, 2], [None], (), (1,), (2, 1), ((),), {}, {"x": 1}, {1, 2}, [[1, 2, 3]], [[(0, 4)], [(4, 12)]], range(3)),
    *(torch.zeros(()), torch.zeros(0), torch.arange(3), torch.zeros(3, dtype=torch.complex64), torch.zeros(2, 2)),
    *(torch.zeros(1, 2, 12, 4, dtype=torch.int32), torch.zeros(1, 2, 12, 4, device="meta"), torch.zeros(1, 2, 13, 4)),
    *(np.zeros((2, 2)), np.array(["a"]), np.array(None), np.zeros((2, 2), dtype=bool), np.arange(3)),
    *(object(), Unprintable(), Liar(), print, int, lambda *_: 1 / 0, ringattn.Ring, ringattn.Causal, Exception("x")),
    *(MESH, VIRTUAL, OWN, PART, MASK, ringattn.Zigzag(), ringattn.Ring(), ringattn.Softmax(), PLANS, PLANS[0], Q),
    *(torch.float32, torch.int8, slice(3), iter([1, 2]), ringattn.Documents([3]), ringattn.Explicit([[(0, 12)]])),
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an argument may be: some values that are right, and whether another one may be."""

    right: tuple[Any, ...]
    may_be: Callable[[Any], bool]

    @property
    def optional(self) -> Kind:
        """Or None."""
        return Kind((None, *self.right), lambda x: x is None or self.may_be(x))


def is_whole(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def instance_of(kind: type, *right: Any) -> Kind:
    return Kind(right, lambda x: isinstance(x, kind))


def integer(least: int, most: int, *right: int) -> Kind:
    return Kind(right, lambda x: is_whole(x) and least <= x <= most)


def real(least: float, most: float, *right: float) -> Kind:
    def may_be(x: Any) -> bool:
        return isinstance(x, numbers.Real) and not isinstance(x, bool) and least <= float(x) <= most

    return Kind(right, may_be)


def member(base: type, *right: Any) -> Kind:
    """An instance, or a name that is not nonsense by itself."""
    return Kind(right, lambda x: isinstance(x, base) or (isinstance(x, str) and x in right))


LAST = 2**40 - 1
LENGTH = integer(0, LAST, 0, 1, 12, 40)
RANKS = integer(1, 4096, 1, 2, 3)
RANK = integer(0, 2, 0, 2)
MASKS = instance_of(
    ringattn.Mask, MASK, ringattn.Full(), ~ringattn.Full(), ringattn.Window(3), ringattn.Blocks([[1]], 12)
)
LAYOUTS = member(layouts.Layout, "auto", "zigzag", "balanced", ringattn.Striped())
SCHEDULES = member(schedules.Scheme, "auto", "ring", "route", "scan", ringattn.Route(lookahead=0))
KERNELS = member(Kernel, "auto", "reference", "sdpa")
MECHANISMS = instance_of(
    mechanisms.Mechanism,
    ringattn.Softmax(),
    ringattn.Hard(),
    ringattn.Linear(),
    ringattn.Gated(),
    ringattn.Softmax(0.3),
)
SHARDINGS = instance_of(ringattn.Sharding, OWN, PART)
TENSOR = instance_of(torch.Tensor, Q)
FLAG = Kind((True, False), lambda x: isinstance(x, (bool, np.bool_)))
DTYPE = Kind(
    (torch.float32, "bfloat16"), lambda x: isinstance(x, torch.dtype) or (isinstance(x, str) and hasattr(torch, x))
)
PAIR = Kind(((2, 1), (4, 2)), lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(map(is_whole, x)))
SCALE = real(-1e400, 1e400, 0.5, 2)


def is_numbers(x: Any) -> bool:
    """Whether NumPy makes an array of real numbers of it."""
    try:
        return np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x).dtype.kind in "iufb"
    except Exception:
        return False


def is_positions(x: Any) -> bool:
    try:
        found = np.asarray(x)
    except Exception:
        return False
    return not found.size or (found.dtype.kind in "iu" and found.min() >= 0 and found.max() <= LAST)


ARRAY = Kind((Q.numpy(),), is_numbers)
POSITIONS = Kind(([0, 3], torch.arange(12), range(5)), is_positions)
LENGTHS = Kind(
    ([5, 7], (12,), []), lambda x: hasattr(x, "__iter__") and not isinstance(x, (str, bytes, dict, set, np.generic))
)
PLANS_OF_ALL = Kind((PLANS,), lambda x: isinstance(x, (list, tuple)) and all(isinstance(p, ringattn.Plan) for p in x))


def word(word: str) -> Kind:
    return Kind((word,), lambda x: isinstance(x, str) and x == word)


@dataclasses.dataclass(frozen=True)
class Call:
    """A function, the kinds of its arguments, and the first right value of each makes a call that works."""

    name: str
    function: Callable[..., Any]
    kinds: dict[str, Kind]

    @property
    def right(self) -> dict[str, Any]:
        return {name: kind.right[0] for name, kind in self.kinds.items()}
