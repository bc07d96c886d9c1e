"""The wave's engine: interprets a `WavePlan`, forward and backward.

At every step a rank does its exchange, then its block: `mechanisms.ordered.Ordered.block` on the queries that have
arrived and all of its own keys. What flows out of a block on its right is handed on; what flows out below stays here
for the next block. Forward it is kept for the backward pass, of every block what has flown in: a number for each query
of all sequences, and one for each own key and block. Backward a block is computed again from that.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from ringattn.mechanisms.base import Problem, State
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.walk import Flow
from ringattn.payloads.base import Pair
from ringattn.payloads.keys import halves
from ringattn.plans.wavefront import BACKWARD, FORWARD, WaveStep, Way, What
from ringattn.runtime import messages
from ringattn.runtime.call import WaveCall
from ringattn.runtime.messages import Passes


def forward(
    call: WaveCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
) -> tuple[torch.Tensor, State]:
    """The output ``[B, Hq, Sq, Dv]``, and what is kept. ``number`` is the call's, for `agreement`.

    Kept are float64 ``left`` ``[B, Hq, queries of all ranks]`` and ``above`` ``[blocks, B, Hq, Sk]``.
    """
    compare = call.compare(f"fwd {number}", seed)
    problem, plan, mechanism = call.problem_of(params, seed), call.plan, _ordered(call)
    keys, values = _extended(call, (k, v))
    out = q.new_empty(*q.shape[:3], v.shape[3])
    left = _zeros(problem, plan.queries)
    above = _zeros(problem, k.shape[2]).expand(len(plan.blocks) + 1, -1, -1, -1).clone()
    if plan.first_key == 0:
        above[:1, :, :, :1] = 1  # every search begins at the first key
    blocks = _Blocks(call, FORWARD, {"queries": q}, out)

    def compute(block: int) -> None:
        flow = Flow(blocks.take("left", block), above[block])
        left[:, :, _positions(call, block)] = flow.left
        part, flow = mechanism.block(problem, blocks.take("queries", block).double(), keys, values, flow)
        above[block + 1] = flow.above
        blocks.put("left", block, flow.left)
        blocks.put("partial outputs", block, blocks.take("partial outputs", block) + part)

    blocks.run(plan.forward, compute)
    compare()
    return out, (left, above[:-1])


def backward(
    call: WaveCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    seed: int,
    number: int,
    saved: State,
    dout: torch.Tensor,
    grad_extras: tuple[()],  # noqa: ARG001 (as engines have it)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The gradients of q, of k and v in float64, and of the params, as `engine.backward`."""
    compare = call.compare(f"bwd {number}", seed)
    problem, mechanism = call.problem_of(params, seed), _ordered(call)
    (keys, values), (_, left, above) = _extended(call, (k, v)), saved
    dkeys, dvalues, dq = torch.zeros_like(keys), torch.zeros_like(values), torch.empty_like(q)
    dparams = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in problem.params.items()}
    below = _zeros(problem, k.shape[2])
    blocks = _Blocks(call, BACKWARD, {"queries": q, "output gradients": dout}, dq)

    def compute(block: int) -> None:
        flow = Flow(left[:, :, _positions(call, block)], above[block])
        given, flown = (
            blocks.take("output gradients", block).double(),
            Flow(blocks.take("left gradients", block), below),
        )
        of_queries = blocks.take("queries", block).double()
        grads, into = mechanism.block_grad(problem, of_queries, keys, values, flow, given, flown, dparams)
        below.copy_(into.above)
        dkeys.add_(grads[1])
        dvalues.add_(grads[2])
        blocks.put("left gradients", block, into.left)
        so_far = blocks.take("partial query gradients", block)
        blocks.put("partial query gradients", block, so_far + grads[0])

    blocks.run(call.plan.backward, compute)
    dk, dv = _returned(call, (k, v), (dkeys, dvalues))
    compare()
    return dq, dk, dv, [dparams[name].to(x.dtype) for name, x in problem.params.items()]


