"""Modules over virtual ranks, against equations of the whole sequence in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import ringattn

RANKS = (1, 2, 3, 5, 8)
FLOAT32 = 2e-5  # of results that may cancel, relative to their norm
Layouts = str | Callable[[int], ringattn.Layout]
"""A layout, or that of so many ranks."""
Inputs = Mapping[str, torch.Tensor]
Shardings = Mapping[str, ringattn.Sharding]
Call = Callable[[Any, Inputs, Shardings], torch.Tensor]
Axes = Mapping[str, tuple[str, int] | None]
"""Of each input, whose sharding cuts it and along which dim; None for what every rank has."""


def compare(
    module: nn.Module,
    call: Call,
    equation: Callable[[Any, Inputs], torch.Tensor],
    inputs: Inputs,
    axes: Axes,
    lengths: Mapping[str, int],
    layout: Layouts = "zigzag",
    ranks: Sequence[int] = RANKS,
    limit: float = 1e-12,
    unused: Collection[str] = (),
) -> None:
    """The output, cut as ``q`` is, and the gradients of all inputs and parameters, in float64 and in float32.

    Args:
        call: of the module, a rank's inputs and the shardings: its part of the output.
        equation: the same of the whole sequence, with the module's parameters.
        lengths: of the sequences, by the names in ``axes``.
        limit: of errors in float64, relative to the norm.
        unused: inputs that have no say.
    """
    module = module.double()
    whole = {name: x.double().requires_grad_() for name, x in inputs.items()}
    expected = equation(module, whole)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    leaves = {**whole, **dict(module.named_parameters())}
    gradients = dict(zip(leaves, _gradients((expected * dout).sum(), leaves), strict=True))
    size = max(1.0, math.sqrt(expected.numel()))

    def on_rank(
        mesh: ringattn.Mesh, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        taken = layout if isinstance(layout, str) else layout(mesh.size)
        owners = {name: ringattn.Sharding(n, mesh, taken) for name, n in lengths.items()}
        parts = {name: _part(x.detach(), owners, axes[name]).to(dtype, copy=True) for name, x in whole.items()}
        for part in parts.values():
            part.requires_grad_()
        own = copy.deepcopy(module).to(dtype)
        out = call(own, parts, owners)
        owner, dim = axes["q"] or ("", 0)
        share = _part(dout, owners, (owner, dim))
        named = {**parts, **dict(own.named_parameters())}
        grads = dict(zip(named, _gradients((out * share).sum(), named), strict=True))
        return owners[owner].positions, out.detach(), grads, {name: own.positions for name, own in owners.items()}

    for count, dtype in itertools.product(ranks, (torch.float64, torch.float32)):
        results = ringattn.simulate(on_rank, dtype, ring=count).results
        most = limit if dtype == torch.float64 else FLOAT32
        for positions, out, _, _ in results:
            dim = (axes["q"] or ("", 0))[1]
            assert (out - expected.detach().index_select(dim, positions)).norm() <= most * size, count
        for name, exact in gradients.items():
            axis = axes.get(name)
            found = torch.zeros_like(exact)
            for _, _, grads, where in results:
                if axis is None:
                    found += grads[name]
                else:
                    found.index_add_(axis[1], where[axis[0]], grads[name].double())
            assert (found - exact).norm() <= most * max(1.0, float(exact.norm())), (name, count, dtype)
            assert name in unused or exact.norm() > 0, f"nothing is tested of {name}"


def _part(x: torch.Tensor, owners: Shardings, axis: tuple[str, int] | None) -> torch.Tensor:
    return x if axis is None else owners[axis[0]].split(x, axis[1])


def _gradients(loss: torch.Tensor, leaves: Inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)


def drawn(seed: int = 0, **shapes: Sequence[int]) -> dict[str, torch.Tensor]:
    """Random inputs."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
