"""Keys and values, a row ``D + Dv`` numbers per head, and their gradients in the same form.

One message to a peer carries both halves, and the kernel reads the rows as they arrived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from ringattn.kernels.base import Kernel
from ringattn.mechanisms.base import OutputGrad, Params, Problem, State
from ringattn.payloads.base import Attended, Heads, Pair, Parcel
from ringattn.plans.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Keys(Attended):
    """Keys with their values, for any mechanism."""

    name: ClassVar[str] = "keys"
    unit: ClassVar[str] = "key positions"
    per_key: ClassVar[bool] = True
    accumulated: ClassVar[bool] = False

    def size(self, heads: Heads) -> int:
        return heads.dim + heads.value_dim

    def pack(self, problem: Problem, own: Pair, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            for source, target in zip(own, halves(parcel.rows, problem), strict=True):
                at = 0
                for start, stop in parcel.spans:
                    target[:, :, at : at + stop - start].copy_(source[:, :, start:stop])
                    at += stop - start

    def attend(
        self, problem: Problem, kernel: Kernel, q: torch.Tensor, rows: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        return kernel.forward(problem, q, *halves(rows, problem), tiles, state)

    def attend_grad(
        self,
        problem: Problem,
        kernel: Kernel,
        q: torch.Tensor,
        rows: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        dq: torch.Tensor,
        drows: torch.Tensor,
        dparams: Params,
    ) -> None:
        gradients = dq, *halves(drows, problem)
        kernel.backward(problem, q, *halves(rows, problem), output_grad, tiles, gradients, dparams)

    def unpack_grad(self, problem: Problem, own: Pair, parcels: Sequence[Parcel], grads: Pair) -> None:
        for parcel in parcels:
            for name, total, part in zip("kv", grads, halves(parcel.rows, problem), strict=True):
                if not problem.wants(name):
                    continue
                at = 0
                for start, stop in parcel.spans:
                    total[:, :, start:stop].add_(part[:, :, at : at + stop - start])
                    at += stop - start


def halves(rows: torch.Tensor, problem: Problem) -> Pair:
    """The key half and the value half of rows, ``[B, Hkv, rows, D]`` and ``[B, Hkv, rows, Dv]``."""
    k, v = rows.permute(1, 2, 0, 3).split([problem.dim, problem.value_dim], dim=-1)
    return k, v
