"""Modules between processes: the bits of virtual ranks."""

from __future__ import annotations

import pytest
import torch

import ringattn
from ringattn import modules
from tests.workers import Workers


def _results(mesh: ringattn.Mesh) -> dict[str, list[torch.Tensor]]:
    """Of each module: its output on this rank, and the gradients of q, k, v and its parameters."""
    sharding, causal, full = ringattn.Sharding(24, mesh, "zigzag"), ringattn.Causal(), ringattn.Full()
    g = torch.Generator().manual_seed(3)
    q, k, v = (sharding.split(torch.randn(1, 2, 24, 4, generator=g), 2).clone().requires_grad_() for _ in "qkv")
    context = torch.randn(1, 2, 5, 4, generator=g)
    tri = {name: modules.TriAttention(2, 4, name, chunk=3) for name in ("additive", "dot", "scaled", "trilinear")}
    scored = modules.General(2, 4, 4), modules.Cosine(2), modules.LocalM(3), modules.LocalP(2, 4, 3, 6.0)
    spatial = modules.SpatialAttention(2, 4, 3, width=6), modules.SpatialAttention(2, 4, 3)
    location = modules.Location(2, 4, 24)
    for x in (*tri.values(), *scored, *spatial, location):
        for parameter in x.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    made = {
        f"{type(x).__name__} {nth}": (x, x(q, k, v, causal, sharding=sharding))
        for nth, x in enumerate(scored + spatial)
    }
    made |= {name: (x, x(q, k, v, context, full, sharding=sharding)) for name, x in tri.items()}
    made["location"] = location, location(q, v, causal, sharding=sharding)
    coattention = modules.BiDAF(4), modules.DCN(4), modules.DCNPlus(torch.nn.Linear(4, 4))
    image = modules.HybridAttention(4, dilations=(1, 2)), modules.AttentionInAttention(4)
    channel = modules.SqueezeExcitation(4), modules.ChannelAttention()
    for x in (*coattention, *image, *channel):
        for parameter in x.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=g) / 4)
    for x in coattention:
        made[type(x).__name__] = x, x(q[:, 0], k[:, 1], sharding=sharding, question_sharding=sharding)
    rows = modules.Rows(ringattn.Sharding(24, mesh, "contiguous"), 4)
    for x in image:
        made[type(x).__name__] = x, x(q[:, 0].transpose(1, 2), rows)
    for x in channel:
        made[type(x).__name__] = x, x(q[:, 0].transpose(1, 2), sharding)
    return {
        name: [out.detach(), *torch.autograd.grad(out.sum(), [q, k, v, *x.parameters()], materialize_grads=True)]
        for name, (x, out) in made.items()
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bits_of_virtual_ranks(gloo: Workers, ranks: int) -> None:
    virtual = ringattn.simulate(_results, ring=ranks).results
    for one, two in zip(gloo.run(ranks, _results), virtual, strict=True):
        assert one.keys() == two.keys()
        for name, found in one.items():
            assert all(torch.equal(a, b) for a, b in zip(found, two[name], strict=True)), name
