"""Plans in which heads are exchanged for sequence: a swap around the plan of a ring of groups."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from ringattn import layouts
from ringattn.bands import Array
from ringattn.errors import InputError, PlanError
from ringattn.payloads.keys import Keys
from ringattn.plans import cost, verification
from ringattn.plans.cost import Memory, Traffic
from ringattn.plans.deal import Part
from ringattn.plans.exchanges import Exchange, Item, Step
from ringattn.plans.plan import Plan
from ringattn.plans.swap import INPUT_GRADS, INPUTS, OUTPUT, OUTPUT_GRAD, RESULTS, Message, Swap
from ringattn.plans.tiles import NO_TILES

PART, SLICE = 1 << 24, 1 << 40  # phases apart: those of a part's plan along the ring, of a slice's parts


@dataclasses.dataclass(frozen=True, eq=False)
class UlyssesPlan(Plan):
    """One rank's part of one call, whose ranks are numbered along both axes.

    Its tiles, and what it receives and sends along the ring, are in rows of its group's tokens, which all members of
    the group share, each computing some of the heads.

    Attributes:
        inner: the same as a rank of its ring alone, of any heads: its shape is not set.
        swap: what goes before it and after it.
    """

    inner: Plan = dataclasses.field(kw_only=True)
    swap: Swap = dataclasses.field(kw_only=True)

    @property
    def area(self) -> int:
        """Allowed pairs this rank computes: all of its group's queries, of its own heads."""
        return self.inner.area

    @property
    def over_keys(self) -> UlyssesPlan:
        shape = self.shape and dataclasses.replace(self.shape, value_dim=0)
        return dataclasses.replace(self, shape=shape, inner=self.inner.over_keys)

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The forward pass: for every slice of heads an all-to-all, the ring for each part, an all-to-all."""
        return tuple(self._around(self.inner.steps))

    @functools.cached_property
    def backward_steps(self) -> tuple[Step, ...]:
        """The backward pass."""
        return tuple(self._around(self.inner.backward_steps))

    def _around(self, inner: Sequence[Step]) -> Iterator[Step]:
        """The steps, whose exchanges have phases that go on from slice to slice, on all ranks alike.

        One after the other; the engine has the all-to-alls of other slices travel behind a slice's steps.
        """
        for nth, (parts, (outward, homeward)) in enumerate(zip(self.swap.parts, self.swaps, strict=True)):
            first = nth * SLICE
            yield Step(outward, 0, NO_TILES)
            for at in range(len(parts)):
                share = self.swap.share(parts[at : at + 1])
                for step in inner:
                    phase = first + 1 + at * PART + step.exchange.phase
                    exchange = self._in_sequence(phase, step.exchange, share)
                    yield dataclasses.replace(step, exchange=exchange, share=step.share * share)
            yield Step(homeward, 0, NO_TILES)

    @functools.cached_property
    def swaps(self) -> list[tuple[Exchange, Exchange]]:
        """The all-to-alls before every slice of heads, and after it."""
        swap, found = self.swap, []
        for nth in range(swap.slices):
            outward = self._swapped(nth, nth * SLICE, *swap.outward(nth))
            found.append((outward, self._swapped(nth, nth * SLICE + SLICE - 1, *swap.homeward(nth))))
        return found

    def _in_sequence(self, phase: int, exchange: Exchange, share: float) -> Exchange:
        """An exchange along the ring for a part of the heads, its peers numbered as ranks of the sequence."""
        size, place = len(self.swap.members), self.swap.place
        sends, receives = (
            tuple(dataclasses.replace(x, peer=x.peer * size + place, share=x.share * share) for x in items)
            for items in (exchange.sends, exchange.receives)
        )
        return Exchange(phase, sends, receives, exchange.collective)

    def _swapped(self, nth: int, phase: int, given: Sequence[Message], got: Sequence[Message]) -> Exchange:
        """An all-to-all of a slice."""

        def items(messages: Sequence[Message]) -> tuple[Item, ...]:
            return tuple(
                _Swapped(m.peer, Keys(), False, np.array([[0, 0, m.tokens]]), share=self.swap.share(m.parts))
                for m in messages
                if m.parts and m.tokens
            )

        return Exchange(phase, items(given), items(got), self.swap.collective(nth))

    @functools.cached_property
    def inner_plans(self) -> list[tuple[Part, Plan]]:
        """The inner plan of each part of this rank's heads."""
        found = []
        for part in (part for parts in self.swap.parts for part in parts):
            shape = self.shape and self.shape.of_heads(part.heads, part.kv_heads)
            found.append((part, dataclasses.replace(self.inner, shape=shape)))
        return found

    def verify(self) -> None:
        heads = None if self.shape is None else self.shape.heads
        group = self.inner.rank
        queries, keys = (layouts.positions(spans, group) for spans in (self.inner.q_spans, self.inner.k_spans))
        self.swap.verify(queries, keys, self.q_spans, self.k_spans, heads)
        self.inner.verify()

    def traffic(self) -> Traffic:
        """What this rank moves, without extras that are asked for, and tensors of the mechanism that are sharded.

        Tokens are key positions, counted once however few of their heads travel.
        """
        inner, swap = [plan.traffic() for _, plan in self.inner_plans], self.swap
        ways = [(swap.outward(nth), swap.homeward(nth)) for nth in range(swap.slices)]

        def size(name: str, side: int, outward: Sequence[str], homeward: Sequence[str]) -> int | None:
            if self.shape is None:
                return None
            around = ((out[side], outward) for out, _ in ways), ((home[side], homeward) for _, home in ways)
            swapped = sum(swap.bytes(self.shape, m, what) for way in around for messages, what in way for m in messages)
            return swapped + sum(int(getattr(x, name)) for x in inner)

        results = OUTPUT if swap.keep else RESULTS
        again = OUTPUT_GRAD if swap.keep else (*INPUTS, *RESULTS, *OUTPUT_GRAD)
        sent, received = (sum(m.key_tokens for m in ways[0][0][side]) if inner else 0 for side in (0, 1))
        of_queries = [m for _, home in ways for m in home[0] if m.parts and m.tokens]
        of_both = [m for out, _ in ways for m in out[0] if m.parts and m.tokens + m.key_tokens]
        back = [m for _, home in ways for m in home[0] if m.parts and m.tokens + m.key_tokens]
        there = of_both if not swap.keep else [m for out, _ in ways for m in out[0] if m.parts and m.tokens]
        along = inner[0] if inner else dataclasses.replace(self.inner, shape=None).traffic()
        crossing = [m for m in ways[0][0][1] if self._crosses(m.peer)] if inner else []
        return dataclasses.replace(
            along,
            messages=len(of_both) + len(of_queries) + sum(x.messages for x in inner),
            sent_tokens=sent + along.sent_tokens,
            received_tokens=received + along.received_tokens,
            sent_bytes=size("sent_bytes", 0, INPUTS, results),
            received_bytes=size("received_bytes", 1, INPUTS, results),
            backward_messages=len(there) + len(back) + sum(x.backward_messages for x in inner),
            backward_sent_bytes=size("backward_sent_bytes", 0, again, INPUT_GRADS),
            backward_received_bytes=size("backward_received_bytes", 1, again, INPUT_GRADS),
            between_nodes_tokens=along.between_nodes_tokens + sum(m.key_tokens for m in crossing),
            between_nodes_messages=sum(self._crosses(m.peer) for m in (*of_both, *of_queries))
            + sum(x.between_nodes_messages for x in inner),
        )

    def _crosses(self, peer: int) -> bool:
        """Whether a rank is of another node."""
        return self.node is not None and peer // self.node != self.rank // self.node

    def memory(self) -> Memory:
        """Every buffer of a call, inputs and results included, in bytes.

        What was gathered is there for one slice, or for all of them where it is kept.
        """
        shape, swap = self.shape, self.swap
        if shape is None:
            raise InputError("A plan's memory depends on its shape; give heads, head_dims and dtype when planning.")

        def size(messages: Sequence[Message], what: Sequence[str]) -> int:
            return sum(swap.bytes(shape, message, what) for message in messages)

        own = Message(self.rank, self.tokens, self.key_tokens, (Part(0, shape.heads, 0, shape.kv_heads),))
        whole = [Message(self.rank, self.inner.tokens, self.inner.key_tokens, parts) for parts in swap.parts if parts]
        largest = [max(whole, key=lambda m: size([m], INPUTS))] if whole else []
        gathered = whole if swap.keep else largest
        rows = sum(m.tokens * part.heads for m in (own, *gathered) for part in m.parts)
        mine = [Message(self.rank, self.tokens, self.key_tokens, parts) for parts in swap.parts]

        def most(side: int, what: Sequence[str], beside: Sequence[Message]) -> int:
            ways = (swap.outward(nth)[side] for nth in range(swap.slices))
            return max(
                (size([*messages, *beside[nth : nth + 1]], what) for nth, messages in enumerate(ways)), default=0
            )

        returned = size([own], INPUTS)
        buffers = {
            "q, k, v": size([own], INPUTS),
            "out": size([own], OUTPUT),
            "log-sum-exp": rows * shape.batch * shape.accumulator,
            "gradient of out": size([own], OUTPUT_GRAD),
            "returned dq, dk, dv": returned * shape.accumulator // shape.itemsize if swap.adds_up else returned,
            "gathered q, k, v": size(gathered, INPUTS),
            "gathered out": size(gathered, OUTPUT),
            "gathered gradient of out": size(largest, OUTPUT_GRAD),
            "messages outward": most(0, INPUTS, ()) + most(1, INPUTS, ()),
            "messages homeward": most(1, INPUT_GRADS, mine) + most(0, INPUT_GRADS, ()),
        }
        along = max((plan.memory() for _, plan in self.inner_plans), key=lambda x: x.total, default=Memory({}))
        return Memory(buffers | {name: x for name, x in along.buffers.items() if name not in buffers})

    def explain(self) -> str:
        """The plan in words."""
        moved = self.traffic()
        lines = [
            f"rank {self.rank} of {self.size}, {self.description}",
            f"  {self.tokens} queries, {self.key_tokens} keys, {self.area} allowed pairs of its group's "
            f"{self.inner.tokens} queries, plan {self.hash}",
            f"  {self.swap.described}",
        ]
        lines += [f"  {self.reason}"] if self.reason else []
        if self.shape is not None:
            lines.append(
                f"  {moved.received_bytes} bytes received forward, {moved.backward_received_bytes} backward; "
                f"{self.memory().total} bytes of memory at the peak"
            )
        lines.append("  along the ring, for each part of the heads:")
        return "\n".join([*lines, *(f"  {line}" for line in cost.explain(self.inner).splitlines())])

    @functools.cached_property
    def hash(self) -> str:
        """A fingerprint of everything the plan does, 16 hexadecimal digits."""
        swap = self.swap
        h = hashlib.blake2b(repr((self.inner.hash, swap.rank, swap.dealt, self.shape)).encode(), digest_size=8)
        h.update(f"{swap.keep}, {swap.gradient_wire}".encode())
        for rows in (swap.q_rows, swap.k_rows):
            h.update(repr(rows.shape).encode() + np.ascontiguousarray(rows).tobytes())
        return h.hexdigest()


