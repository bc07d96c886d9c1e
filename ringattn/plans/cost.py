"""What plans cost: traffic, memory, balance, and the least that any plan could move."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ringattn.bands import K0, K1, Q0, Q1, Array, Regions
from ringattn.checking import MAX_RANKS, instance, integer, number, sequence
from ringattn.declared import WORDS
from ringattn.errors import InputError
from ringattn.masks import Mask
from ringattn.plans import tiles
from ringattn.plans.exchanges import Exchange, Item
from ringattn.plans.shape import Shape
from ringattn.plans.steps import Program

MAX_ROWS = 1 << 28  # of which `lower_bound` keeps some numbers each


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one rank moves in one call. Tokens are key positions, forward; bytes are payload, None without a shape.

    Attributes:
        messages, sent_tokens, received_tokens, sent_bytes, received_bytes: the forward pass.
        sent_summaries, received_summaries: the same where sums over keys travel in place of keys.
        backward_messages, backward_sent_bytes, backward_received_bytes: the backward pass, which moves keys and
            values once more, and returns their gradients.
        sent_queries, received_queries: the same where queries travel, and as many states and gradients come home.
        between_nodes_tokens, between_nodes_messages: of the forward pass, key positions that come from ranks of other
            nodes, and messages that go to them; 0 where all ranks share a node, or the mesh does not say which do.
    """

    messages: int
    sent_tokens: int
    received_tokens: int
    sent_summaries: int
    received_summaries: int
    sent_bytes: int | None
    received_bytes: int | None
    backward_messages: int
    backward_sent_bytes: int | None
    backward_received_bytes: int | None
    sent_queries: int = 0
    received_queries: int = 0
    between_nodes_tokens: int = 0
    between_nodes_messages: int = 0


