"""Runs a module on virtual ranks and in one piece by equations: outputs and all gradients, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

import ringattn

Whole = Callable[..., torch.Tensor]


def check_module(
    module: torch.nn.Module,
    whole: Whole,
    call: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    ranks: int,
    limit: float = 1e-12,
    dim: int = -1,
) -> None:
    """The module on some ranks against the equations over the whole sequence.

    Args:
        whole: of the module and the whole inputs, the whole output.
        call: of the mesh, the module and the whole inputs, this rank's output, who holds what, and its inputs.
        dim: of the positions, in inputs and output.
    """
    module = module.double()
    leaves = [x.double().requires_grad_() for x in inputs]
    expected = whole(module, *leaves)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad((expected * dout).sum(), [*leaves, *parameters.values()])
    names = [f"input {nth}" for nth in range(len(leaves))] + list(parameters)
    exact = {"out": expected.detach(), **dict(zip(names, gradients, strict=True))}
    for found in ringattn.simulate(_part, module, call, leaves, dout, names, dim, ring=ranks).results:
        for name, x in found.items():
            assert (x - exact[name]).norm() <= limit * (1 + exact[name].norm()), name


def _part(
    mesh: ringattn.Mesh,
    module: torch.nn.Module,
    call: Any,
    inputs: Any,
    dout: torch.Tensor,
    names: list[str],
    dim: int,
) -> dict[str, torch.Tensor]:
    own = copy.deepcopy(module)
    out, shardings, leaves = call(mesh, own, *(x.detach() for x in inputs))
    gradients = torch.autograd.grad((out * shardings[0].split(dout, dim)).sum(), [*leaves, *own.parameters()])
    found = {"out": shardings[0].join(out.detach(), dim)}
    for nth, (name, x) in enumerate(zip(names, gradients, strict=True)):
        is_input = nth < len(leaves)
        found[name] = shardings[nth].join(x, dim) if is_input else ringattn.reduce(x, mesh, "sum")
    return found
