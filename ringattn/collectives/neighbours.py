"""`halo`: a sharded sequence with the neighbours of each run of positions, as convolutions need them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ringattn import layouts
from ringattn.bands import Array
from ringattn.checking import dtype, instance, tokens
from ringattn.masks import Window
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.softmax import Softmax
from ringattn.payloads.base import Pair
from ringattn.plans.coverage import Keys
from ringattn.plans.grid import used_rows
from ringattn.plans.plan import Plan
from ringattn.plans.planning import verified_plan
from ringattn.runtime import agreement, messages
from ringattn.runtime.messages import Passes
from ringattn.runtime.transforms import Once, outside_graphs
from ringattn.schedules.route import Route
from ringattn.sharding import Sharding
from ringattn.transports.base import Transport

Places = tuple[torch.Tensor, torch.Tensor]
"""Rows of the result, and the rows of a phase's buffer that belong there."""


@outside_graphs
def halo(x: torch.Tensor, sharding: Sharding, dim: int, left: int, right: int) -> torch.Tensor:
    """This rank's part with its neighbours: before each run of positions the ``left`` ones, behind it the ``right``.

    The neighbours may be on any rank, several ranks away. Exactly those rows travel that a rank does not have, by an
    ordinary plan (`Route` under ``Window(left, right)``), and backward their gradients return. A contiguous shard is
    one run, a zigzag shard two (one where they meet), of a striped one every position is a run of its own.

    >>> import ringattn
    >>> part = ringattn.Sharding(4, ringattn.init())
    >>> halo(torch.tensor([1.0, 2.0, 3.0, 4.0]), part, 0, left=2, right=1)
    tensor([0., 0., 1., 2., 3., 4., 0.])

    An image whose pixels are sharded row by row, W in a row, is convolved by 3 x 3 after
    ``halo(x, sharding, dim, W, W)`` if runs are whole rows: what is beside it is padded locally.

    Args:
        x: this rank's part, ``sharding.count`` entries along ``dim``.
        sharding: who holds which positions.
        dim: the dimension of the positions.
        left, right: how many neighbours, 0 or more.

    Returns:
        x's shape, but along ``dim`` the positions ``s - left`` to ``e + right - 1`` of each run from s to before e, one
        run behind the other. Zeros before the sequence and behind it.

    Raises:
        InputError: an argument is wrong; nothing was sent.
        AgreementError: the ranks' arguments differ, or only some need a gradient.
    """
    instance(sharding, Sharding, "sharding", "a ringattn.Sharding")
    transport = sharding.mesh.connected()
    number = transport.next_call()
    with agreement.telling(transport, "ringattn.halo", x):
        sharding.check_dim(x, dim, sharding.count, f"halo takes the part of rank {sharding.mesh.sequence_rank}")
        dtype(x.dtype, "the dtype of halo's tensor")
        window = Window(tokens(left, "left"), tokens(right, "right"))
    rows = x.movedim(dim, 0)
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
    out = _Halo.apply(flat, _Neighbours.of(window, sharding, flat), number, torch.is_grad_enabled() and x.requires_grad)  # type: ignore[no-untyped-call]
    return out.unflatten(1, rows.shape[1:]).movedim(0, dim) if rows.dim() > 1 else out.squeeze(1)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, eq=False)