def rows(
    call: WaveCall, q: torch.Tensor, k: torch.Tensor, params: Sequence[torch.Tensor], at: Sequence[int], number: int
) -> torch.Tensor:
    """The weights ``[B, Hq, R, Sk]`` of this rank's keys in the queries at these positions, in the accumulator's dtype.

    A row depends on all rows before it: it takes a forward pass, in which no values travel and nothing is kept.
    """
    problem = dataclasses.replace(call.problem, value_dim=0)
    shape = call.plan.shape and dataclasses.replace(call.plan.shape, value_dim=0)
    fields = {**call.fields, "shapes": f"{call.fields['shapes']}, rows {[*at]}"}
    call = dataclasses.replace(call, problem=problem, fields=fields, plan=dataclasses.replace(call.plan, shape=shape))
    compare = call.compare(f"row {number}", 0)
    problem, plan, mechanism = call.problem_of(params, 0), call.plan, _ordered(call)
    keys, _ = _extended(call, (k, k[..., :0]))
    above = _zeros(problem, k.shape[2])
    above[:, :, : int(plan.first_key == 0)] = 1
    found = keys.new_zeros(*q.shape[:2], len(at), keys.shape[2])
    blocks = _Blocks(call, FORWARD, {"queries": q}, q[..., :0].clone())

    def compute(block: int) -> None:
        flow, of_queries = Flow(blocks.take("left", block), above), blocks.take("queries", block).double()
        weights, flow = mechanism.rows(problem, of_queries, keys, flow)
        above.copy_(flow.above)
        blocks.put("left", block, flow.left)
        for nth, position in enumerate(at):
            row = position - plan.starts[block]
            if 0 <= row < weights.shape[2]:
                found[:, :, nth] = weights[:, :, row]

    blocks.run(plan.forward, compute)
    weights = _at_their_owners(call, found)
    compare()
    return weights


LEFT: tuple[What, ...] = ("left", "left gradients")
"""A number for each query and head, in float64."""


class _Blocks:
    """What there is of blocks of queries on this rank in one pass, by what it is and the block's number."""

    def __init__(self, call: WaveCall, way: Way, own: Mapping[What, torch.Tensor], results: torch.Tensor) -> None:
        """Takes what this rank's own queries bring ``[B, Hq, Sq, …]``, and where their results belong."""
        self._call, self._way, self._own, self._results = call, way, own, results
        self._held: dict[tuple[What, int], torch.Tensor] = {}
        self._last: What = way.handed[-1]

    def run(self, steps: Sequence[WaveStep], compute: Callable[[int], None]) -> None:
        """The exchanges and blocks of the pass."""
        transport = self._call.transport
        for step in steps:
            sends = [(x.peer, self._sent(x.what, x.block)) for x in step.sends]
            receives = [(x.peer, self._awaited(x.what, x.block)) for x in step.receives]
            transport.exchange(sends, receives, label=f"{transport.doing}, step {step.number}").wait()
            for x in step.receives:
                if x.what == self._way.result:
                    self._finish(x.block, self.take(x.what, x.block))
            if step.block is not None:
                compute(step.block)
                if self._call.plan.ends(self._way):
                    self._end(step.block)

    def take(self, what: What, block: int) -> torch.Tensor:
        """What has arrived or was put; of own queries what they bring; else, where a pass begins, zeros."""
        held = self._held.pop((what, block), None)
        if held is not None:
            if what in self._own:  # which travels on as it is
                self._held[what, block] = held
            return held
        if what in self._own:
            return self._room(what, block).copy_(self._own[what][:, :, self._call.plan.blocks[block].rows])
        return self._room(what, block).zero_()

    def put(self, what: What, block: int, x: torch.Tensor) -> None:
        """What has come of a block, to be handed on."""
        self._held[what, block] = self._room(what, block).copy_(x)

    def _sent(self, what: What, block: int) -> torch.Tensor:
        sent = self.take(what, block)
        self._held.pop((what, block), None)
        return sent

    def _awaited(self, what: What, block: int) -> torch.Tensor:
        self._held[what, block] = room = self._room(what, block)
        return room

    def _finish(self, block: int, x: torch.Tensor) -> None:
        self._results[:, :, self._call.plan.blocks[block].rows] = x.to(self._results.dtype)

    def _end(self, block: int) -> None:
        """Keeps nothing but the result of a block, which has come to its last rank."""
        result = self.take(self._last, block)
        for what in self._way.handed:
            self._held.pop((what, block), None)
        if self._call.plan.blocks[block].home == self._call.plan.rank:
            self._finish(block, result)
        else:
            self.put(self._way.result, block, result)

    def _room(self, what: What, block: int) -> torch.Tensor:
        problem, rows = self._call.problem, self._call.plan.blocks[block].count
        numbers = self._call.plan.numbers(what)[0] // (problem.batch * problem.heads)
        shape = problem.batch, problem.heads, rows, *(() if what in LEFT else (numbers,))
        return torch.empty(shape, dtype=self._dtype(what), device=problem.device)

    def _dtype(self, what: What) -> torch.dtype:
        problem = self._call.problem
        if what in LEFT:
            return torch.float64
        return problem.accumulator if what.startswith("partial") else problem.dtype


