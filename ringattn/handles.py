"""Handles: how a compiled graph, which holds tensors alone, finds the objects of a call.

Dynamo guards the content of every Python object that a graph reads, so that another mask would mean another graph. Of
a tensor that comes into a graph it guards shape and dtype only. So every object that may change from step to step
carries a `token`, a tensor with its number, and the ops of `runtime.op` look the object up when they run.

The table of numbers is the one piece of module state in the package. It keeps nothing alive.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ringattn.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

_OBJECTS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def number_of(value: Any) -> int:
    """A new number for an object, by which `found` finds it for as long as somebody else holds it."""
    number = next(_NUMBERS)
    _OBJECTS[number] = value
    return number


def found(number: int, what: str) -> Any:
    """The object of this number.

    Raises:
        InputError: nobody holds it any more; ``what`` says what it was.
    """
    value = _OBJECTS.get(number)
    if value is None:
        raise InputError(f"The {what} of this attention is gone. Keep it until the backward pass is done.")
    return value


def live() -> int:
    """How many objects the table finds at present."""
    return len(_OBJECTS)


class Handled:
    """An object that compiled code may be called with.

    Attributes:
        token: int64 ``[]`` on the CPU, the object's number. It is not part of the object's value and is not pickled.
    """

    token: torch.Tensor

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if torch.compiler.is_compiling():
            raise InputError(
                f"A {cls.__name__} was made inside compiled code. Make it outside and pass it in: "
                f"another one of the same kind then needs no new graph."
            )
        made = super().__new__(cls)
        object.__setattr__(made, "token", torch.tensor(number_of(made), device="cpu"))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "token"}
