"""Plans of wavefronts: `plan_wave` makes them, and what can be asked of them is as of other plans."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from ringattn.bands import Array
from ringattn.errors import InputError, UnsupportedError
from ringattn.layouts import COUNT, START, STRIDE
from ringattn.masks import Full, Mask, Window
from ringattn.mechanisms.ordered import Ordered
from ringattn.plans.cost import Memory, Traffic
from ringattn.plans.coverage import Keys
from ringattn.plans.grid import used_rows
from ringattn.plans.plan import Plan
from ringattn.plans.planning import flat_plan
from ringattn.plans.shape import Shape
from ringattn.plans.shaping import shape_of
from ringattn.plans.wavefront import (
    BACKWARD,
    FORWARD,
    Parcel,
    QueryBlock,
    Wavefront,
    WaveStep,
    Way,
    What,
    steps_of,
    verify_wave,
)
from ringattn.schedules.route import Route
from ringattn.schedules.wave import Wave
from ringattn.sharding import Sharding

NOTHING = Traffic(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class WavePlan(Wavefront):
    """One rank's part of one call, as `plan_wave` makes it."""

    def verify(self) -> None:
        """Checks this rank's part: see `wavefront.verify_wave`. Raises PlanError."""
        verify_wave(self)

    def ends(self, way: Way) -> bool:
        """Whether blocks come to their end here."""
        return self.rank == (self.size - 1 if way is FORWARD else 0)

    @functools.cached_property
    def arrivals(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Of each phase of the window, where among the keys before this rank's own its rows belong, and which rows."""
        if self.window is None:
            return {}
        keys, found = Keys(self.window.k_spans), {}
        for phase in self.window.tiles:
            if phase:
                rows, positions = used_rows(self.window, phase, keys)
                found[phase] = torch.from_numpy(positions - self.first_key + self.before), torch.from_numpy(rows)
        return found

    def numbers(self, what: What) -> tuple[int, int]:
        """Of what travels: numbers for each query of all sequences and heads, and the bytes of one."""
        shape = self._shaped
        sizes: dict[What, tuple[int, int]] = {
            "queries": (shape.dim, shape.itemsize),
            "left": (1, 8),
            "partial outputs": (shape.value_dim, shape.accumulator),
            "outputs": (shape.value_dim, shape.itemsize),
            "output gradients": (shape.value_dim, shape.itemsize),
            "left gradients": (1, 8),
            "partial query gradients": (shape.dim, shape.accumulator),
            "query gradients": (shape.dim, shape.itemsize),
        }
        each, itemsize = sizes[what]
        return shape.batch * shape.heads * each, itemsize

    @property
    def _shaped(self) -> Shape:
        if self.shape is None:
            raise InputError("A plan's bytes depend on its shape; give heads, head_dims and dtype when planning.")
        return self.shape

    def traffic(self) -> Traffic:
        """What this rank moves: messages, key positions of the window, and, where the shape is known, bytes."""
        window = NOTHING if self.window is None else self.window.traffic()
        return dataclasses.replace(
            window,
            messages=window.messages + sum(len(step.sends) for step in self.forward),
            sent_bytes=self._bytes(window.sent_bytes, self.forward, "sends"),
            received_bytes=self._bytes(window.received_bytes, self.forward, "receives"),
            backward_messages=window.backward_messages + sum(len(step.sends) for step in self.backward),
            backward_sent_bytes=self._bytes(window.backward_sent_bytes, self.backward, "sends"),
            backward_received_bytes=self._bytes(window.backward_received_bytes, self.backward, "receives"),
        )

    def _bytes(
        self, of_window: int | None, steps: Sequence[WaveStep], side: Literal["sends", "receives"]
    ) -> int | None:
        """The payload of one side of a pass."""
        if self.shape is None or of_window is None:
            return None
        return of_window + sum(self._size(parcel) for step in steps for parcel in getattr(step, side))

    def _size(self, parcel: Parcel) -> int:
        numbers, itemsize = self.numbers(parcel.what)
        return self.blocks[parcel.block].count * numbers * itemsize

    def memory(self) -> Memory:
        """Every buffer of a call, inputs and results included, in bytes; of a block's planes the most there are."""
        shape = self._shaped
        heads, rows = shape.batch * shape.heads, max((x.count for x in self.blocks), default=0)
        keys, dims = (self.before + self.key_tokens) * shape.batch * shape.kv_heads, shape.dim + shape.value_dim
        own = self.tokens * heads * dims + self.key_tokens * shape.batch * shape.kv_heads * dims
        plane, skewed = rows * (self.before + self.key_tokens) * heads * 8, (rows + self.key_tokens) * rows * heads * 8
        planes = 8 if self.window is None else 17  # softmax over windows needs as many again
        return Memory(
            {
                "q, k, v, out": own * shape.itemsize,
                "gradients of them": own * shape.itemsize,
                "keys and values in float64": keys * dims * 8,
                "their gradients in float64": keys * dims * 8,
                "kept: left of every block": self.queries * heads * 8,
                "kept: above every block": len(self.blocks) * self.key_tokens * heads * 8,
                "a block's queries, outputs and gradients": 4 * rows * heads * dims * 8,
                "a block's planes": planes * plane + 6 * skewed,
            }
        )

    def explain(self) -> str:
        """The plan in words, a line a step of the forward pass."""
        moved, largest = self.traffic(), max((x.count for x in self.blocks), default=0)
        lines = [
            f"rank {self.rank} of {self.size}, {self.description}",
            f"  {self.tokens} queries, {self.key_tokens} keys, {self.queries * self.key_tokens} allowed pairs, "
            f"plan {self.hash}",
            f"  receives {moved.received_tokens} key positions, sends {moved.sent_tokens}; works on "
            f"{len(self.blocks)} blocks of up to {largest} queries, in {self.steps} steps, and waits in "
            f"{self.size - 1} of them ({self.waiting:.0%})",
        ]
        if self.shape is not None:
            memory = self.memory()
            kept = sum(size for name, size in memory.buffers.items() if name.startswith("kept"))
            lines.append(
                f"  {moved.received_bytes} bytes received forward, {moved.backward_received_bytes} backward; "
                f"{memory.total} bytes of memory at the peak, {kept} of them kept for the backward pass"
            )
        for step in self.forward:
            parts = [*_said("send", "to", step.sends), *_said("receive", "from", step.receives)]
            if step.block is not None:
                rows = self.blocks[step.block].count
                parts.append(f"compute block {step.block}, {rows * self.key_tokens} pairs, over its own keys")
            lines.append(f"  step {step.number}: " + "; ".join(parts))
        return "\n".join(lines)


def _said(verb: str, side: str, parcels: Sequence[Parcel]) -> Iterator[str]:
    for (block, peer), them in itertools.groupby(parcels, lambda x: (x.block, x.peer)):
        yield f"{verb} {', '.join(x.what for x in them)} of block {block} {side} rank {peer}"


def plan_wave(
    sharding: Sharding,
    kv_sharding: Sharding | None = None,
    *,
    mechanism: Ordered,
    schedule: Wave = Wave(),  # noqa: B008 (an immutable value)
    mask: Mask = Full(),  # noqa: B008
    heads: tuple[int, int] | None = None,
    head_dims: tuple[int, int] | None = None,
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
) -> WavePlan:
    """This rank's plan.

    Args:
        sharding, kv_sharding: who holds the queries, and who the keys where they are another sequence. Both contiguous.
        mechanism: what will attend.
        mask: of all pairs; there to refuse others.
        heads, head_dims, dtype, batch: as for `ringattn.plan`: by them the plan knows its bytes.

    Raises:
        InputError: the shardings are not of one mesh.
        UnsupportedError: another mask, or another layout.
    """
    keys = sharding if kv_sharding is None else kv_sharding
    if sharding.mesh != keys.mesh:
        raise InputError(f"Queries and keys must be sharded over the same mesh; got {sharding.mesh} and {keys.mesh}.")
    if not isinstance(mask, Full):
        raise UnsupportedError(
            f"{type(mechanism).__name__} searches all keys from the first on; got the mask {mask}. Use "
            f"ringattn.Full(), and a call of its own for each document."
        )
    for what, each in (("queries", sharding), ("keys", keys)):
        if not _in_order(each.spans):
            raise UnsupportedError(
                f"{schedule} hands blocks of queries from rank to rank in the order of the keys, so both are "
                f"contiguous; got {what} {each.layout}. Use ringattn.Sharding(length, mesh, 'contiguous')."
            )
    shape = shape_of(heads, head_dims, dtype, batch)
    rank, size = sharding.mesh.sequence_rank, sharding.mesh.sequence_size
    blocks = tuple(
        QueryBlock(home, start, min(start + schedule.block, count))
        for home, count in enumerate(sharding.counts)
        for start in range(0, count, schedule.block)
    )
    also = "" if keys == sharding else f", {keys.length} keys {keys.layout}"
    return WavePlan(
        rank,
        size,
        blocks,
        tuple(keys.counts),
        f"{schedule}: {mask}, {sharding.length} tokens {sharding.layout}{also}, {size} ranks",
        tuple(steps_of(rank, size, blocks, FORWARD)),
        tuple(steps_of(rank, size, blocks, BACKWARD)),
        _window(mechanism.reach, keys, shape),
        shape,
    )


def _in_order(spans: Array) -> bool:
    """Whether ranks hold runs of positions, in their own order."""
    runs = (spans[:, STRIDE] == 1) | (spans[:, COUNT] == 1)
    return bool(runs.all() and (spans[:, START] == np.cumsum(spans[:, COUNT]) - spans[:, COUNT]).all())


def _window(reach: int, keys: Sharding, shape: Shape | None) -> Plan | None:
    """The plan by which each rank gets the keys before its own."""
    if not reach:
        return None
    made = flat_plan(Window(reach, 0), keys, Route(), keys)
    return dataclasses.replace(made, shape=shape)
