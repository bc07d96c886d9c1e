"""Dealing: a call whose heads are exchanged for sequence, made of calls of its parts along the ring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ringattn.errors import UnsupportedError
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.ordered import Ordered
from ringattn.plans.deal import Part
from ringattn.plans.swap import Swap
from ringattn.runtime.call import Call, UlyssesCall


def dealt(
    asked: Call, swap: Swap, queries: int, returned: Sequence[str], prepare: Callable[[Problem], Call]
) -> UlyssesCall:
    """The call of heads that are dealt.

    Args:
        asked: the call, of all heads.
        queries: how many of them this rank has.
        returned: the mechanism's extras that come out of it, on all ranks alike.
        prepare: makes the call of one part along the ring.

    Raises:
        UnsupportedError: the mechanism keeps something that cannot be sent home, as was asked for.
    """
    problem, mechanism = asked.problem, asked.problem.mechanism
    if isinstance(mechanism, Ordered) and not swap.keep:
        raise UnsupportedError(
            f"{type(mechanism).__name__} keeps something of every block of queries, which cannot be sent home. Use "
            f"Ulysses(keep=True), and call it between graphs."
        )
    parts = tuple(tuple((part, prepare(_of_part(problem, part))) for part in own) for own in swap.parts)
    return UlyssesCall(
        problem,
        asked.transport,
        asked.returning(returned),
        asked.wanted,
        asked.spelling,
        swap,
        parts,
        tuple(map(mechanism.extras.index, returned)),
        () if isinstance(mechanism, Ordered) else _forms(problem.results_like(queries)),
    )


def _of_part(problem: Problem, part: Part) -> Problem:
    first = problem.first_head + part.first
    return dataclasses.replace(problem, heads=part.heads, kv_heads=part.kv_heads, first_head=first)


def part_of_first(problem: Problem, swap: Swap) -> Problem:
    """The problem of the first part of all, which is the same on every rank: by it all choose one kernel."""
    return _of_part(problem, swap.dealt[0][0][0])


def _forms(tensors: Sequence[torch.Tensor]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    return tuple((tuple(x.shape), x.dtype) for x in tensors)
