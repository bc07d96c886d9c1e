"""Route: every rank gets from each owner exactly the key positions that its queries' mask touches.

Nothing is received that is not used, which no schedule that moves keys and values can better. The messages are put into
few exchanges, by all ranks alike (`plans.stages`): in none of them more arrives at a rank than a buffer of a few shards
holds. Gradients go straight home.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn import layouts
from ringattn.bands import Array
from ringattn.checking import integer
from ringattn.plans.assembly import Moves
from ringattn.plans.demand import Demand
from ringattn.plans.stages import Limits, Stages, staged
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.schedules.base import Schedule

SHARDS = 2  # of the largest size: the buffer where nothing else is said
MANY = 1 << 19  # ranges of keys: where all ranks together need more, nearly all of them meet


@dataclasses.dataclass(frozen=True)
class Route(Schedule):
    """Ask the owner for what the mask needs.

    Attributes:
        stages: exchanges among which the busiest link's messages are spread evenly, so that some travel behind the
            tiles of others; None for as few as the buffer allows. Messages that do not fit together may take more.
        buffer: key positions that arrive at a rank in one exchange at most (a message of more comes alone), and leave
            it; None for those of two shards. Two such buffers take turns.
    """

    stages: int | None = None
    buffer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, needed in (("stages", "a number of exchanges"), ("buffer", "a number of key positions")):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(getattr(self, name), f"Route's {name}", least=1, needed=needed))

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        stages = demand.memo(_stages, self._limits(demand))
        if stages is None:
            return -(-((q_ranks - k_ranks) % demand.size) // self._distances(demand))
        return stages.of(q_ranks, k_ranks)

    def moves(self, demand: Demand, rank: int) -> Moves:
        needed, requested = demand.keys_needed_by(rank), demand.keys_requested_from(rank)
        _, owner, start, stop = needed[needed[:, K_RANK] != rank].T
        user, _, first, last = requested[requested[:, Q_RANK] != rank].T
        received, me = self.phases(demand, np.full_like(owner, rank), owner), np.full_like(user, rank)
        sent = self.phases(demand, user, me)
        return Moves(
            np.stack([received, owner, owner, start, stop], axis=1),
            np.stack([sent, user, 0 * user, me, first, last], axis=1),
        )

    def received_tokens(self, requested: Array, size: int) -> int:
        foreign = requested[requested[:, Q_RANK] != requested[:, K_RANK]]
        return int((foreign[:, 3] - foreign[:, 2]).sum())

    def _limits(self, demand: Demand) -> Limits:
        buffer = SHARDS * demand.memo(_shard) if self.buffer is None else self.buffer
        return Limits(self.stages, buffer, demand.node)

    def _distances(self, demand: Demand) -> int:
        """How many distances share an exchange where all ranks meet."""
        fit = max(self._limits(demand).buffer // max(demand.memo(_shard), 1), 1)
        return fit if self.stages is None else max(min(fit, -(-(demand.size - 1) // self.stages)), 1)

    def __str__(self) -> str:
        given = [f"{name}={getattr(self, name)}" for name in ("stages", "buffer") if getattr(self, name) is not None]
        return f"route({', '.join(given)})" if given else "route"


def _shard(demand: Demand) -> int:
    """Keys of the largest shard."""
    return int(layouts.counts(demand.k_spans, demand.size).max(initial=0))


def _stages(demand: Demand, limits: Limits) -> Stages | None:
    """None where so many ranks meet, or get so little of each other, that they do by distance."""
    needed = demand.needed_by_all(MANY)
    return None if needed is None else staged(needed, demand.size, limits)
