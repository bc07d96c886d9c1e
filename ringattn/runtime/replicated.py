"""Attention of queries that every rank has over keys that are sharded: keys stay where they are, and states travel.

Each rank attends to its own keys; the states are folded along a tree of the ranks (`runtime.folding`), so that what
travels depends on the queries and not on how many keys there are. Backward the gradients of the output, which is on all
ranks, are added up along the same tree, and each rank computes those of its keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ringattn.bands import Array
from ringattn.kernels.base import Kernel
from ringattn.masks import Mask
from ringattn.mechanisms.base import Mechanism, OutputGrad, Problem, State
from ringattn.plans.demand import Demand
from ringattn.plans.planning import check_causal
from ringattn.plans.tiles import Tiles
from ringattn.runtime import preparing
from ringattn.runtime.call import Asked
from ringattn.runtime.folding import add, fold
from ringattn.sharding import Sharding


def own_tiles(mechanism: Mechanism, mask: Mask, q_spans: Array, q_length: int, keys: Sharding) -> Tiles:
    """The pairs of some queries, as spans of one rank 0, and this rank's own keys.

    Raises:
        UnsupportedError: they are not for the mechanism.
    """
    k_spans = keys.spans[keys.spans[:, 0] == keys.mesh.sequence_rank].copy()
    k_spans[:, 0] = 0
    demand = Demand(mask, *mask.classify(q_length, keys.length), q_spans, k_spans, 1)
    check_causal(demand, mechanism)
    return Tiles(demand.rows(0)[:, 2:])


@dataclasses.dataclass(frozen=True, eq=False)
class Replicated(Asked):
    """A call whose queries are on every rank.

    Attributes:
        tiles: the pairs of the queries and this rank's own keys.
    """

    tiles: Tiles
    kernel: Kernel

    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[Problem, torch.Tensor, State]:
        """The problem with what is known now, and the output, the extras and what is kept, the same on every rank."""
        mechanism = problem.mechanism.preparation
        if mechanism is not None:

            def one_pass(known: State) -> State:
                return self._finished(problem.over_keys(mechanism, known), q, k, k[..., :0])[1]

            problem = dataclasses.replace(problem, known=preparing.found(self.transport, mechanism, one_pass))
        return problem, *self._finished(problem, q, k, v)

    def _finished(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        mechanism: Mechanism = problem.mechanism
        state = mechanism.empty(problem, q.shape[2])
        if len(self.tiles):
            state = self.kernel.forward(problem, q, k, v, self.tiles, state)
        fold(self.transport, state, mechanism.merge, "states")
        return mechanism.finish(problem, state)

    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        saved: State,
        dout: torch.Tensor,
        grad_extras: Sequence[torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The gradients of q and the params, as far as they come of this rank's keys, and of its k and v."""
        mechanism, accumulator = problem.mechanism, problem.accumulator
        extras = saved[1 : 1 + len(mechanism.extras)]
        arrived = [
            torch.zeros_like(x) if grad is None else grad.to(x.dtype)
            for x, grad in zip(extras, grad_extras, strict=True)
            if x.is_floating_point()
        ]
        total = (dout.to(accumulator, copy=True), *(x.clone() for x in arrived))
        fold(self.transport, total, add, "gradients of the output")
        sums = iter(total[1:])
        summed = tuple(next(sums) if x.is_floating_point() else None for x in extras)
        output_grad = OutputGrad(saved, total[0].to(problem.dtype), summed)
        dq, dk, dv = problem.no_gradients(q.shape[2], k.shape[2])
        dparams = problem.no_gradients_of_params()
        if len(self.tiles):
            self.kernel.backward(problem, q, k, v, output_grad, self.tiles, (dq, dk, dv), dparams)
        if self.transport.rank == 0:  # what is of no key counts once
            mechanism.finish_grad(problem, output_grad, dparams)
        totals = [dparams[name].to(p.dtype) for name, p in problem.params.items()]
        return dq.to(problem.dtype), dk.to(problem.dtype), dv.to(problem.dtype), totals
