"""The leak probe: what changes one token may change, and nothing else, by a single bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ringattn.conformance.case import Case
from ringattn.conformance.running import Results

Run = Callable[[Sequence[torch.Tensor]], Results]
"""Runs a case with these inputs: `running.simulated`, or on the ranks of a mesh."""


@dataclasses.dataclass(frozen=True)
class Leaks:
    """What a changed token has changed.

    Attributes:
        tokens: by result, those that the mask does not tie to the token and that changed all the same.
        moved: whether anything changed.
        tied: whether anything was to: a token that no query may see ties nothing but itself.
    """

    tokens: dict[str, list[int]]
    moved: bool
    tied: bool

    @property
    def none(self) -> bool:
        """Whether all is as it must be."""
        return self.moved >= self.tied and not any(self.tokens.values())

    def __str__(self) -> str:
        if self.tied > self.moved:
            return "the changed token changed nothing"
        leaking = [f"{name} at {len(at)} tokens, first {at[0]}" for name, at in self.tokens.items() if at]
        return "; ".join(leaking) or "none"


def leaks(case: Case, run: Run, before: Results, token: int) -> Leaks:
    """Changes one token, runs the case again, and compares what the mask does not tie to that token.

    Rows that see the token may change, and so may the keys they see; its own row may, whatever the mask. So a run that
    gives other bits each time leaks everywhere.

    Args:
        before: the results with the inputs of the case.
        token: a position below the lengths of queries and keys.
    """
    changed = [x.clone() for x in case.inputs()]
    for x in changed[:3]:
        x[:, :, token] += 1.0
    after, may_move = run(changed), _tied(case, token)
    tokens, moved = {}, False
    for name, allowed in may_move.items():
        if name in before:
            different = _different(before[name], after[name])
            moved = moved or bool(different.any())
            tokens[name] = [int(at) for at in np.flatnonzero(different & ~allowed)]
    return Leaks(tokens, moved, bool(case.rows(0, case.length)[:, token].any()))


def _tied(case: Case, token: int) -> dict[str, NDArray[np.bool_]]:
    """By result, the tokens that may change with this one."""
    allowed = case.rows(0, case.length)
    rows = allowed[:, token].copy()
    rows[token] = True
    keys = np.logical_or.reduce(allowed[rows], axis=0)
    keys[token] = True
    return {"out": rows, "lse": rows, "dq": rows, "dk": keys, "dv": keys}


def _different(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.bool_]:
    """The tokens, dim 2, at which two results differ."""
    return (a != b).transpose(0, 2).flatten(1).any(dim=1).numpy()
