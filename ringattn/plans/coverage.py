"""Coverage by fingerprint: which keys a query computes, and which its mask allows, as one number each.

Every key position gets a fixed pseudo-random 64-bit weight; for each query the weights of the keys its tiles compute
are summed modulo 2^64 and compared with the sum over the keys its mask allows. A dropped, doubled or shifted pair
changes the sum except with probability 2^-64, and the query at fault is known.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ringattn import bands, layouts
from ringattn.bands import Array, Regions
from ringattn.errors import InputError
from ringattn.plans import tiles
from ringattn.plans.steps import RECV_ORIGIN, RECV_PHASE, RECV_STOP, Program

Weights = npt.NDArray[np.uint64]
MAX_KEYS = 1 << 31  # 16 GB of weights


class Keys:
    """The global positions of every rank's keys, and their weights, worked out once for all plans of a call."""

    def __init__(self, spans: Array) -> None:
        self._spans = spans
        self._positions: dict[int, Array] = {}
        self._prefixes: dict[int, Weights] = {}

    def positions(self, rank: int) -> Array:
        """Those of one rank, in the order of its rows."""
        if rank not in self._positions:
            self._positions[rank] = layouts.positions(self._spans, rank)
        return self._positions[rank]

    def in_buffer(self, plan: Program, phase: int) -> list[Array]:
        """Those of what lies in a rank's buffer of a phase, one array a receive."""
        if phase == 0:
            return [self.positions(plan.rank)]
        first, last = np.searchsorted(plan.receives[:, RECV_PHASE], [phase, phase + 1])
        receives = plan.receives[first:last, RECV_ORIGIN : RECV_STOP + 1].tolist()
        return [self.positions(origin)[start:stop] for origin, start, stop in receives]

    def prefix(self, stride: int) -> Weights:
        """Sums of weights along a stride: entry p is that of the positions p - s, p - 2s, …"""
        if stride not in self._prefixes:
            length = int(self._spans[:, layouts.COUNT].sum())
            if length > MAX_KEYS:
                raise InputError(
                    f"Plans of up to {MAX_KEYS:,} keys are verified, each by a number; these are {length:,}."
                )
            padded = np.zeros(-(-(length + stride) // stride) * stride, dtype=np.uint64)
            padded[stride : stride + length] = _weights(length)
            sums = np.cumsum(padded.reshape(-1, stride), axis=0, dtype=np.uint64)
            self._prefixes[stride] = sums.reshape(-1)
        return self._prefixes[stride]


def _weights(length: int) -> Weights:
    """A fixed pseudo-random weight of each position: the finaliser of splitmix64."""
    x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sums:
    """For every query of a rank, the summed weights and the number of some keys."""

    def __init__(self, queries: int) -> None:
        self._weights, self._counts = np.zeros(queries, dtype=np.uint64), np.zeros(queries, dtype=np.int64)
        # what runs of queries share is added where they begin, and taken off where they end
        self._weight_steps, self._count_steps = np.zeros(queries + 1, dtype=np.uint64), np.zeros(queries + 1, np.int64)

    def add(self, query: Array, prefix: Weights, first: Array, stop: Array, count: Array) -> None:
        """For each of these queries, the keys from ``first`` to before ``stop`` in a line of `Keys.prefix`."""
        np.add.at(self._weights, query, prefix[stop] - prefix[first])
        np.add.at(self._counts, query, count)

    def add_runs(self, start: Array, end: Array, prefix: Weights, first: Array, stop: Array, count: Array) -> None:
        """The same keys for all queries from ``start`` to before ``end``."""
        weight = prefix[stop] - prefix[first]
        np.add.at(self._weight_steps, start, weight)
        np.subtract.at(self._weight_steps, end, weight)
        np.add.at(self._count_steps, start, count)
        np.subtract.at(self._count_steps, end, count)

    @property
    def weights(self) -> Weights:
        return self._weights + np.cumsum(self._weight_steps, dtype=np.uint64)[:-1]

    @property
    def counts(self) -> Array:
        return self._counts + np.cumsum(self._count_steps)[:-1]


def sums_of_mask(regions: Regions, queries: Array, keys: Keys) -> Sums:
    """The keys that the mask's regions allow each of these queries, which ascend."""
    sums, prefix = Sums(len(queries)), keys.prefix(1)
    if not len(regions) or not len(queries):
        return sums
    q0, q1, k0, k1, lo, hi = regions.T
    # In the middle of a region, all its queries see all its keys.
    edges = np.stack([q0, np.clip(k1 + lo - 1, q0, q1), np.clip(k0 + hi + 1, q0, q1), q1])
    edges[2] = np.maximum(edges[1], edges[2])
    above, start, end, below = np.searchsorted(queries, edges)
    same = start < end
    sums.add_runs(start[same], end[same], prefix, k0[same], k1[same], (k1 - k0)[same])
    for first, stop in ((above, start), (end, below)):
        region, nth = bands.expand(stop - first)
        query = first[region] + nth
        low = np.maximum(k0[region], queries[query] - hi[region])
        high = np.minimum(k1[region], queries[query] - lo[region] + 1)
        sums.add(query, prefix, low, high, high - low)
    return sums


def sums_of_tiles(rows: Array, queries: int, keys: Keys) -> Sums:
    """The keys that these tiles compute for each of so many local queries."""
    sums = Sums(queries)
    for stride in np.unique(rows[:, tiles.K_STRIDE]).tolist():
        part, prefix = rows[rows[:, tiles.K_STRIDE] == stride], keys.prefix(stride)
        q, m, q_step, n, low, high = part[:, [tiles.Q, tiles.M, tiles.Q_STEP, tiles.N, tiles.LOW, tiles.HIGH]].T
        k = part[:, tiles.K_POSITION]
        # From row `start` to before row `end` of a tile, all its queries see all its keys.
        start = np.clip(n - 1 + low, 0, m)
        end = np.where(q_step == 1, np.clip(high + 1, start, m), start)
        same = start < end
        sums.add_runs((q + start)[same], (q + end)[same], prefix, k[same], (k + stride * n)[same], n[same])
        tile, i = bands.expand(m - end + start)
        i += np.where(i < start[tile], 0, (end - start)[tile])
        first = np.clip(i - high[tile], 0, n[tile])
        stop = np.maximum(first, np.minimum(n[tile], i - low[tile] + 1))
        at = k[tile]
        sums.add(q[tile] + i * q_step[tile], prefix, at + stride * first, at + stride * stop, stop - first)
    return sums
