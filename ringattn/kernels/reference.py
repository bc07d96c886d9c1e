"""The reference kernel: plain PyTorch, any mechanism, dtype, device and band.

Tiles are computed in sub-tiles of bounded size, so memory does not grow with the sequence; sub-tiles outside the
band are skipped and those inside it take no mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from ringattn.kernels.base import Kernel
from ringattn.mechanisms.base import OutputGrad, Params, Problem, State
from ringattn.mechanisms.blocks import Block, rows_at
from ringattn.mechanisms.ordered import Ordered
from ringattn.plans import tiles as t
from ringattn.plans.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Reference(Kernel):
    """Any mechanism, through its own `tile` and `tile_grad`.

    Attributes:
        rows, columns: queries and keys of a sub-tile.
    """

    rows: int = 256
    columns: int = 1024

    def supports(self, problem: Problem) -> bool:
        return not isinstance(problem.mechanism, Ordered)  # which has no tiles

    def refusal(self, problem: Problem) -> str | None:
        return None

    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        dtype, mechanism = problem.accumulator, problem.mechanism
        state = mechanism.empty(problem, q.shape[2]) if state is None else state
        for keys, block in self.blocks(tiles, problem):
            at = block.queries
            inputs = q[:, :, at].to(dtype), k[:, :, keys].to(dtype), v[:, :, keys].to(dtype)
            mechanism.merge(tuple(x[:, :, at] for x in state), mechanism.tile(problem, block, *inputs))
        return state

    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dparams: Params,
    ) -> None:
        dtype = problem.accumulator
        for keys, block in self.blocks(tiles, problem):
            at = block.queries
            parts = problem.mechanism.tile_grad(
                problem,
                block,
                q[:, :, at].to(dtype),
                k[:, :, keys].to(dtype),
                v[:, :, keys].to(dtype),
                output_grad.select(rows_at(at), dtype),
                dparams,
            )
            for total, rows, part in zip(gradients, (at, keys, keys), problem.wanted(*parts), strict=True):
                if part is not None:
                    total[:, :, rows] += part

    def blocks(self, tiles: Tiles, problem: Problem) -> Iterator[tuple[slice, Block]]:
        """The sub-tiles: rows of keys, and the pairs."""
        for row in tiles.rows.tolist():
            for i in range(0, row[t.M], self.rows):
                for j in range(0, row[t.N], self.columns):
                    ends = (i, min(i + self.rows, row[t.M])), (j, min(j + self.columns, row[t.N]))
                    block = _sub_tile(problem, row, *ends)
                    if block is not None:
                        yield _slice(row[t.K], row[t.K_STEP], *ends[1]), block


def _sub_tile(problem: Problem, row: list[int], i: tuple[int, int], j: tuple[int, int]) -> Block | None:
    """A sub-tile: the tile's queries ``i`` and keys ``j``, both from and to; None when its band misses them."""
    least, most = i[0] - (j[1] - 1), i[1] - 1 - j[0]
    if most < row[t.LOW] or least > row[t.HIGH]:
        return None
    q_at, k_at = _slice(row[t.Q_POSITION], row[t.Q_STRIDE], *i), _slice(row[t.K_POSITION], row[t.K_STRIDE], *j)
    allowed = None
    if least < row[t.LOW] or most > row[t.HIGH]:
        offset = torch.arange(*i, device=problem.device)[:, None] - torch.arange(*j, device=problem.device)
        allowed = (row[t.LOW] <= offset) & (offset <= row[t.HIGH])
    if row[t.PARTIAL]:
        assert problem.allows is not None
        q, k = (np.arange(at.start, at.stop, at.step) for at in (q_at, k_at))
        pairs = torch.from_numpy(np.ascontiguousarray(problem.allows(q[:, None], k[None, :])))
        answers = pairs.to(problem.device, non_blocking=True)  # or it waits for all that the device has yet to do
        allowed = answers if allowed is None else allowed & answers
    return Block(_slice(row[t.Q], row[t.Q_STEP], *i), q_at, k_at, allowed)


def _slice(first: int, step: int, start: int, stop: int) -> slice:
    """Rows, or positions, ``start`` to ``stop`` of a tile that begins at ``first`` and takes every ``step``-th."""
    return slice(first + start * step, first + (stop - 1) * step + 1, step)
