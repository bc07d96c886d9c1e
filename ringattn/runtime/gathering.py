"""Gathering: what a rank needs of the others, brought by a plan and laid into whole blocks of the sequence.

Keys and values come to the queries as they are. Queries come to the keys with all that the gradient of their output is
made of: beside each query, the gradient of its output, the output, and the mechanism's extras and their gradients, as
numbers of the inputs' dtype, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ringattn.mechanisms.base import OutputGrad, Problem
from ringattn.payloads.base import Pair
from ringattn.payloads.keys import halves
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
        for step, move in transport.buffers.views(
            self, lambda it: messages.gathering(it.plan, it.problem, transport.buffers)
        ):
            under_way = move.start(transport, self.plan.payload, self.problem, own)
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


@dataclasses.dataclass(frozen=True, eq=False)
class OutputSide:
    """How the output side of a backward pass travels beside the queries.

    Attributes:
        fields: dtype and shape, of one query and head, of the gradient of the output, of the output, of each extra and
            what is kept, and of the gradient of each extra that has one.
        extras, kept: how many of them there are.
        dtype: as which it travels.
    """

    fields: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    extras: int
    kept: int
    dtype: torch.dtype

    @classmethod
    def of(cls, problem: Problem) -> OutputSide:
        """That of a problem's mechanism."""
        mechanism = problem.mechanism
        params = {name: torch.zeros_like(x, device=problem.device) for name, x in mechanism.params.items()}
        problem = dataclasses.replace(problem, params=params)  # which decide on dtypes
        out, others = mechanism.finish(problem, mechanism.empty(problem, 0))
        extras = others[: len(mechanism.extras)]
        travel = out, out, *others, *(x for x in extras if x.is_floating_point())
        fields = tuple((x.dtype, tuple(x.shape[3:])) for x in travel)
        return cls(fields, len(extras), len(others) - len(extras), problem.dtype)

    @property
    def size(self) -> int:
        """Numbers of one head that travel beside a query."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) * dtype.itemsize // self.dtype.itemsize for dtype, shape in self.fields]

    def packed(self, output_grad: OutputGrad) -> torch.Tensor:
        """``[B, Hq, Sq, size]``."""
        out, *others = output_grad.saved
        grads = [
            x.new_zeros(x.shape) if grad is None else grad.to(x.dtype)
            for x, grad in zip(others[: self.extras], output_grad.grad_extras, strict=True)
            if x.is_floating_point()
        ]
        columns = (x.unsqueeze(-1).flatten(3) for x in (output_grad.dout, out, *others, *grads))
        return torch.cat([x.contiguous().view(self.dtype) for x in columns], dim=-1)

    def unpacked(self, rows: torch.Tensor) -> OutputGrad:
        """The same of ``[B, Hq, rows, size]``."""
        parts = rows.split(self._sizes, dim=-1)
        columns = [
            x.contiguous().view(dtype).view(*x.shape[:3], *shape)
            for x, (dtype, shape) in zip(parts, self.fields, strict=True)
        ]
        dout, out, *numbers = columns
        known = self.extras + self.kept
        others, grads = numbers[:known], iter(numbers[known:])
        grad_extras = tuple(next(grads) if x.is_floating_point() else None for x in others[: self.extras])
        return OutputGrad((out, *others), dout, grad_extras)
