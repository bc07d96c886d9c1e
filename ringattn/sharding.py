"""Sharding: one object owns who has which tokens of a sequence."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ringattn import layouts
from ringattn.bands import Array
from ringattn.checking import shown, tokens
from ringattn.errors import InputError
from ringattn.handles import Handled
from ringattn.layouts import Layout
from ringattn.layouts.grouped import rows_in_groups
from ringattn.masks import Mask, checked
from ringattn.mesh import Mesh
from ringattn.readable import dtype_name
from ringattn.recent import Recent
from ringattn.runtime import agreement
from ringattn.runtime.transforms import Once, refuse_transforms

PLANS = 64  # calls that differ, kept by a sharding


class Prepared(NamedTuple):
    """What a sharding has worked out."""

    spans: Array
    plans: dict[Any, Any]
    grouped: Prepared | None


@dataclasses.dataclass(frozen=True, init=False)
class Sharding(Handled):
    """``length`` positions cut over the ranks of a mesh that share a sequence.

    Any length goes with any number of ranks; shards differ by at most one token and may be empty. A sharding is a
    value; it also keeps the plans of the last 64 calls that differ, which live as long as it does.

    Attributes:
        length: tokens of the whole sequence.
        mesh: the ranks.
        layout: who holds which positions.
        reason: why this layout, where ``auto`` chose it.
    """

    length: int
    mesh: Mesh
    layout: Layout
    reason: str = dataclasses.field(compare=False, repr=False)
    calls: Recent = dataclasses.field(compare=False, repr=False)
    plans: Recent = dataclasses.field(compare=False, repr=False)

    def __init__(self, length: int, mesh: Mesh, layout: Layout | str = "auto", mask: Mask | None = None) -> None:
        """Shards ``length`` tokens.

        Args:
            length: tokens, 0 or more.
            mesh: from `ringattn.init`, `ringattn.simulate` or ``Mesh.from_device_mesh``.
            layout: a layout, its name, or ``auto``: zigzag for one causal sequence, contiguous for a full or
                windowed one and without a mask, balanced otherwise.
            mask: what ``auto`` and ``balanced`` go by.
        """
        length = tokens(length, "A sequence's length")
        if not isinstance(mesh, Mesh):
            raise InputError(f"Sharding needs a Mesh, as ringattn.init() returns; got {shown(mesh)}.")
        if mask is not None:
            checked(mask)
        taken, reason = layouts.named(layout, mask, length)
        values = {"length": length, "mesh": mesh, "layout": taken, "reason": reason}
        values |= {"calls": Recent(PLANS), "plans": Recent(PLANS)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("length", "mesh", "layout", "reason")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, calls=Recent(PLANS), plans=Recent(PLANS))

    @property
    def prepared(self) -> Prepared:
        """What has been worked out so far, spans and verified plans, to be pickled: for `adopt`."""
        grouped = self.__dict__.get("grouped")
        return Prepared(self.spans, dict(self.plans), None if grouped is None else grouped.prepared)

    def adopt(self, prepared: Prepared) -> None:
        """Takes over what an equal sharding has worked out, as a data loader's worker does."""
        self.__dict__["spans"] = prepared.spans
        self.plans.update(prepared.plans)
        if prepared.grouped is not None:
            self.grouped.adopt(prepared.grouped)

    @functools.cached_property
    def spans(self) -> Array:
        """Every rank's spans, as `layouts` describes them."""
        return self.layout.spans(self.length, self.mesh.sequence_size)

    @functools.cached_property
    def grouped(self) -> Sharding:
        """What each group along the ulysses axis holds together, over the ring that this rank is in."""
        layout = layouts.Grouped(self.layout, self.mesh.ulysses)
        grouped = Sharding(self.length, self.mesh.along_ring, layout)
        grouped.__dict__["spans"] = layout.joined(self.spans)
        return grouped

    @functools.cached_property
    def rows_in_groups(self) -> Array:
        """Where every rank's rows lie among its group's: see `layouts.grouped.rows_in_groups`."""
        return rows_in_groups(self.spans, self.grouped.spans, self.mesh.ulysses)

    @functools.cached_property
    def signature(self) -> str:
        """The layout's text and a digest of its spans: equal where every rank holds the same positions alone."""
        return f"{self.layout}#{hashlib.blake2b(np.ascontiguousarray(self.spans).tobytes(), digest_size=8).hexdigest()}"

    @functools.cached_property
    def counts(self) -> list[int]:
        """How many tokens each rank of the sequence holds."""
        return [int(n) for n in layouts.counts(self.spans, self.mesh.sequence_size)]

    @property
    def count(self) -> int:
        """How many tokens this rank holds."""
        return self.counts[self.mesh.sequence_rank]

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """This rank's global positions, int64, ascending."""
        return self.positions_of(self.mesh.sequence_rank)

    def positions_of(self, rank: int) -> torch.Tensor:
        """The global positions of any rank of the sequence, int64, ascending.

        Raises:
            InputError: there is no such rank.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.mesh.sequence_size:
            raise InputError(f"The ranks of this sequence are 0 to {self.mesh.sequence_size - 1}; got {shown(rank)}.")
        return torch.from_numpy(layouts.positions(self.spans, rank))

    def split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of a full tensor along ``dim``. Its backward puts zeros elsewhere.

        Raises:
            InputError: the tensor does not have ``length`` entries there.
        """
        self.check_dim(x, dim, self.length, "split takes the full tensor")
        return x.index_select(dim, self.positions.to(x.device))

    def join(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The full tensor from every rank's part, on every rank.

        Its backward sums the gradients of all ranks and gives each its part: a loss that every rank computes alike on
        the full tensor must be divided by ``mesh.sequence_size`` (``mesh.size`` without a data axis).

        Raises:
            InputError: the part does not have this rank's number of tokens along ``dim``.
            AgreementError: the ranks' parts differ in shape or dtype.
        """
        transport = self.mesh.connected()
        number = transport.next_call()
        try:
            self.check_dim(x, dim, self.count, f"join takes the part of rank {self.mesh.sequence_rank}")
            refuse_transforms("Sharding.join", x)
        except Exception as error:
            agreement.refuse(transport, error)
            raise
        return _Join.apply(x.movedim(dim, 0), self, number).movedim(0, dim)  # type: ignore[no-untyped-call, no-any-return]

    def check_dim(self, x: torch.Tensor, dim: int, needed: int, what: str) -> None:
        """Raises InputError where a tensor has not so many entries there. ``what`` is who needs them of which part."""
        if not isinstance(x, torch.Tensor):
            raise InputError(f"{what}: a tensor; got {shown(x)}.")
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise InputError(f"dim is the number of a dimension; got {shown(dim)}.")
        if not -x.dim() <= dim < x.dim():
            raise InputError(f"A tensor of {x.dim()} dimensions has no dimension {dim}.")
        if x.shape[dim] != needed:
            raise InputError(
                f"{what}, {needed} tokens of {self.length} along dimension {dim}; got shape {list(x.shape)}."
            )


class _Join(torch.autograd.Function):
    """The full tensor along dim 0; backward the reduce-scatter that is its transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sharding: Sharding, number: int) -> torch.Tensor:
        ctx.sharding, ctx.number = sharding, number
        transport, me, rest = sharding.mesh.connected(), sharding.mesh.sequence_rank, x.shape[1:]
        compare = _agree(sharding, f"join {number}", x)
        own = x.contiguous()
        parts = [own if rank == me else own.new_empty(n, *rest) for rank, n in enumerate(sharding.counts)]
        peers = [rank for rank in range(len(parts)) if rank != me]
        sends, receives = [(peer, own) for peer in peers], [(peer, parts[peer]) for peer in peers]
        transport.exchange(sends, receives, label="join").wait()
        compare()
        full = own.new_empty(sharding.length, *rest)
        for rank, part in enumerate(parts):
            full.index_copy_(0, sharding.positions_of(rank).to(full.device), part)
        return full

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        sharding: Sharding = ctx.sharding
        transport, me = sharding.mesh.connected(), sharding.mesh.sequence_rank
        compare = _agree(sharding, f"unj {ctx.number}", grad)
        positions = [sharding.positions_of(rank).to(grad.device) for rank in range(len(sharding.counts))]
        outgoing = [grad.index_select(0, where) for where in positions]
        incoming = [outgoing[me] if rank == me else torch.empty_like(outgoing[me]) for rank in range(len(positions))]
        peers = [rank for rank in range(len(positions)) if rank != me]
        sends = [(peer, outgoing[peer]) for peer in peers]
        receives = [(peer, incoming[peer]) for peer in peers]
        transport.exchange(sends, receives, label="join, backward").wait()
        compare()
        # In rank order and in at least float32: the same bits on every run, whoever arrives first.
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = incoming[0].to(wide, copy=True)
        for part in incoming[1:]:
            total += part
        total = total.to(grad.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            (total,) = Once.apply("Sharding.join", 1, grad, total)  # type: ignore[no-untyped-call]
        return total, None, None


def _agree(sharding: Sharding, call: str, x: torch.Tensor) -> Callable[[], None]:
    fields = {
        "call": call,
        "shapes": f"{sharding.length} tokens of {list(x.shape[1:])}",
        "dtype": dtype_name(x.dtype),
        "layout": sharding.signature,
    }
    transport = sharding.mesh.connected()
    return agreement.begin(transport, fields) if transport.agrees else agreement.nothing