def _ordered(call: WaveCall) -> Ordered:
    mechanism = call.problem.mechanism
    assert isinstance(mechanism, Ordered)
    return mechanism


def _zeros(problem: Problem, count: int) -> torch.Tensor:
    return torch.zeros(problem.batch, problem.heads, count, dtype=torch.float64, device=problem.device)


def _positions(call: WaveCall, block: int) -> slice:
    """Of a block's queries."""
    start = call.plan.starts[block]
    return slice(start, start + call.plan.blocks[block].count)


# -- keys before a rank's own ------------------------------------------------------------------------------------------


def _passes(call: WaveCall) -> Passes:
    window = call.plan.window
    assert window is not None
    return messages.there_and_back(window, call.problem, call.transport.buffers)


def _extended(call: WaveCall, own: Pair) -> Pair:
    """Keys and values in float64, those before this rank's own in front of them."""
    plan, problem = call.plan, call.problem
    if plan.window is None:
        return own[0].double(), own[1].double()
    whole = tuple(x.new_empty(*x.shape[:2], plan.before + x.shape[2], x.shape[3], dtype=torch.float64) for x in own)
    for target, x in zip(whole, own, strict=True):
        target[:, :, plan.before :] = x
    pack = functools.partial(plan.window.attended.pack, problem, own)
    for step, move in call.transport.buffers.views(call, _passes).forward:
        under_way = move.start(call.transport, pack)
        if step.tiles and step.phase:
            at, rows = plan.arrivals[step.phase]
            for target, x in zip(whole, halves(move.rows, problem), strict=True):
                target[:, :, at] = x[:, :, rows].double()
        under_way.wait()
    return whole[0], whole[1]


def _returned(call: WaveCall, own: Pair, grads: Pair) -> Pair:
    """The gradients of own keys and values, from those of all that were seen here and on the ranks behind."""
    plan, problem = call.plan, call.problem
    totals = grads[0][:, :, plan.before :], grads[1][:, :, plan.before :]
    if plan.window is not None:
        payload = plan.window.attended
        pack = functools.partial(payload.pack, problem, own)
        for step, move in call.transport.buffers.views(call, _passes).backward:
            under_way = move.start(call.transport, pack)
            if step.tiles and step.phase:
                at, rows = plan.arrivals[step.phase]
                move.drows.zero_()
                for target, x in zip(halves(move.drows, problem), grads, strict=True):
                    target[:, :, rows] = x[:, :, at].to(target.dtype)
            under_way.wait()
            move.take_back(payload, problem, own, totals)
    return totals


def _at_their_owners(call: WaveCall, weights: torch.Tensor) -> torch.Tensor:
    """The weights ``[B, Hq, R, Sk]`` of own keys, from those of all keys seen here and on the ranks behind.

    They return as the gradients of keys would that have a dim for each row and query head.
    """
    problem, (heads, rows) = call.problem, weights.shape[1:3]
    as_dims = weights.unflatten(1, (problem.kv_heads, -1)).flatten(2, 3).transpose(-1, -2)
    dims = rows * heads // problem.kv_heads
    returning = dataclasses.replace(problem, dim=dims, dtype=problem.accumulator, constants=frozenset())
    own = as_dims[:, :, call.plan.before :]
    back, _ = _returned(dataclasses.replace(call, problem=returning), (own, own[..., :0]), (as_dims, as_dims[..., :0]))
    found: torch.Tensor = back.transpose(-1, -2).unflatten(2, (heads // problem.kv_heads, rows))
    return found.flatten(1, 2)
