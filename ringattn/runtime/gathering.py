"""Gathering: what a rank needs of the others, brought by a plan and laid into whole blocks of the sequence.

Keys and values come to the queries as they are. Queries come to the keys with all that the gradient of their output is
made of (`payloads.outputs`), as numbers of the inputs' dtype, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from ringattn.mechanisms.base import Problem
from ringattn.payloads.base import Pair
from ringattn.payloads.keys import halves
from ringattn.payloads.outputs import OutputSide
from ringattn.plans import cost
from ringattn.plans.grid import TILE, Arrival, Grid
from ringattn.plans.plan import Plan
from ringattn.runtime import messages
from ringattn.transports.base import Transport


@dataclasses.dataclass(frozen=True, eq=False)
class Gathering:
    """Who brings what to whom, and the tiles that are computed when it is there.

    Attributes:
        name: of the pass, for `explain`.
        plan: by which the payload travels to its queries.
        problem: of what travels: its heads, and the sizes of the halves of its rows.
        grid: the tiles of the plan.
        of_keys: whether queries come to the keys, which are the plan's queries then.
    """

    name: str
    plan: Plan
    problem: Problem
    grid: Grid
    of_keys: bool

    def blocks(self, transport: Transport, own: Pair) -> Pair:
        """The other side's ``[blocks, B, heads, TILE, size]``, of either half; zeros where no row is needed."""
        shape = len(self.grid.other.numbers), self.problem.batch, self.problem.kv_heads, TILE
        there = own[0].new_zeros(*shape, own[0].shape[-1]), own[1].new_zeros(*shape, own[1].shape[-1])
        pack = functools.partial(self.plan.attended.pack, self.problem, own)
        for step, move in transport.buffers.views(
            self, lambda it: messages.gathering(it.plan, it.problem, transport.buffers)
        ):
            under_way = move.start(transport, pack)
            if step.tiles:
                arrived = own if step.phase == 0 else halves(move.rows, self.problem)
                for blocks, rows in zip(there, arrived, strict=True):
                    _lay(blocks, rows, self.grid.arrivals[step.phase])
            under_way.wait()
        return there

    def explain(self) -> str:
        """What comes, and how much of it lies here at once, in words."""
        moved, tiles = cost.traffic(self.plan), sum(map(len, self.grid.tiles))
        what, where = ("queries", "keys") if self.of_keys else ("keys", "queries")
        return (
            f"  deterministic, {self.name}: {moved.received_tokens} {what} come to the {where} and lie there at once "
            f"in {self.bytes} bytes; {tiles} tiles of {TILE} x {TILE}, one after the other"
        )

    @property
    def bytes(self) -> int:
        """What the other side's blocks take while they are held."""
        problem, rows = self.problem, len(self.grid.other.numbers) * TILE
        return rows * problem.batch * problem.kv_heads * (problem.dim + problem.value_dim) * problem.dtype.itemsize


def to_queries(plan: Plan, problem: Problem) -> Gathering:
    """Keys and values come to the queries, by the plan of the call."""
    return Gathering("forward", plan, problem, Grid.of(plan), of_keys=False)


def to_keys(plan: Plan, problem: Problem) -> Gathering:
    """Queries and the output's side come to the keys, by the plan of the transposed mask."""
    travels = dataclasses.replace(problem, kv_heads=problem.heads, value_dim=OutputSide.of(problem).size)
    return Gathering("backward", plan, travels, Grid.of(plan), of_keys=True)


def _lay(blocks: torch.Tensor, rows: torch.Tensor, arrival: Arrival) -> None:
    """Lays rows ``[B, heads, rows, size]`` into their blocks."""
    at, block, row = (torch.from_numpy(x).to(rows.device) for x in (arrival.rows, arrival.block, arrival.row))
    blocks.permute(1, 2, 0, 3, 4)[:, :, block, row] = rows[:, :, at]
