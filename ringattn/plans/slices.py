"""Slices of heads: a plan whose keys come at once, made into one whose keys come a few heads at a time.

Heads do not depend on each other, so each slice is the same plan for some of them, in a phase of its own: its exchange
travels while the slice before it is computed, and lies in as little memory as it has heads. A rank's own keys are there
in any case, and computed for all heads at once.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np

from ringattn.bands import Array
from ringattn.plans.steps import GRAD_BUFFER, GRAD_PHASE, RECV_PHASE, SEND_PHASE, Program

P = TypeVar("P", bound=Program)


def in_slices(plan: P, slices: int) -> P:
    """A plan of one phase in so many slices.

    Args:
        plan: by which all that a rank needs of others arrives in phase 1.
    """
    if slices == 1:
        return plan
    own = plan.tile_phases == 0
    foreign, count = plan.tile_rows[~own], int((~own).sum())
    return dataclasses.replace(
        plan,
        slices=slices,
        tile_phases=np.concatenate([plan.tile_phases[own], np.repeat(np.arange(1, slices + 1), count)]),
        tile_rows=np.concatenate([plan.tile_rows[own], *[foreign] * slices]),
        receives=_repeated(plan.receives, slices, RECV_PHASE),
        sends=_repeated(plan.sends, slices, SEND_PHASE),
        grad_sends=_repeated(plan.grad_sends, slices, GRAD_PHASE, GRAD_BUFFER),
        grad_receives=_repeated(plan.grad_receives, slices, GRAD_PHASE),
    )


def _repeated(table: Array, slices: int, *columns: int) -> Array:
    """A table for each slice, one behind the other, whose phases are in these columns."""
    out = np.tile(table, (slices, 1))
    out[:, columns] += np.repeat(np.arange(slices), len(table))[:, None]
    return out


def of_slice(plan: Program, nth: int) -> Program:
    """What a plan does for the heads of one slice: a plan of its own."""
    at = nth + 1
    kept = (plan.tile_phases == 0) | (plan.tile_phases == at)
    return dataclasses.replace(
        plan,
        slices=1,
        tile_phases=plan.tile_phases[kept],
        tile_rows=plan.tile_rows[kept],
        receives=plan.receives[plan.receives[:, RECV_PHASE] == at],
        sends=plan.sends[plan.sends[:, SEND_PHASE] == at],
        grad_sends=plan.grad_sends[plan.grad_sends[:, GRAD_BUFFER] == at],
        grad_receives=plan.grad_receives[plan.grad_receives[:, GRAD_PHASE] == at + plan.lag],
    )