def traffic(plan: Program) -> Traffic:
    """Counts the items of a plan's steps."""
    forward = [step.exchange for step in plan.steps if step.exchange]
    backward = [step.exchange for step in plan.backward_steps if step.exchange]
    shape = plan.shape
    wire = None if shape is None else shape.wire(plan.payload, plan.gradient_wire)

    def moved(side: str) -> list[Item]:
        """Each row once, whose heads may travel in slices."""
        return [x for each in forward for x in getattr(each, side) if not (x.gradient or x.slice)]

    def across(items: list[Item]) -> list[Item]:
        return [x for x in items if plan.node is not None and x.peer // plan.node != plan.rank // plan.node]

    def size(exchanges: list[Exchange], side: str) -> int | None:
        if shape is None or wire is None:
            return None
        there, back = (wire.there, wire.back) if exchanges is forward else (wire.backward_there, wire.backward_back)
        heads = shape.heads_of(plan.slices)
        items: list[Item] = [item for each in exchanges for item in getattr(each, side)]
        return sum(x.rows * heads[x.slice] * (back if x.gradient else there) for x in items) // shape.kv_heads

    sent, received = (sum(x.rows for x in moved(side)) for side in ("sends", "receives"))
    unit = "queries" if plan.queries_travel else "tokens" if plan.payload.per_key else "summaries"
    counted = {f"{side}_{x}": 0 for side in ("sent", "received") for x in ("tokens", "summaries", "queries")}
    return Traffic(
        messages=sum(len(x.sends) for x in forward),
        **{**counted, f"sent_{unit}": sent, f"received_{unit}": received},
        sent_bytes=size(forward, "sends"),
        received_bytes=size(forward, "receives"),
        backward_messages=sum(len(x.sends) for x in backward),
        backward_sent_bytes=size(backward, "sends"),
        backward_received_bytes=size(backward, "receives"),
        between_nodes_tokens=sum(x.rows for x in across(moved("receives"))) if unit == "tokens" else 0,
        between_nodes_messages=len(across([x for each in forward for x in each.sends])),
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of every buffer of one forward and backward pass, by name; see `memory` for what each holds."""

    buffers: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak, which is in the backward pass: all buffers are alive at once."""
        return sum(self.buffers.values())


def memory(plan: Program) -> Memory:
    """Every buffer of a call, inputs and results included, in bytes.

    The exchange's buffers are the plan's `buffer_rows`; ``kernel`` is what one launch over the largest step returns
    before it is added up: an output and a log-sum-exp forward, three gradients backward. Where queries travel, the
    buffers of gradients hold their states in the forward pass, and ``results`` those of one phase while they are made.
    """
    shape = plan.shape
    if shape is None:
        raise InputError("A plan's memory depends on its shape; give heads, head_dims and dtype when planning.")
    queries = plan.tokens * shape.batch * shape.heads
    keys = plan.key_tokens * shape.batch * shape.kv_heads
    wide, narrow = shape.accumulator, shape.itemsize
    inputs = queries * shape.dim + keys * (shape.dim + shape.value_dim)
    buffers = {
        "q, k, v": inputs * narrow,
        "out": queries * shape.value_dim * narrow,
        "log-sum-exp": queries * wide,
        "gradient of out": queries * shape.value_dim * narrow,
        "accumulated dq, dk, dv": inputs * wide,
        "returned dq, dk, dv": inputs * narrow if narrow != wide else 0,
        "kernel": _kernel_rows(plan, shape) * narrow,
    }
    rows, wire = plan.buffer_rows, shape.wire(plan.payload, plan.gradient_wire)
    widest = shape.heads_of(plan.slices)[0]

    def of_slice(size: int) -> int:
        """Of the bytes of a row, those of the widest slice."""
        return size * widest // shape.kv_heads

    travels, returns = of_slice(max(wire.there, wire.backward_there)), of_slice(max(wire.back, wire.backward_back))
    buffers |= {f"{plan.payload.name} {nth}": count * travels for nth, count in enumerate(rows.received)}
    buffers |= {f"gradients {nth}": count * of_slice(wire.held) for nth, count in enumerate(rows.gradients)}
    buffers["staging"] = rows.staging * travels
    buffers["gradient staging"] = rows.grad_staging * returns
    buffers["gradient arrivals"] = rows.grad_arrivals * returns
    if plan.queries_travel:
        buffers["results"] = max(rows.received, default=0) * wire.held
    return Memory(buffers)


def _kernel_rows(plan: Program, shape: Shape) -> int:
    """Numbers in the results of the largest backward launch: dq of its queries, dk and dv of its keys."""
    most = 0
    for phase, step_tiles in plan.tiles.items():
        if phase and not plan.payload.per_key:
            continue  # a launch is over keys
        rows = step_tiles.rows
        q = int((rows[:, tiles.Q] + rows[:, tiles.M]).max() - rows[:, tiles.Q].min())
        k = int((rows[:, tiles.K] + rows[:, tiles.N]).max() - rows[:, tiles.K].min())
        heads = shape.heads_of(plan.slices)[0] if phase else shape.kv_heads
        group = shape.heads // shape.kv_heads
        most = max(most, heads * (q * group * shape.dim + k * (shape.dim + shape.value_dim)))
    return most * shape.batch


def explain(plan: Program) -> str:
    """A plan in words: what it is, and a line a step."""
    moved = traffic(plan)
    received = moved.received_tokens + moved.received_summaries + moved.received_queries
    sent = moved.sent_tokens + moved.sent_summaries + moved.sent_queries
    home = ", and their states come home" if plan.queries_travel else ""
    lines = [
        f"rank {plan.rank} of {plan.size}, {plan.description}",
        f"  {plan.tokens} queries, {plan.key_tokens} keys, {plan.area} allowed pairs, plan {plan.hash}",
        f"  receives {received} {plan.payload.unit} in {len(plan.phase_rows) - 1} phases, "
        f"sends {sent} in {moved.messages} messages{home}",
    ]
    lines += [f"  {plan.reason}"] if plan.reason else []
    lines += [f"  key heads in {_sizes(plan)}, one after the other"] if plan.slices > 1 else []
    if plan.shape is not None:
        lines.append(
            f"  {moved.received_bytes} bytes received forward, {moved.backward_received_bytes} backward; "
            f"{memory(plan).total} bytes of memory at the peak"
        )
    for step in plan.steps:
        parts = []
        if step.exchange:
            parts += [f"as {WORDS[step.exchange.collective]}"] if step.exchange.collective else []
            parts += [f"send {_rows(plan, item)} to rank {item.peer}" for item in step.exchange.sends]
            parts += [f"receive {_rows(plan, item)} from rank {item.peer}" for item in step.exchange.receives]
        if step.tiles:
            own, over = ("its own queries", "for") if plan.queries_travel else ("its own keys", "over")
            where = own if step.phase == 0 else f"the {plan.payload.name} of phase {step.phase}"
            parts.append(f"compute {len(step.tiles)} tiles, {step.tiles.area} pairs, {over} {where}")
        lines.append(f"  phase {step.phase}: " + "; ".join(parts))
    return "\n".join(lines)


def _sizes(plan: Program) -> str:
    words = f"{plan.slices} slices"
    return words if plan.shape is None else f"{words} of {', '.join(map(str, plan.shape.heads_of(plan.slices)))}"


def _rows(plan: Program, item: Item) -> str:
    return f"{item.rows} {'states' if item.gradient and plan.queries_travel else 'rows'}"


@dataclasses.dataclass(frozen=True)
class Balance:
    """How even the ranks' shares are: each figure is the largest over the mean, 1.0 at best.

    Attributes:
        area: allowed pairs, which is time spent computing.
        tokens: queries held, which is memory and the rest of the model's time.
        received: key positions received; 1.0 where nobody receives anything.
        sent: key positions sent, which is also the load of returning gradients.
    """

    area: float
    tokens: float
    received: float
    sent: float


def balance(plans: Sequence[Program]) -> Balance:
    """The balance of all ranks' plans.

    Raises:
        InputError: ``plans`` is no list of plans, or empty.
    """
    sequence(plans, Program, "plans", "plans, as plan_all makes them")
    moved = [traffic(plan) for plan in plans]
    return Balance(
        area=_spread([plan.area for plan in plans]),
        tokens=_spread([plan.tokens for plan in plans]),
        received=_spread([t.received_tokens for t in moved]),
        sent=_spread([t.sent_tokens for t in moved]),
    )


def _spread(shares: list[int]) -> float:
    return max(shares) * len(shares) / sum(shares) if sum(shares) else 1.0


def lower_bound(mask: Mask, length: int, ranks: int, imbalance: float = 1.02) -> float:
    """The fewest key positions all ranks together must receive, whatever the layout and schedule.

    Holds for any scheme that moves keys and values only, in which no rank holds more than ``imbalance`` times the
    mean of tokens (T) or of allowed pairs (B). Take a set of queries and keys that touches no other. Of the ranks
    that hold some of its queries, order them by their last one: the ranks after the j-th from the end hold at most jT
    tokens and jB pairs, so its last query lies no earlier than where the remaining rows fit into that, and it needs
    as many keys as that row or a later one allows. All ranks together hold each key once. For one causal document of
    L tokens this is sum_j max(sqrt(L^2 - 2jB), L - jT) - L. It may not be attainable.
    """
    instance(mask, Mask, "mask", "a ringattn mask, such as ringattn.Causal()")
    ranks = integer(ranks, "ranks", least=1, below=MAX_RANKS + 1, needed="a number of ranks")
    length = integer(length, "A lower bound's length", below=MAX_ROWS, needed="a number of tokens")
    imbalance = number(imbalance, "imbalance", least=1.0)
    regions = np.concatenate(mask.classify(length, length))
    row_area = mask.row_areas(length, length)
    tokens, pairs = imbalance * length / ranks, imbalance * int(row_area.sum()) / ranks
    bound = 0.0
    for part in _components(regions):
        first, last = int(part[:, Q0].min()), int(part[:, Q1].max())
        rows = row_area[first:last]
        if len(rows) <= tokens and rows.sum() <= pairs:
            continue  # one rank can hold it all
        after = np.cumsum(rows[::-1])  # allowed pairs of the last 1, 2, … rows
        j = np.arange(ranks)
        behind = np.minimum(np.floor(j * tokens).astype(np.int64), np.searchsorted(after, j * pairs, side="right"))
        behind = behind[behind < len(rows)]
        fewest = np.minimum.accumulate(rows[::-1])  # keys of the least of the last 1, 2, … rows
        intervals = np.concatenate([np.zeros((len(part), 1), dtype=np.int64), part[:, K0 : K1 + 1]], axis=1)
        held = tiles.merged(intervals)
        bound += max(0.0, float(fewest[behind].sum() - (held[:, 2] - held[:, 1]).sum()))
    return bound


def _components(regions: Regions) -> list[Regions]:
    """Regions grouped so that no two groups share a query or a key."""
    label = np.arange(len(regions))
    groups = [_runs(regions[:, Q0], regions[:, Q1]), _runs(regions[:, K0], regions[:, K1])]
    while len(regions):
        before = label.copy()
        for group in groups:
            least = np.full(len(regions), len(regions))
            np.minimum.at(least, group, label)
            label = least[group]
        if np.array_equal(before, label):
            break
    order = np.argsort(label, kind="stable")
    edges = np.flatnonzero(np.diff(label[order])) + 1
    return np.split(regions[order], edges) if len(regions) else []


def _runs(start: Array, stop: Array) -> Array:
    """A number for each interval, equal for intervals that overlap, directly or through others."""
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate(stop[order]) if len(stop) else stop
    fresh = np.concatenate([[True], start[order][1:] >= reach[:-1]])[: len(start)]
    out = np.empty(len(start), dtype=np.int64)
    out[order] = np.cumsum(fresh) - 1
    return out
