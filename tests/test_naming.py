"""Members by name, by instance, and from outside the package."""

from __future__ import annotations

import re
from typing import Any

import pytest

import ringattn
from ringattn import schedules
from ringattn.errors import InputError
from ringattn.naming import by_name, named
from ringattn.schedules.base import Schedule, Scheme

MEMBERS: tuple[type[Schedule], ...] = (ringattn.Ring, ringattn.Route)
ROUTE = ringattn.Route(lookahead=0)


def _found(value: object, members: Any = MEMBERS) -> Schedule:
    return named("schedule", value, Schedule, members, also=("auto",))


def test_found() -> None:
    assert _found("route") == ringattn.Route()
    assert _found(ROUTE) is ROUTE
    assert _found("route(lookahead=0)") == ROUTE and _found("route()") == ringattn.Route()
    assert named("schedule", "ulysses(route(lookahead=0), slices=2)", Scheme, schedules.MEMBERS) == ringattn.Ulysses(
        "route(lookahead=0)", slices=2
    )
    assert _found("ring(gradient_wire=input, lookahead=0)") == ringattn.Ring(lookahead=0, gradient_wire="input")
    assert _found("x", {"x": lambda: ROUTE}) is _found("x", {"x": ROUTE}) is ROUTE
    assert _found("ringattn:Scan") == ringattn.Scan()
    assert _found(f"{__name__}:ROUTE") is ROUTE
    assert by_name(MEMBERS) == {"ring": ringattn.Ring, "route": ringattn.Route}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("rind", "schedule must be a Schedule, one of 'auto', 'ring', 'route', or 'module:Name'; got 'rind'."),
        (3, "got 3."),
        ("x" * 9999, "… (10001 characters)"),
        (ringattn.Ring, "got the class Ring. Make one, as in Ring()."),
        (ringattn.Causal(), "got Causal()."),
        ("no.such.module:Ring", "No module named 'no'"),
        ("ringattn:Rind", "the module ringattn has no 'Rind'"),
        ("ringattn:Zigzag", "is no Schedule; it is <class"),
        ("os:abort", "is no Schedule; it is <built-in function abort>"),
        ("ringattn.schedules.base:Schedule", "cannot be made so"),
        ("route(lookahead=2)", "lookahead is 0 or 1 phases; got 2."),
        ("route(lookahed=0)", "unexpected keyword argument 'lookahed'"),
        ("route(**{})", "arguments are given as in name(argument=1)"),
        ("route(lookahead=0", "cannot be read: '(' was never closed"),
        ("route(lookahead=0) + 1", "arguments are given as in"),
        ("route(lookahead=1 + 1)", "cannot be read"),
        ("rout(lookahead=0)", "or 'module:Name'; got 'rout(lookahead=0)'."),
        (":Ring", "cannot be imported: ValueError"),
        (".ring:Ring", "cannot be imported: TypeError"),
    ],
)
def test_refused(value: object, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        _found(value)
