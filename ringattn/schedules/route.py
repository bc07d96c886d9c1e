"""Route: every rank gets from each owner exactly the key positions that its queries' mask touches.

Nothing is received that is not used, which no schedule that moves keys and values can better. The messages are put into
few exchanges, by all ranks alike (`plans.stages`): in none of them more arrives at a rank than a buffer of about a
shard holds. Gradients go back the way the keys came: straight home, or between nodes as one sum (`plans.transfers`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ringattn import layouts
from ringattn.bands import Array
from ringattn.checking import flag, integer
from ringattn.plans.assembly import Moves, Returns
from ringattn.plans.demand import Demand
from ringattn.plans.stages import Limits
from ringattn.plans.tiles import K_RANK, Q_RANK
from ringattn.plans.transfers import Transfers, transfers
from ringattn.schedules.base import Schedule

SHARDS = 1.25  # of the largest size: the buffer where nothing else is said
MANY = 1 << 19  # ranges of keys: where all ranks together need more, nearly all of them meet


@dataclasses.dataclass(frozen=True)
class Route(Schedule):
    """Ask the owner for what the mask needs.

    Attributes:
        stages: exchanges among which the busiest link's messages are spread evenly, so that some travel behind the
            tiles of others; None for as few as the buffer allows. Messages that do not fit together may take more.
        buffer: key positions that arrive at a rank in one exchange at most (a message of more comes alone), and leave
            it; None for those of a shard and a quarter. Two such buffers take turns.
        node_aware: what several ranks of a node need of another node crosses once, to one of them, and is passed on.
            That costs messages within the node, and buffers that are held longer. See `Mesh.node`.
    """

    stages: int | None = None
    buffer: int | None = None
    node_aware: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, needed in (("stages", "a number of exchanges"), ("buffer", "a number of key positions")):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(getattr(self, name), f"Route's {name}", least=1, needed=needed))
        object.__setattr__(self, "node_aware", flag(self.node_aware, "Route's node_aware"))

    @property
    def asks_for_nodes(self) -> bool:
        return self.node_aware

    def phases(self, demand: Demand, q_ranks: Array, k_ranks: Array) -> Array:
        moved = self._transfers(demand)
        if moved is not None:
            return moved.phases(q_ranks, k_ranks)
        phases: Array = -(-((q_ranks - k_ranks) % demand.size) // self._distances(demand))
        return phases

    def moves(self, demand: Demand, rank: int) -> Moves:
        moved = self._transfers(demand)
        if moved is None:
            return self._by_distance(demand, rank)
        into, out = moved.received_by(rank), moved.sent_by(rank)
        _, *row = moved.rows[into].T
        user, *part = moved.rows[out].T
        phase, sender, source = moved.phase[into], moved.sender[into], moved.source[out]
        return Moves(
            np.stack([phase, sender, *row], axis=1),
            np.stack([moved.phase[out], user, source, *part], axis=1),
            Returns(
                np.stack([moved.back[into], sender, phase, *row], axis=1),
                np.stack([moved.back[out], user, source, *part], axis=1),
            ),
        )

    def _by_distance(self, demand: Demand, rank: int) -> Moves:
        needed, requested = demand.keys_needed_by(rank), demand.keys_requested_from(rank)
        _, owner, start, stop = needed[needed[:, K_RANK] != rank].T
        user, _, first, last = requested[requested[:, Q_RANK] != rank].T
        received, me = self.phases(demand, np.full_like(owner, rank), owner), np.full_like(user, rank)
        return Moves(
            np.stack([received, owner, owner, start, stop], axis=1),
            np.stack([self.phases(demand, user, me), user, 0 * user, me, first, last], axis=1),
        )

    def received_tokens(self, requested: Array, size: int) -> int:
        foreign = requested[requested[:, Q_RANK] != requested[:, K_RANK]]
        return int((foreign[:, 3] - foreign[:, 2]).sum())

    def _limits(self, demand: Demand) -> Limits:
        buffer = int(SHARDS * demand.memo(_shard)) if self.buffer is None else self.buffer
        return Limits(self.stages, buffer, demand.node)

    def _distances(self, demand: Demand) -> int:
        """How many distances share an exchange where all ranks meet."""
        fit = max(self._limits(demand).buffer // max(demand.memo(_shard), 1), 1)
        return fit if self.stages is None else max(min(fit, -(-(demand.size - 1) // self.stages)), 1)

    def _transfers(self, demand: Demand) -> Transfers | None:
        return demand.memo(_transfers, self._limits(demand), 1 + self.lookahead, self.node_aware)

    def __str__(self) -> str:
        given = [f"{name}={getattr(self, name)}" for name in ("stages", "buffer") if getattr(self, name) is not None]
        given += ["node_aware"] if self.node_aware else []
        return f"route({', '.join(given)})" if given else "route"


def _shard(demand: Demand) -> int:
    """Keys of the largest shard."""
    return int(layouts.counts(demand.k_spans, demand.size).max(initial=0))


def _transfers(demand: Demand, limits: Limits, lag: int, relayed: bool) -> Transfers | None:
    """None where so many ranks meet, or get so little of each other, that they do by distance."""
    needed = demand.needed_by_all(MANY)
    if needed is None and relayed:
        requested = np.concatenate(list(demand.keys_requested_from_all()))
        needed = requested[np.lexsort((requested[:, 2], requested[:, K_RANK], requested[:, Q_RANK]))]
    return None if needed is None else transfers(needed, demand.size, limits, lag, relayed)
