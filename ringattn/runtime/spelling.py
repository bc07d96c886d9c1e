"""Values as text, and back: how a compiled graph holds a mechanism, a schedule or a kernel.

Dynamo reads the fields while it traces, and guards them: another number of winners is another graph, as it must be.
Tensors are not part of the text, only the names of the fields that hold one, and floating point numbers, which Dynamo
may hold as symbols, are places in a list.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ringattn.errors import InputError

_CLASS, _TENSORS, _FLOATS = "class", "tensors", "floats"
"""Keys that are no field's name: the class of a value, the fields that hold its tensors, in order, and where in the
list of floating point numbers those of its fields are."""
_KEYS = (_CLASS, _TENSORS, _FLOATS)


def _fields(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls) if field.repr)  # a seed travels as a tensor


# what torch.compiler.assume_constant_result says, which would import all of Dynamo, two seconds, with this package
_fields._dynamo_marked_constant = True  # type: ignore[attr-defined]


def spelled(value: Any, numbers: list[float]) -> str:
    """The text of a frozen dataclass of numbers, text, tuples, tensors and such values. Text stays as it is.

    Its floating point numbers are added to the list.
    """
    return value if isinstance(value, str) else repr(_plain(value, numbers))


def _plain(value: Any, numbers: list[float]) -> dict[str, Any]:
    cls = type(value)
    fields: dict[str, Any] = {_CLASS: f"{cls.__module__}:{cls.__qualname__}"}
    tensors, floats = [], {}
    for name in _fields(cls):
        x = getattr(value, name)
        if isinstance(x, torch.Tensor):
            tensors.append(name)
        elif isinstance(x, float):
            floats[name] = len(numbers)
            numbers.append(x)
        elif x is None or isinstance(x, (bool, str, tuple)):
            fields[name] = x
        elif isinstance(x, int):
            fields[name] = operator.index(x)  # which makes a number of Dynamo's symbol
        elif dataclasses.is_dataclass(x):
            fields[name] = _plain(x, numbers)
        else:
            raise InputError(
                f"{cls.__name__} cannot be compiled: its {name} is a {type(x).__name__}, which is no number, text, "
                f"tuple, tensor or frozen dataclass of such."
            )
    return {**fields, _TENSORS: tuple(tensors), _FLOATS: floats}


def unspelled(text: str, numbers: Sequence[float], tensors: Sequence[torch.Tensor] = ()) -> Any:
    """The value of a text, with these tensors in their fields; text that spells no value stays as it is."""
    if not text.startswith("{"):
        return text
    plain = _parsed(text)
    return _made(plain, numbers, dict(zip(plain[_TENSORS], tensors, strict=True)))


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = ast.literal_eval(text)
    return parsed


def _made(plain: Mapping[str, Any], numbers: Sequence[float], tensors: Mapping[str, torch.Tensor]) -> Any:
    module, _, name = plain[_CLASS].partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"Compiled code finds a class by its name; {name!r} cannot be imported from {module!r}. Define it at the "
            f"top of a module."
        ) from error
    fields = {name: x for name, x in plain.items() if name not in _KEYS}
    fields = {name: _made(x, numbers, {}) if isinstance(x, dict) else x for name, x in fields.items()}
    return cls(**fields, **{name: numbers[at] for name, at in plain[_FLOATS].items()}, **tensors)
