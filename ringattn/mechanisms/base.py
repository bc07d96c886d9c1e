"""The mechanism contract: a state, its merge, and the gradient of one block.

Shapes: B batch, Hq query heads, Hkv key heads (Hq a multiple of it), M queries and N keys of a block, D dims of a
query or key head, Dv of a value head.

A mechanism's *state* is a tuple of tensors of its own choosing, each with the queries in dim 2. Blocks are computed
in any order and merged; `finish` turns the state into the output and whatever else the backward pass needs. Nobody
but the mechanism, and kernels written for it, knows what a state is.

Where all that a block of keys can contribute fits into a *summary* of fixed size, the mechanism is `Summarising`, and
ranks may exchange summaries in place of keys and values.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ringattn.errors import UnsupportedError
from ringattn.mechanisms.blocks import Block

State = tuple[torch.Tensor, ...]
Params = Mapping[str, torch.Tensor]
InputGrads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Of q, k and v; None for what nobody asked for, and for what is nothing but zeros."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is the same for every block of one call.

    Attributes:
        mechanism: the mechanism, without its tensors.
        batch, heads, kv_heads, dim, value_dim: B, Hq, Hkv, D, Dv.
        dtype, device: the inputs'.
        params: the mechanism's learned tensors, by name.
        seed: for mechanisms that draw random numbers.
        allows: asked for the pairs of partial tiles: int64 positions ``[M, 1]`` and ``[1, N]`` to booleans. None
            where the mask is made of bands alone.
        constants: names among q, k, v and the params; nobody asked for their gradients, which need not be computed.
        known: what the passes before this one have found of this rank's queries, see `Mechanism.preparation`.
        first_head: the first of these query heads among all of the call's, of which these may be a part.
    """

    mechanism: Mechanism
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    params: Params = dataclasses.field(default_factory=dict)
    seed: int = 0
    allows: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.bool_]] | None = None
    constants: frozenset[str] = frozenset()
    known: State = ()
    first_head: int = 0

    def wants(self, *names: str) -> bool:
        """Whether the gradient of any of these is asked for."""
        return not self.constants.issuperset(names)

    def wanted(self, dq: torch.Tensor | None, dk: torch.Tensor | None, dv: torch.Tensor | None) -> InputGrads:
        """These without what nobody asked for."""
        return dq if self.wants("q") else None, dk if self.wants("k") else None, dv if self.wants("v") else None

    @property
    def without_partial(self) -> Problem:
        """The same for a mask of bands alone."""
        return self if self.allows is None else dataclasses.replace(self, allows=None)

    def over_keys(self, mechanism: Mechanism, known: State = ()) -> Problem:
        """The problem of a pass over keys alone, by the mechanism of such passes."""
        constants = frozenset({"q", "k", "v", *self.mechanism.params})
        return dataclasses.replace(self, mechanism=mechanism, value_dim=0, known=known, constants=constants)

    def unprepared(self, queries: int) -> Problem:
        """The problem of this many queries that no key may reach, as far as passes over keys would know."""
        mechanism = self.mechanism.preparation
        if mechanism is None:
            return self
        before = self.over_keys(mechanism)
        return dataclasses.replace(self, known=mechanism.finish(before, mechanism.empty(before, queries))[1])

    def results_like(self, queries: int) -> State:
        """What a pass gives beside the output for so many queries: tensors on no device."""
        meta = torch.device("meta")
        nowhere = dataclasses.replace(self, device=meta, params=self.params_like(meta)).unprepared(queries)
        return nowhere.mechanism.finish(nowhere, nowhere.mechanism.empty(nowhere, queries))[1]

    def params_like(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Zeros in place of the mechanism's tensors, of this problem's heads, which may be a part of all."""
        made = {name: torch.zeros_like(x, device=device) for name, x in self.mechanism.params.items()}
        return {name: self.mechanism.of_heads(name, x, 0, self.heads) for name, x in made.items()}

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of states and gradient accumulators: float64 for float64 inputs, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def summary(self) -> int | None:
        """Numbers in the summary of one key head, where keys can be summed up."""
        mechanism = self.mechanism
        return mechanism.summary_size(self.dim, self.value_dim) if isinstance(mechanism, Summarising) else None

    def rows(self, heads: int, length: int, dim: int) -> torch.Tensor:
        """Zeros ``[B, heads, length, dim]`` of the accumulator's dtype, stored as [B, length, heads, dim].

        That is how PyTorch's flash kernels return their results, and adding equal strides is the fast case.
        """
        shape = (self.batch, length, heads, dim)
        return torch.zeros(shape, dtype=self.accumulator, device=self.device).transpose(1, 2)

    def no_gradients(self, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Zeros to which the gradients of so many queries, and of keys and values, are added; as `rows` makes them."""
        dq = self.rows(self.heads, queries, self.dim)
        return dq, self.rows(self.kv_heads, keys, self.dim), self.rows(self.kv_heads, keys, self.value_dim)

    def no_gradients_of_params(self) -> dict[str, torch.Tensor]:
        """Zeros to which the gradients of the params are added, of the accumulator's dtype."""
        return {name: torch.zeros_like(x, dtype=self.accumulator) for name, x in self.params.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class OutputGrad:
    """The output side of a backward pass, for some queries.

    Attributes:
        saved: the output, the extras and what is kept, over *all* keys.
        dout, grad_extras: the gradients that arrive at them; None for an extra nobody used.
    """

    saved: State
    dout: torch.Tensor
    grad_extras: tuple[torch.Tensor | None, ...]

    def select(self, rows: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> OutputGrad:
        """The same for the queries that ``rows`` takes of each tensor, numbers in this dtype or a wider one."""

        def part(x: torch.Tensor) -> torch.Tensor:
            return rows(x).to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else rows(x)

        grad_extras = tuple(None if x is None else part(x) for x in self.grad_extras)
        return OutputGrad(tuple(map(part, self.saved)), part(self.dout), grad_extras)


def _equal(value: object, default: object) -> bool:
    """Whether a field has its default. A tensor never does, nor what compares as tensors do."""
    return value is default or (value == default) is True


@dataclasses.dataclass(frozen=True, eq=False)
class Mechanism(ABC):
    """An immutable, hashable value: a frozen dataclass (``eq=False``), in which tensors are equal when they are one.

    Attributes:
        tensors: the fields that may hold learned tensors, which get gradients.
        sharded: the tensors of which each rank holds a part of its own, and the dim that is cut.
        heads_at: the dim of a tensor that counts query heads, where it is not the first.
        extras: names of the results beside the output that callers may ask for, such as ``lse``. Those of floating
            point numbers get gradients.
        kept: names of what the backward pass needs besides.
        words: what fields are called in messages, where their names do not say it.
        by_rows: whether what a tile of one shape gives to a query or a key depends on its own row and on what it may
            meet alone, to the bit, and a tile in which it meets nothing merges without a trace: what
            ``attention(deterministic=True)`` needs.
        causal: whether it knows no pairs in which the key comes after the query: masks that allow one are refused.
    """

    tensors: ClassVar[tuple[str, ...]] = ()
    sharded: ClassVar[Mapping[str, int]] = {}
    heads_at: ClassVar[Mapping[str, int]] = {}
    extras: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[Mapping[str, str]] = {}
    by_rows: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """The learned tensors that were given, by name."""
        held = ((name, getattr(self, name)) for name in self.tensors)
        return {name: x for name, x in held if isinstance(x, torch.Tensor)}

    @classmethod
    def heads_dim(cls, name: str) -> int:
        """The dim of a learned tensor that counts query heads."""
        return cls.heads_at.get(name, 0)

    @classmethod
    def of_heads(cls, name: str, x: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """What so many query heads have of a learned tensor of all, or of its gradient: a view."""
        return x.narrow(cls.heads_dim(name), first, count)

    def beyond(self, known: Collection[str]) -> list[str]:
        """The fields that are set and not among the known ones, in words: what a kernel would drop."""
        fields = (field for field in dataclasses.fields(self) if field.name not in known)
        return [self.words.get(x.name, x.name) for x in fields if not _equal(getattr(self, x.name), x.default)]

    @property
    def preparation(self) -> Mechanism | None:
        """What must be known of the queries before keys and values are: the mechanism of passes over keys alone.

        Such a pass is an ordinary one in which values have no dims, so that only keys travel, with the tensors of this
        mechanism as its params. What its `finish` gives beside the output is `Problem.known` to the next pass.
        It is repeated until all ranks are `settled`; then this mechanism's pass follows. None for most.
        """
        return None

    def settled(self, known: State) -> bool:
        """Of the mechanism of a pass over keys alone: whether this rank needs no other, given what this one found."""
        return True

    def to_sum(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        """Something of this rank's tokens, ``[B, Hkv, S_local, n]``, of which `with_sums` needs the cumulative sums.

        Raises:
            InputError: the mechanism's tensors do not fit these.
        """
        return None

    def with_sums(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor
    ) -> tuple[Mechanism, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attends in place of this mechanism, and to what, in ordinary torch, which autograd goes back through.

        Args:
            sums: of `to_sum`, inclusive, in the order of global positions.
        """
        return self, q, k, v

    def summed_shape(self, dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """What `with_sums` makes of the dims of a query or key head, and of the inputs' dtype."""
        return dim, dtype

    @property
    def summed(self) -> Mechanism:
        """The mechanism that `with_sums` gives, as far as the shapes of what it keeps depend on it."""
        return self

    @property
    def without_tensors(self) -> Mechanism:
        """The same with placeholders for its tensors: what is kept from call to call."""
        held = {name: x.detach().to("meta") for name, x in self.params.items()}
        return dataclasses.replace(self, **held) if held else self

    def __str__(self) -> str:
        """The mechanism without the content of its tensors: the same text on every rank, and in every step.

        A field that changes from call to call, as a seed may, is declared with ``repr=False`` and not shown.
        """
        shown = []
        for field in (field for field in dataclasses.fields(self) if field.repr):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                shape = "" if field.name in self.sharded else str(list(value.shape))
                shown.append(f"{field.name}={str(value.dtype).removeprefix('torch.')}{shape}")
            elif not _equal(value, field.default):
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def text(self) -> str:
        """``str(self)``, worked out once."""
        text: str | None = self.__dict__.get("_text")
        if text is None:
            text = str(self)
            object.__setattr__(self, "_text", text)
        return text

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def _identity(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(id(x) if isinstance(x, torch.Tensor) else x for x in values)

    def new_seed(self) -> int | torch.Tensor:
        """A seed for one call, the same on ranks whose default generators are alike; 0 where nothing is drawn.

        One that is drawn is an int64 tensor ``[]`` on the CPU: compiled code draws it anew whenever it runs.
        """
        return 0

    def check(self, problem: Problem, queries: int, keys: int) -> None:  # noqa: B027 (most need no check)
        """Raises InputError where the tensors do not fit the heads, this rank's queries, or all ranks' keys."""

    @abstractmethod
    def empty(self, problem: Problem, length: int) -> State:
        """The identity of `merge` for this many queries."""

    @abstractmethod
    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        """One block's contribution.

        Args:
            q, k, v: ``[B, Hq, M, D]``, ``[B, Hkv, N, D]``, ``[B, Hkv, N, Dv]``, in the accumulator's dtype.
        """

    @abstractmethod
    def merge(self, into: State, part: State) -> None:
        """Merges ``part`` into ``into``, in place. Associative; `empty` is its identity."""

    @abstractmethod
    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        """The output ``[B, Hq, M, Dv]`` in the inputs' dtype; the `extras` and what is `kept`, each [B, Hq, M, ...].

        May take over the state's tensors.
        """

    @abstractmethod
    def tile_grad(
        self,
        problem: Problem,
        block: Block,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        dparams: Params,
    ) -> InputGrads:
        """One block's contribution to the gradients; those of the params are added to ``dparams``.

        What `Problem.wants` says nobody asked for need not be computed, and is not used where it is.

        Returns:
            dq ``[B, Hq, M, D]``, dk ``[B, Hkv, N, D]``, dv ``[B, Hkv, N, Dv]``.
        """

    def weights(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, saved: State) -> torch.Tensor:
        """What each key of a block weighs in each query's output, ``[B, Hkv, Hq / Hkv, M, N]``.

        Args:
            saved: what `finish` gave for the block's queries, over all keys; the output may have no dims.

        Raises:
            UnsupportedError: the mechanism has no weights.
        """
        raise UnsupportedError(f"{type(self).__name__} has no weights of single pairs to show.")

    def finish_grad(self, problem: Problem, output_grad: OutputGrad, dparams: Params) -> None:  # noqa: B027
        """Adds what `finish` does with the params to their gradients. Called once, for all of a rank's queries."""


class Summarising(Mechanism):
    """A mechanism whose keys can be summed up: ``tile(q, k, v)`` without a mask is ``attend(q, summarise(k, v))``.

    Summaries ``[B, Hkv, size]`` of disjoint keys fold to the summary of all of them. They add up, unless `fold` says
    otherwise: it need not commute, and gets them in the order of the positions they sum up. So do states.
    """

    def merge(self, into: State, part: State) -> None:
        for total, x in zip(into, part, strict=True):
            total += x

    @abstractmethod
    def summary_size(self, dim: int, value_dim: int) -> int:
        """Numbers in the summary of one key head."""

    @abstractmethod
    def summarise(self, problem: Problem, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The summary ``[B, Hkv, size]`` of keys and values, in the accumulator's dtype."""

    def fold(self, problem: Problem, summaries: torch.Tensor) -> torch.Tensor:
        """The summary ``[B, Hkv, size]`` of the keys of all these, ``[R, B, Hkv, size]``, R > 0. Associative."""
        return summaries.sum(dim=0)

    def fold_grad(self, problem: Problem, summaries: torch.Tensor, dfolded: torch.Tensor) -> torch.Tensor:
        """The gradients of the summaries ``[R, B, Hkv, size]``, or what broadcasts to them, from that of their fold."""
        return dfolded

    @abstractmethod
    def attend(self, problem: Problem, q: torch.Tensor, summary: torch.Tensor) -> State:
        """What the summed-up keys contribute to each query."""

    @abstractmethod
    def attend_grad(
        self, problem: Problem, q: torch.Tensor, summary: torch.Tensor, output_grad: OutputGrad
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of the queries, ``[B, Hq, M, D]``, and of the summary; as in `tile_grad`, those wanted."""

    @abstractmethod
    def summarise_grad(
        self, problem: Problem, k: torch.Tensor, v: torch.Tensor, dsummary: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` from that of their summary."""
