"""`attention_rows`: the exact weights of a few queries over all keys of a sharded sequence, to be looked at."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ringattn.bands import Array
from ringattn.checking import instance, positions
from ringattn.functional import summed_first
from ringattn.kernels.reference import Reference
from ringattn.masks import Mask
from ringattn.mechanisms.base import Mechanism, Problem, State
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.softmax import Softmax
from ringattn.readable import dtype_name
from ringattn.runtime import agreement
from ringattn.runtime.arguments import check_part, check_tensors
from ringattn.runtime.call import WaveCall
from ringattn.runtime.folding import add, fold
from ringattn.runtime.replicated import Replicated, own_tiles
from ringattn.runtime.request import Request, problem_of
from ringattn.runtime.running import running
from ringattn.runtime.transforms import outside_graphs
from ringattn.runtime.wave import rows as ordered_rows
from ringattn.sharding import Sharding
from ringattn.transports.base import Transport


@outside_graphs
def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: Mask,
    rows: object,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = None,
    mechanism: Mechanism = Softmax(),  # noqa: B008 (an immutable value)
) -> torch.Tensor:
    """What each key weighs in the outputs of some queries: rows of the attention matrix. Every rank calls it.

    The chosen queries travel, and their states, along a tree of the ranks; keys stay where they are. Nothing grows with
    the sequence but what each rank gives of its own keys. Where a row depends on the rows before it (`Monotonic`), the
    whole wave runs, without values.

    Args:
        q, k: as in `ringattn.attention`: this rank's parts.
        mask: the allowed pairs, in global positions.
        rows: global positions of queries, in any order: a list or an integer tensor ``[R]``.
        sharding: who holds the queries.
        kv_sharding: who holds the keys; None for the same.
        mechanism: what attends. Dropout is left out.

    Returns:
        ``[B, Hq, R, Skv_local]`` in float32 (float64 for float64): the weights of this rank's keys, in the order of
        ``kv_sharding.positions``; ``kv_sharding.join(weights, 3)`` is of all keys. 0 where the mask allows no pair. It
        is not differentiable.

    Raises:
        InputError: an argument is wrong; nothing was sent.
        UnsupportedError: the mechanism has no weights.
        AgreementError: the ranks' arguments differ.
    """
    instance(sharding, Sharding, "sharding", "a ringattn.Sharding")
    transport = sharding.mesh.connected()
    request, q, k, _ = summed_first(Request(mask, sharding, kv_sharding, mechanism, "auto", "auto"), q, k, k)
    number = transport.next_call()
    with agreement.telling(transport, "ringattn.attention_rows", q, k):
        mechanism = request.mechanism
        at, order = np.unique(positions(rows, "rows", sharding.length), return_inverse=True)
        if isinstance(mechanism, Ordered):
            wave = _wave(q, k, request)
        else:
            call = _call(q, k, mask, at, sharding, request.kv, mechanism)
        seed = int(mechanism.new_seed())
    with torch.no_grad(), running(transport, f"attention_rows {number}", q.device.type):
        if isinstance(mechanism, Ordered):
            weights = ordered_rows(wave, q, k, [*mechanism.params.values()], at.tolist(), number)
        else:
            compare = call.compare(f"row {number}", seed)
            cut = {x: (mechanism.params[x], dim) for x, dim in mechanism.sharded.items() if x in mechanism.params}
            chosen = _of_all_ranks(transport, {"q": (q, 2), **cut}, at, sharding)
            params = [chosen.get(name, x) for name, x in mechanism.params.items()]
            weights = _weights(call, call.problem_of(params, seed), chosen["q"], k.detach())
            compare()
    return weights.index_select(2, torch.from_numpy(order.reshape(-1)).to(weights.device))


def _wave(q: torch.Tensor, k: torch.Tensor, request: Request) -> WaveCall:
    """The call of a mechanism that walks the keys in order, with keys for values."""
    params = request.mechanism.params.values()
    call = request.call((q, k, k, *params), (False,) * (3 + len(params)))
    assert isinstance(call, WaveCall)
    return call


def _call(
    q: torch.Tensor, k: torch.Tensor, mask: Mask, at: Array, sharding: Sharding, kv: Sharding, mechanism: Mechanism
) -> Replicated:
    shown = f"q {list(q.shape)}, k {list(k.shape)}"
    check_tensors(q, k, k, shown)
    check_part(q, sharding, "queries", shown)
    check_part(k, kv, "keys", shown)
    problem = problem_of(mechanism.without_tensors, q, k, k[..., :0])
    mechanism.check(problem, sharding.count, kv.length)
    asked = len(mask.classify(sharding.length, kv.length)[1]) > 0
    problem = dataclasses.replace(problem, allows=mask.allows if asked else None)
    nth, one = np.arange(len(at)), np.ones_like(at)
    spans = np.stack([0 * one, nth, at, one, one], axis=1)  # each row a span of one
    fields = {
        "shapes": f"{problem.batch} x {(problem.heads, problem.kv_heads)} heads of {problem.dim}, rows {at.tolist()}",
        "dtype": dtype_name(problem.dtype),
        "mask": mask.signature(sharding.length, kv.length),
        "layout": sharding.signature if kv == sharding else f"{sharding.signature}, keys {kv.signature}",
        "mechanism": mechanism.text,
    }
    tiles = own_tiles(mechanism, mask, spans, sharding.length, kv)
    return Replicated(problem, sharding.mesh.connected(), fields, tiles, Reference())


def _of_all_ranks(
    transport: Transport, tensors: dict[str, tuple[torch.Tensor, int]], at: Array, sharding: Sharding
) -> dict[str, torch.Tensor]:
    """The rows at these positions of tensors that are sharded along a dim, on every rank: nobody else adds to them."""
    own = sharding.positions.numpy()
    local = np.searchsorted(own, at)
    here = np.flatnonzero(np.append(own, -1)[local] == at)
    found = {}
    for name, (x, dim) in tensors.items():
        shape = [*x.shape]
        shape[dim] = len(at)
        found[name] = x.new_zeros(shape)
        rows = x.detach().index_select(dim, torch.from_numpy(local[here]).to(x.device))
        found[name].index_copy_(dim, torch.from_numpy(here).to(x.device), rows)
    fold(transport, tuple(found.values()), add, "chosen queries")
    return found


def _weights(call: Replicated, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``[B, Hq, R, Skv_local]``."""
    problem, out, others = call.forward(problem, q, k, k[..., :0])
    saved: State = (out, *others)
    total = torch.zeros(*q.shape[:3], k.shape[2], dtype=problem.accumulator, device=q.device)
    for keys, block in Reference().blocks(call.tiles, problem):
        at = block.queries
        rows, columns = q[:, :, at].to(problem.accumulator), k[:, :, keys].to(problem.accumulator)
        part = problem.mechanism.weights(problem, block, rows, columns, tuple(x[:, :, at] for x in saved))
        total[:, :, at, keys] += part.flatten(1, 2)
    return total
