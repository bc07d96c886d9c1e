"""Passes over keys alone, repeated until every rank knows of its queries what the main pass needs."""

from __future__ import annotations

from collections.abc import Callable

from ringattn.mechanisms.base import Mechanism, State
from ringattn.runtime import agreement
from ringattn.transports.base import Transport


def found(transport: Transport, mechanism: Mechanism, one_pass: Callable[[State], State]) -> State:
    """What is known of this rank's queries after as many passes as one of the ranks needs.

    Args:
        mechanism: of the passes, see `Mechanism.preparation`.
        one_pass: makes one, given what the one before has found.
    """
    known, unsettled = State(), True
    while unsettled:
        known = one_pass(known)
        done = agreement.exchanged(transport, bytes([mechanism.settled(known)]), "whether all rows are settled")
        unsettled = not all(map(any, done))
    return known
