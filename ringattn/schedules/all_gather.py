"""AllGather: all keys that a rank needs come at once, from each owner the ranges that its mask touches.

One exchange, behind which the rank's own keys are attended to, where the ring and the route have one a peer: the fewest
waits, and the most memory. In slices of key heads (`plans.slices`) both are bounded: the exchange of the next slice
travels while one is computed, and two slices lie there at a time. What a rank does not need it is not sent; where all
need everything, as under a full mask, the exchange says that it is an all-gather, and that of the gradients, where it
brings nothing else, that it is an all-to-all: they are added up by the owners of their keys, in the order of the ranks,
which a reduce-scatter's sum is not. (All-gather context parallelism: Llama 3, arXiv 2407.21783, section 3.3.2.)
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn.bands import Array
from ringattn.checking import integer
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.schedules.base import Schedule


@dataclasses.dataclass(frozen=True)
class AllGather(Schedule):
    """Ask all owners at once.

    Attributes:
        slices: of the key heads, which come one after the other; as many as there are key heads if those are fewer.
    """

    slices: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "slices", integer(self.slices, "slices", least=1))

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        phases: Array = (q_ranks != k_ranks).astype(np.int64)
        return phases

    def moves(self, demand: Demand, rank: int) -> Moves:
        _, owner, start, stop = demand.keys_needed_by(rank).T
        one = np.ones_like(owner)
        receives = np.stack([one, owner, owner, start, stop], axis=1)[owner != rank]
        user, _, start, stop = demand.keys_requested_from(rank).T
        one = np.ones_like(user)
        sends = np.stack([one, user, 0 * one, rank * one, start, stop], axis=1)[user != rank]
        return Moves(receives, sends, collective="all_gather" if demand.of_all_for_all else None)

    def received_tokens(self, requested: Array, size: int) -> int:
        foreign = requested[requested[:, Q_RANK] != requested[:, K_RANK]]
        return int((foreign[:, 3] - foreign[:, 2]).sum())

    @property
    def head_slices(self) -> int:
        return self.slices

    def for_heads(self, kv_heads: int) -> AllGather:
        return dataclasses.replace(self, slices=min(self.slices, kv_heads))

    def __str__(self) -> str:
        return "allgather"
