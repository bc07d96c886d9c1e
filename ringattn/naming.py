"""Members of a folder by name: an instance, a member's name, or ``module:Name`` from outside the package.

On a command line a name may have arguments, as the member's class takes them: ``route(lookahead=0)``.

Each folder lists its members once, in a tuple ``MEMBERS``; names, error texts, help texts and tables follow from it.
Nothing is registered: what is not a member is given as an instance, or as the place to import it from.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, cast

from ringattn.checking import shown
from ringattn.errors import InputError, RingAttentionError

T = TypeVar("T")


def name_of(member: object) -> str:
    """A member's name: what its class says in ``spelled``, or the class's own name in lower case; an instance's text.

    >>> name_of(InputError)
    'inputerror'
    """
    if not isinstance(member, type):
        return str(member)
    return str(getattr(member, "spelled", "") or member.__name__.lower())


def by_name(members: Iterable[type[T]]) -> dict[str, type[T]]:
    """The classes of a ``MEMBERS`` tuple by their names, in order."""
    return {name_of(member): member for member in members}


def named(
    kind: str,
    value: object,
    base: type[T],
    members: Mapping[str, Callable[..., T] | T] | Sequence[type[T] | T],
    *,
    also: Sequence[str] = (),
) -> T:
    """The instance itself, a member by its name, or what ``module:Name`` is outside the package.

    Args:
        kind: what is asked for, for errors, such as ``schedule``.
        value: an instance of ``base``, or a name. After a name there may be arguments in parentheses: numbers, texts,
            True, False and None as in Python, and names of other members, which need no quotes.
        base: the contract.
        members: instances, or what makes one when called without arguments, by name or as a ``MEMBERS`` tuple.
        also: names that the caller takes beside these, such as ``auto``; only for the error's list.

    Raises:
        InputError: there is no such member; the error lists those there are.
    """
    if isinstance(value, base):
        return value
    known = members if isinstance(members, Mapping) else {name_of(member): member for member in members}
    wanted = f"{kind} must be a {base.__name__}, one of {', '.join(map(repr, (*also, *known)))}, or 'module:Name'"
    if isinstance(value, type) and issubclass(value, base):
        raise InputError(f"{wanted}; got the class {value.__name__}. Make one, as in {value.__name__}().")
    if not isinstance(value, str):
        raise InputError(f"{wanted}; got {shown(value)}.")
    if value in known:
        member = known[value]
        return member if isinstance(member, base) else _made(kind, value, cast("Callable[..., T]", member))
    name, _, arguments = value.partition("(")
    if arguments and name in known and not isinstance(known[name], base):
        given, spelled = _arguments(kind, value)
        return _made(kind, name, functools.partial(cast("Callable[..., T]", known[name]), *given, **spelled))
    if ":" not in value:
        raise InputError(f"{wanted}; got {shown(value)}.")
    found = imported(kind, value)
    if isinstance(found, base):
        return found
    if isinstance(found, type) and issubclass(found, base):
        return _made(kind, value, found)
    raise InputError(f"{kind} {shown(value)} is no {base.__name__}; it is {shown(found)}.")


def _arguments(kind: str, text: str) -> tuple[list[object], dict[str, object]]:
    """Those of ``name(1, second=other)``.

    Raises:
        InputError: it is not written so.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or any(each.arg is None for each in call.keywords):
            raise ValueError("arguments are given as in name(argument=1)")
        return list(map(_value, call.args)), {str(each.arg): _value(each.value) for each in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{kind} {shown(text)} cannot be read: {error}.") from error


def _value(node: ast.expr) -> object:
    """A literal, or the text of a name that may have arguments itself."""
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Call)) else ast.literal_eval(node)


def imported(kind: str, place: str) -> object:
    """What ``module:Name`` names, imported.

    Raises:
        InputError: there is no such module, it fails to import, or it has no such name.
    """
    module, _, name = place.partition(":")
    try:
        found = vars(importlib.import_module(module))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{kind} {shown(place)} cannot be imported: {reason}") from error
    if name not in found:
        raise InputError(f"{kind} {shown(place)}: the module {module} has no {name!r}.")
    return found[name]


def _made(kind: str, name: str, member: Callable[..., T]) -> T:
    """An instance from a class, or from what makes one, called with the arguments that were given."""
    try:
        return member()
    except RingAttentionError:
        raise
    except Exception as error:
        raise InputError(f"{kind} {shown(name)} cannot be made so ({error}); make it first.") from error
