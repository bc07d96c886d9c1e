"""FSDP2 as models are trained with it: mixed precision, flat and HSDP, and parameters that it leaves whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

import ringattn
from ringattn.trainer.model import Decoder, Shape
from ringattn.training import Batch, clip_grad_norm, gradient_factor, sum_gradients, token_loss
from tests.workers import Workers

SHAPE = Shape(layers=2, width=32, heads=4, kv_heads=2)
Gradients = dict[str, Tensor]


def dealt(replica: int) -> Tensor:
    return torch.randint(256, (1, 53), generator=torch.Generator().manual_seed(replica))


def alone(dtype: torch.dtype) -> tuple[Gradients, float]:
    """One process, in this dtype; the gradients and their norm."""
    model = Decoder(SHAPE, seed=0).to(dtype)
    attend = functools.partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    for tokens in (dealt(0), dealt(1)):
        logits = model(tokens, torch.arange(53), attend)[0, :-1]
        (functional.cross_entropy(logits.float(), tokens[0, 1:], reduction="sum") / 104).backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found, float(torch.cat([gradient.flatten() for gradient in found.values()]).norm())


def sharded(mesh: ringattn.Mesh, flat: bool, narrow: bool, head: bool) -> tuple[Gradients, float, float]:
    """The same by FSDP2 on two replicas of two ranks; the gradients, their norm, the factor."""
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    mesh = ringattn.Mesh.from_device_mesh(whole, ring="cp", data="dp")
    devices = mesh.device_mesh(flat=True) if flat else mesh.device_mesh()["data", "ring"]
    wrap = functools.partial(wrapped, devices=devices, narrow=narrow)
    factor = gradient_factor(lambda probe, x: wrap(probe)(x).float().backward(), mesh)
    model = Decoder(SHAPE, seed=0)
    for block in model.blocks:
        wrap(block)
    if head:
        wrap(model)
    batch = Batch(dealt(mesh.coordinates["data"]), mesh)
    loss = token_loss(model(batch.tokens, batch.positions, batch.attend), batch)
    (loss / (factor if head else 1.0)).backward()
    if not head:  # what FSDP2 has not averaged is summed here, and what it has is divided by the factor
        rest = [p for p in model.parameters() if not hasattr(p, "full_tensor")]
        sum_gradients(nn.ParameterList(rest), mesh)
        clip_grad_norm([p for p in model.parameters() if hasattr(p, "full_tensor")], 1e9, factor=factor)
    norm = float(clip_grad_norm(model, 1e9))
    gradients = {name: _whole(p.grad).double() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, norm, factor


def wrapped(module: nn.Module, devices: DeviceMesh, narrow: bool) -> Any:
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fully_shard(module, mesh=devices, mp_policy=precision if narrow else MixedPrecisionPolicy())


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def error(found: Gradients, expected: Gradients) -> float:
    return max(float((found[name] - there).norm() / there.norm()) for name, there in expected.items())


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("narrow", "head"), [(False, True), (True, True), (False, False)])
def test_fsdp2_over_all_ranks(gloo: Workers, flat: bool, narrow: bool, head: bool) -> None:
    expected, expected_norm = alone(torch.float64)
    allowed = 2 * error(alone(torch.bfloat16)[0], expected) if narrow else 3e-6
    for found, norm, factor in gloo.run(4, sharded, flat, narrow, head):
        assert factor == 0.25
        assert found.keys() == expected.keys() and error(found, expected) <= allowed
        assert norm == pytest.approx(expected_norm, rel=allowed)
