"""`pool`: queries that every rank has attend to a whole sharded sequence, as pooling and reading out do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ringattn import layouts
from ringattn.checking import instance
from ringattn.kernels.choice import chosen_kernel
from ringattn.masks import Full
from ringattn.mechanisms.base import Mechanism, Problem
from ringattn.mechanisms.softmax import Softmax
from ringattn.readable import dtype_name
from ringattn.runtime import agreement
from ringattn.runtime.arguments import check_extras, check_part, check_tensors
from ringattn.runtime.replicated import Replicated, own_tiles
from ringattn.runtime.request import constants_of, problem_of, results_of, wanted_gradients
from ringattn.runtime.running import running
from ringattn.runtime.transforms import Once, outside_graphs
from ringattn.sharding import Sharding


@outside_graphs
def pool(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sharding: Sharding,
    mechanism: Mechanism = Softmax(),  # noqa: B008 (an immutable value)
    extras: Sequence[str] = (),
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Attention of queries that every rank has over all keys of a sharded sequence. Every rank calls it.

    Keys and values stay where they are. The states of the queries travel, up and down a tree of the ranks, whatever the
    sequence's length: of softmax Dv + 1 numbers a query and head.

    Args:
        q: ``[B, Hq, M, D]``, the same on every rank.
        k, v: ``[B, Hkv, S_local, D]`` and ``[B, Hkv, S_local, Dv]``, this rank's part.
        sharding: who holds the keys and values.
        mechanism: what attends. Its params are for M queries, the same on every rank.
        extras: names of further results of the mechanism, as in `ringattn.attention`.

    Returns:
        ``[B, Hq, M, Dv]`` on every rank, with extras a tuple of it and them. Backward, the gradients that arrive at it
        on all ranks are added up: a loss that every rank computes alike must be divided by ``mesh.sequence_size``.
        q and the params get this rank's part of their gradients, as replicated parameters do: add it up over the ranks.

    Raises:
        InputError: an argument is wrong; nothing was sent.
        AgreementError: the ranks' arguments differ.
    """
    instance(sharding, Sharding, "sharding", "a ringattn.Sharding")
    transport = sharding.mesh.connected()
    number = transport.next_call()
    with agreement.telling(transport, "ringattn.pool", q, k, v):
        instance(mechanism, Mechanism, "mechanism", "a ringattn mechanism, such as ringattn.Softmax()")
        check_extras(mechanism, extras)
        params = list(mechanism.params.values())
        call = _call(q, k, v, params, sharding, mechanism)
        seed = int(mechanism.new_seed())
    out, *others = _Pool.apply(call, number, seed, q, k, v, *params)  # type: ignore[no-untyped-call]
    if not extras:
        return out  # type: ignore[no-any-return]
    return out, *results_of(mechanism, extras, others, q.dtype)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Sequence[torch.Tensor],
    sharding: Sharding,
    mechanism: Mechanism,
) -> Replicated:
    """The call, kept by the sharding."""
    wanted = wanted_gradients(q, k, v, *params)
    shapes = tuple((x.shape, x.dtype, x.device) for x in (q, k, v, *params))
    key = ("pool", mechanism.text, wanted, shapes)
    call: Replicated | None = sharding.calls.get(key)
    if call is None:
        problem = _problem(q, k, v, sharding, mechanism, wanted)
        kernel, _ = chosen_kernel("auto", problem)
        queries = layouts.Contiguous().spans(q.shape[2], 1)
        tiles = own_tiles(mechanism, Full(), queries, q.shape[2], sharding)
        heads, dims = (problem.heads, problem.kv_heads), (problem.dim, problem.value_dim)
        fields = {
            "shapes": f"{problem.batch} x {heads} heads of {dims}, {q.shape[2]} queries, {sharding.length} keys",
            "dtype": dtype_name(problem.dtype),
            "layout": sharding.signature,
            "mechanism": mechanism.text,
            "gradients": " ".join(itertools.compress(("q", "k", "v", *mechanism.params), wanted)) or "none",
        }
        call = Replicated(problem, sharding.mesh.connected(), fields, tiles, kernel)
        sharding.calls.keep(key, call)
    return call


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sharding: Sharding,
    mechanism: Mechanism,
    wanted: Sequence[bool],
) -> Problem:
    shown = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    check_tensors(q, k, v, shown)
    check_part(k, sharding, "keys", shown)
    problem = problem_of(mechanism.without_tensors, q, k, v, constants=constants_of(mechanism, wanted))
    mechanism.check(problem, q.shape[2], sharding.length)
    return problem


class _Pool(torch.autograd.Function):
    """Takes ``call, number, seed, q, k, v, *params``, gives ``out`` and the mechanism's extras."""

    @staticmethod
    def forward(ctx: Any, call: Replicated, number: int, seed: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *params = inputs
        with running(call.transport, f"pool {number}", q.device.type):
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as kernels take them
            compare = call.compare(f"poo {number}", seed)
            problem, out, others = call.forward(call.problem_of(params, seed), q, k, v)
            compare()
        ctx.save_for_backward(q, k, v, out, *others)
        ctx.call, ctx.number, ctx.seed, ctx.problem = call, number, seed, problem
        ctx.set_materialize_grads(False)
        extras = others[: len(problem.mechanism.extras)]
        ctx.mark_non_differentiable(*(x for x in extras if not x.is_floating_point()))
        return out, *extras

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, *grad_extras: torch.Tensor | None) -> tuple[Any, ...]:
        call: Replicated = ctx.call
        q, k, v, *saved = ctx.saved_tensors
        dout = torch.zeros_like(saved[0]) if dout is None else dout
        with running(call.transport, f"pool backward {ctx.number}", q.device.type):
            compare = call.compare(f"unp {ctx.number}", ctx.seed)
            dq, dk, dv, dparams = call.backward(ctx.problem, q, k, v, tuple(saved), dout, grad_extras)
            compare()
        grads = [dq, dk, dv, *dparams]
        if torch.is_grad_enabled():  # create_graph=True
            grads = Once.apply("ringattn.pool", 3, q, k, v, *grads)  # type: ignore[no-untyped-call]
        return None, None, None, *grads