class _Neighbours:
    """What is kept from call to call.

    Attributes:
        plan: by which rows travel, as keys without values.
        count: rows of the result.
        places: where the rows of each phase belong.
    """

    plan: Plan
    problem: Problem
    transport: Transport
    signature: str
    count: int
    places: dict[int, Places]

    @classmethod
    def of(cls, window: Window, sharding: Sharding, x: torch.Tensor) -> _Neighbours:
        """That of these rows ``[tokens, numbers]``."""
        key = ("halo", window, x.shape[1], x.dtype, x.device)
        found: _Neighbours | None = sharding.calls.get(key)
        if found is None:
            dims = max(x.shape[1], 1), 1
            plan = verified_plan(window, sharding, Route(), heads=(1, 1), head_dims=dims, dtype=x.dtype).over_keys
            extended = _extended(layouts.positions(sharding.spans, plan.rank), window)
            keys = Keys(sharding.spans)
            found = cls(
                plan=plan,
                problem=Problem(Softmax(), 1, 1, 1, x.shape[1], 0, x.dtype, x.device),
                transport=sharding.mesh.connected(),
                signature=sharding.signature,
                count=len(extended),
                places={phase: _places(extended, *used_rows(plan, phase, keys), x.device) for phase in plan.tiles},
            )
            sharding.calls.keep(key, found)
        return found

    @property
    def passes(self) -> Passes:
        """The exchanges that bring rows, and those by which their gradients return."""
        return self.transport.buffers.views(self, _passes)

    def agree(self, call: str, x: torch.Tensor, wanted: bool) -> Callable[[], None]:
        """Compares the call with every other rank's. ``wanted`` says whether x needs a gradient."""
        rows = x.new_empty(0, *x.shape[1:])  # ranks differ in how many they have
        # ranks that need no gradient would not come to the backward pass
        fields = {"mask": str(self.plan.mask), "layout": self.signature, "gradients": "x" if wanted else "none"}
        return agreement.about(self.transport, call, rows, **fields)


def _passes(neighbours: _Neighbours) -> Passes:
    return messages.there_and_back(neighbours.plan, neighbours.problem, neighbours.transport.buffers)


class _Halo(torch.autograd.Function):
    """Takes rows ``[tokens, numbers]`` and gives ``[count, numbers]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, neighbours: _Neighbours, number: int, wanted: bool) -> torch.Tensor:
        ctx.neighbours, ctx.number = neighbours, number
        compare, problem = neighbours.agree(f"hal {number}", x, wanted), neighbours.problem
        own, out = _as_keys(x), x.new_zeros(neighbours.count, x.shape[1])
        pack = functools.partial(neighbours.plan.attended.pack, problem, own)
        for step, move in neighbours.passes.forward:
            under_way = move.start(neighbours.transport, pack)
            if step.tiles:
                at, rows = neighbours.places[step.phase]
                out[at] = (x if step.phase == 0 else move.rows[:, 0, 0])[rows]
            under_way.wait()
        compare()
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        neighbours: _Neighbours = ctx.neighbours
        compare, problem = neighbours.agree(f"unh {ctx.number}", grad, wanted=True), neighbours.problem
        wide = grad.to(problem.accumulator)
        total = wide.new_zeros(neighbours.plan.key_tokens, grad.shape[1])
        own = _as_keys(total)
        for phase, (at, rows) in neighbours.places.items():
            if phase == 0:
                total.index_add_(0, rows, wide[at])
        payload = neighbours.plan.attended
        pack = functools.partial(payload.pack, problem, own)
        for step, move in neighbours.passes.backward:
            under_way = move.start(neighbours.transport, pack)
            if step.tiles and step.phase:
                at, rows = neighbours.places[step.phase]
                move.drows[:, 0, 0].zero_().index_add_(0, rows, wide[at])
            under_way.wait()
            move.take_back(payload, problem, own, own)
        compare()
        total = total.to(grad.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            (total,) = Once.apply("ringattn.halo", 1, grad, total)  # type: ignore[no-untyped-call]
        return total, None, None, None


def _as_keys(rows: torch.Tensor) -> Pair:
    """Rows as keys of one head, and values without dims."""
    keys = rows.unsqueeze(0).unsqueeze(0)
    return keys, keys[..., :0]


def _extended(positions: Array, window: Window) -> Array:
    """The positions of the result, of which those outside of the sequence are nobody's."""
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = [run for run in np.split(positions, cuts) if len(run)]
    extended = [np.arange(run[0] - window.left, run[-1] + window.right + 1) for run in runs]
    return np.concatenate([np.empty(0, dtype=np.int64), *extended])


def _places(extended: Array, rows: Array, positions: Array, device: torch.device) -> Places:
    """Where rows of these positions belong in the result: of several runs' neighbours in several places."""
    order = np.argsort(positions)
    at = np.searchsorted(positions, extended, sorter=order)
    found = order[np.minimum(at, len(order) - 1)]
    there = np.flatnonzero(positions[found] == extended)
    return torch.from_numpy(there).to(device), torch.from_numpy(rows[found[there]]).to(device)