class _Swapped(Item):
    """A message of an all-to-all: some heads of a rank's tokens."""

    @property
    def words(self) -> str:
        return f"{self.rows} tokens of some heads"


def composed(
    inner: Plan, swap: Swap, size: int, q_spans: Array, k_spans: Array, description: str, node: int | None
) -> UlyssesPlan:
    """The plan of a rank that does this as one of its ring.

    Args:
        size: ranks that share the sequence.
        q_spans, k_spans: who of them holds which queries and keys.
        node: how many of them share a node.
    """
    known = {field.name: getattr(inner, field.name) for field in dataclasses.fields(Plan)}
    ranks, place = len(swap.members), swap.place
    for name, columns in (("receives", [1, 2]), ("sends", [1]), ("grad_sends", [1]), ("grad_receives", [1])):
        known[name] = known[name].copy()
        known[name][:, columns] = known[name][:, columns] * ranks + place
    known |= {"rank": swap.rank, "size": size, "q_spans": q_spans, "k_spans": k_spans, "description": description}
    known |= {"node": node}
    return UlyssesPlan(**known, inner=inner, swap=swap)


def verify(plans: Sequence[Plan]) -> None:
    """Checks every rank's plan, and that together they match, return all gradients and cannot deadlock.

    Raises:
        InputError: ``plans`` is no list of plans, or empty.
        PlanError: says which rank, phase and rows.
    """
    if not isinstance(plans, (list, tuple)) or not plans or not all(isinstance(plan, UlyssesPlan) for plan in plans):
        verification.verify(plans)
        return
    size, groups = len(plans), [plan for plan in plans if isinstance(plan, UlyssesPlan)]
    if [plan.rank for plan in plans] != list(range(size)) or {plan.size for plan in plans} != {size}:
        raise PlanError(f"verify takes every rank's plan, in order; got ranks {[plan.rank for plan in plans]}.")
    for plan in groups:
        leader = groups[plan.swap.members[0]]
        for other in (groups[0], leader):
            plan.swap.verify_alike(other.swap)
        if plan.inner.hash != leader.inner.hash:
            raise PlanError(f"Rank {plan.rank} and rank {leader.rank} of its group do not do the same along the ring.")
        if plan is leader or plan.inner is not leader.inner:
            plan.verify()
    name, swaps = "heads for sequence", [[x for both in plan.swaps for x in both if x] for plan in groups]
    members = [plan.swap.members for plan in groups]
    verification.verify_exchanges(name, swaps, verification.paired(name, swaps), members)
    verification.verify([plan.inner for plan in groups[:: len(groups[0].swap.members)]])
