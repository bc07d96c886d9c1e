"""Mechanisms in which a query row needs the weights of the row before it: the keys are walked once, in order.

Monotonic alignment (Raffel et al., arXiv 1704.00784, equations 8 to 14): the search for row i begins where that of row
i - 1 ended and stops at key j with probability p_ij = sigmoid(e_ij). With r_ij the probability that it gets to key j,

    r_ij = (1 - p_i,j-1) r_i,j-1 + a_i-1,j        a_ij = p_ij r_ij        a_-1 is 1 at key 0 and 0 elsewhere

and a_ij the weight of the pair (`walk` computes it). A block of rows and keys needs no more of the rest than what flows
into it: from its left ``(1 - p) r`` of the last key there, a number a row, and from above the weights of the last row
there, a number a key. So do its gradients, in the other direction: ranks can work as a wavefront (`schedules.wave`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import ClassVar, NoReturn

import torch

from ringattn.checking import finite, flag, shown
from ringattn.errors import InputError, UnsupportedError
from ringattn.mechanisms.base import InputGrads, Mechanism, OutputGrad, Params, Problem, State
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.walk import Flow, Walk, searched


@dataclasses.dataclass(frozen=True, eq=False)
class Ordered(Mechanism):
    """The base of the monotonic mechanisms: see the top of this file.

    Attributes:
        scale: of the energies, ``scale q . k + bias``; None for 1 / sqrt of the dims that make them.
        bias: ``[Hq]``, learned, added to the energies of a head. Below 0 at the start of training (-1 to -4) it keeps
            the search from stopping at the first keys. What a rank gets of its gradient is its own keys' part, as for
            any replicated parameter: sum it over the ranks.
        hard: the decoding rule: a search stops at the first key whose energy is above 0, with certainty. Energies get
            no gradient then. A search that stops nowhere leaves the row 0, and those of all later rows.
    """

    _: dataclasses.KW_ONLY
    scale: float | None = None
    bias: torch.Tensor | None = None
    hard: bool = False

    tensors: ClassVar[tuple[str, ...]] = ("bias",)
    kept: ClassVar[tuple[str, ...]] = ("left", "above")

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.scale is not None:
            object.__setattr__(self, "scale", finite(self.scale, f"{name}'s scale"))
        flag(self.hard, f"{name}'s hard")
        bias = self.bias
        if bias is not None and not (isinstance(bias, torch.Tensor) and bias.is_floating_point()):
            raise InputError(f"{name}'s bias must be a tensor of floating point numbers; got {shown(bias)}.")

    def check(self, problem: Problem, queries: int, keys: int) -> None:
        bias = self.bias
        if bias is not None and tuple(bias.shape) != (problem.heads,):
            raise InputError(
                f"bias must have shape [{problem.heads}], one for each query head; got {list(bias.shape)}."
            )
        if bias is not None and bias.device != problem.device:
            raise InputError(f"bias must be where q, k and v are, on {problem.device}; got {bias.device}.")

    @property
    @abstractmethod
    def reach(self) -> int:
        """How many keys before a block's first one its queries may see."""

    @abstractmethod
    def monotonic_dims(self, problem: Problem) -> int:
        """How many dims of queries and keys, from the first on, make the energies."""

    @abstractmethod
    def spread(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, alignment: torch.Tensor) -> torch.Tensor:
        """The weights of the values, from where the searches stop.

        Args:
            q: ``[B, Hq, M, D]`` in float64, as everything here.
            k: ``[B, Hkv, R + N, D]``, the R keys before the block first.
            alignment: ``[B, Hq, M, N]``.

        Returns:
            ``[B, Hq, M, R + N]``.
        """

    @abstractmethod
    def spread_grad(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, alignment: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the gradient of the weights, new tensors with those of alignment, q and k."""

    def block(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flow: Flow
    ) -> tuple[torch.Tensor, Flow]:
        """What a block of keys adds to the outputs of a block of rows, and what flows out of it, right and below.

        Args:
            q, k, v: ``[B, Hq, M, D]``, ``[B, Hkv, R + N, D]`` and ``[B, Hkv, R + N, Dv]`` in float64, the R keys
                before the block first.
            flow: what flows into it.

        Returns:
            float64 ``[B, Hq, M, Dv]``, and the flow with the numbers of its right and its lower edge.
        """
        weights, flow = self.rows(problem, q, k, flow)
        return over_heads(weights, v), flow

    def rows(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, flow: Flow) -> tuple[torch.Tensor, Flow]:
        """The weights ``[B, Hq, M, R + N]`` of the values of a block, and what flows out of it; as in `block`."""
        energies = self._energies(problem, q, k, flow.above.shape[2])
        if self.hard:
            alignment, out = searched(energies > 0, flow)
        else:
            walk = Walk(energies, flow)
            alignment, out = walk.alignment, walk.out
        return self.spread(problem, q, k, alignment), out

    def block_grad(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        flow: Flow,
        dout: torch.Tensor,
        dflow: Flow,
        dparams: Params,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Flow]:
        """The gradients of q, k, v and of what has flown in; those of the params are added to ``dparams``.

        Args:
            dout: the gradient of the outputs, float64 ``[B, Hq, M, Dv]``.
            dflow: of what has flown out, right and below.
        """
        keys = flow.above.shape[2]
        energies = self._energies(problem, q, k, keys)
        walk = None if self.hard else Walk(energies, flow)
        alignment = searched(energies > 0, flow)[0] if walk is None else walk.alignment
        dv = over_rows(self.spread(problem, q, k, alignment), dout, problem.kv_heads)
        dweights = over_heads(dout, v.transpose(-1, -2))
        dalignment, dq, dk = self.spread_grad(problem, q, k, alignment, dweights)
        if walk is not None:
            denergies, dflow = walk.backward(dalignment, dflow)
            dims, scale, first = self.monotonic_dims(problem), self._scale(problem), k.shape[2] - keys
            dq[..., :dims] += over_heads(denergies, k[:, :, first:, :dims]) * scale
            dk[:, :, first:, :dims] += over_rows(denergies, q[..., :dims], problem.kv_heads) * scale
            if "bias" in dparams:
                total = dparams["bias"]
                total += denergies.sum(dim=(0, 2, 3))
        return (dq, dk, dv), dflow

    def _energies(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, keys: int) -> torch.Tensor:
        """Those of the monotonic search over the last so many keys, ``[B, Hq, M, N]``."""
        dims, first = self.monotonic_dims(problem), k.shape[2] - keys
        energies = over_heads(q[..., :dims], k[:, :, first:, :dims].transpose(-1, -2)) * self._scale(problem)
        if "bias" in problem.params:
            energies += problem.params["bias"].double()[:, None, None]
        return energies

    def _scale(self, problem: Problem) -> float:
        return 1 / math.sqrt(self.monotonic_dims(problem)) if self.scale is None else self.scale

    # -- what kernels ask for, which compute tiles in any order -------------------------------------------------------

    def empty(self, problem: Problem, length: int) -> State:
        self._refuse()

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        self._refuse()

    def merge(self, into: State, part: State) -> None:
        self._refuse()

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        self._refuse()

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
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(
            f"{type(self).__name__} has no tiles that could be computed in any order: a row needs the weights of the "
            f"row before. Call ringattn.attention with schedule='auto', which takes the wave."
        )


def over_heads(x: torch.Tensor, of_keys: torch.Tensor) -> torch.Tensor:
    """``[B, Hq, M, X] @ [B, Hkv, X, Y]``, each key head serving its query heads: ``[B, Hq, M, Y]``."""
    product: torch.Tensor = x.unflatten(1, (of_keys.shape[1], -1)) @ of_keys.unsqueeze(2)
    return product.flatten(1, 2)


def over_rows(x: torch.Tensor, of_queries: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[B, Hq, M, N]`` transposed ``@ [B, Hq, M, Y]``, added up over a key head's query heads: ``[B, Hkv, N, Y]``."""
    x, of_queries = (each.unflatten(1, (kv_heads, -1)) for each in (x, of_queries))
    added: torch.Tensor = (x.transpose(-1, -2) @ of_queries).sum(dim=2)
    return added
