"""Modules of images and channels against their papers' equations over the whole image, any number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import ringattn
from ringattn.modules.channel import ChannelAttention, SqueezeExcitation
from ringattn.modules.deformable import DeformableConvolution
from ringattn.modules.hybrid import AttentionInAttention, HybridAttention
from ringattn.modules.images import Convolution, Rows
from tests.modules.dense import Call, Inputs, Layouts, Shardings, compare

HEIGHT, WIDTH, CHANNELS = 11, 5, 6


def _image() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, CHANNELS, HEIGHT * WIDTH, generator=g, dtype=torch.float64)


def _runs(ranks: int) -> ringattn.Explicit:
    """Rows of pixels dealt in runs, two of them on rank 0; some ranks have none."""
    edges = [HEIGHT * i // (ranks + 1) * WIDTH for i in range(ranks + 2)]
    runs: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for nth, run in enumerate(itertools.pairwise(edges)):
        if run[0] < run[1]:
            runs[nth % ranks].append(run)
    return ringattn.Explicit(runs)


def _by_rows(module: torch.nn.Module, equation: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    def call(own: torch.nn.Module, x: Inputs, owners: Shardings) -> torch.Tensor:
        out: torch.Tensor = own(x["q"], Rows(owners["image"], WIDTH))
        return out

    _compare(module, call, equation, _runs)


def _by_positions(module: torch.nn.Module, equation: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    def call(own: torch.nn.Module, x: Inputs, owners: Shardings) -> torch.Tensor:
        out: torch.Tensor = own(x["q"], owners["image"])
        return out

    _compare(module, call, equation, "striped")


def _compare(module: torch.nn.Module, call: Call, equation: Any, layout: Layouts) -> None:
    inputs, axes = {"q": _image()}, {"q": ("image", 2)}
    compare(
        module, call, lambda m, x: equation(m, x["q"]), inputs, axes, {"image": HEIGHT * WIDTH}, layout, limit=1e-11
    )


def _conv(x: torch.Tensor, layer: Convolution) -> torch.Tensor:
    image = x.unflatten(2, (HEIGHT, WIDTH))
    padding = layer.weight.shape[2] // 2 * layer.dilation
    return functional.conv2d(image, layer.weight, layer.bias, padding=padding, dilation=layer.dilation).flatten(2)


def _squeeze(module: SqueezeExcitation, x: torch.Tensor) -> torch.Tensor:
    z = x.mean(dim=2)
    s = torch.sigmoid(module.excite(functional.relu(module.squeeze(z))))
    return s[:, :, None]


def _self_channel(module: ChannelAttention, x: torch.Tensor) -> torch.Tensor:
    energies = module.scale * torch.einsum("bis,bjs->bij", x, x)
    weights = energies.exp() / energies.exp().sum(dim=2, keepdim=True)
    return module.beta * torch.einsum("bij,bjs->bis", weights, x) + x


def _deformable(module: DeformableConvolution, x: torch.Tensor) -> torch.Tensor:
    """By torch's own bilinear sampling, a tap at a time."""
    offsets = module.bound * torch.tanh(_conv(x, module.offsets)).unflatten(2, (HEIGHT, WIDTH))
    image, count = x.unflatten(2, (HEIGHT, WIDTH)), module.kernel**2
    total = module.taps.bias[:, None, None].expand(len(x), -1, HEIGHT, WIDTH)
    for n in range(count):
        down, right = n // module.kernel - module.kernel // 2, n % module.kernel - module.kernel // 2
        y = torch.arange(HEIGHT)[:, None] + down + offsets[:, n]
        z = torch.arange(WIDTH) + right + offsets[:, count + n]
        grid = torch.stack([2 * z / (WIDTH - 1) - 1, 2 * y / (HEIGHT - 1) - 1], dim=-1)
        sampled = functional.grid_sample(image, grid, align_corners=True)
        total = total + torch.einsum(
            "bchw,oc->bohw", sampled, module.taps.weight[:, :, n // module.kernel, n % module.kernel]
        )
    return total.flatten(2)


def _hybrid(module: HybridAttention, x: torch.Tensor) -> torch.Tensor:
    y = x
    for layer in module.spatial:
        y = functional.relu(_conv(y, layer))  # type: ignore[arg-type]
    gated = x * torch.sigmoid(_conv(y, module.score)) * _squeeze(module.channel, x)
    return _deformable(module.aligned, gated)


def _attention_in_attention(module: AttentionInAttention, x: torch.Tensor) -> torch.Tensor:
    y = _conv(x, module.enter)
    shares = functional.softmax(module.decide(y.mean(dim=2)) / module.temperature, dim=1)
    attention = _conv(_conv(y, module.seen) * torch.sigmoid(_conv(y, module.look)), module.attended)
    mixed = shares[:, :1, None] * attention + shares[:, 1:, None] * _conv(y, module.plain)
    return _conv(functional.leaky_relu(mixed, 0.2), module.leave) + x


def test_squeeze_and_excitation() -> None:
    torch.manual_seed(0)
    _by_positions(SqueezeExcitation(CHANNELS, reduction=2), lambda m, x: x * _squeeze(m, x))


def test_channels_attend_to_each_other() -> None:
    module = ChannelAttention(scale=0.02)
    torch.nn.init.constant_(module.beta, 0.7)
    _by_positions(module, _self_channel)


def test_convolution() -> None:
    torch.manual_seed(0)
    _by_rows(Convolution((CHANNELS, 4), 3, dilation=2), lambda m, x: _conv(x, m))


def test_deformable_convolution() -> None:
    torch.manual_seed(0)
    module = DeformableConvolution((CHANNELS, 4), 3, bound=1.5)
    for parameter in module.offsets.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    _by_rows(module, _deformable)


def test_hybrid_attention() -> None:
    torch.manual_seed(0)
    module = HybridAttention(CHANNELS, dilations=(1, 2))
    for parameter in module.aligned.offsets.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    _by_rows(module, _hybrid)


def test_attention_in_attention() -> None:
    torch.manual_seed(0)
    module = AttentionInAttention(CHANNELS, 1.5)
    torch.nn.init.ones_(dict(module.named_parameters())["decide.0.bias"])  # or nothing may get through the rectifier
    _by_rows(module, _attention_in_attention)


@pytest.mark.parametrize(("ranks", "layout"), [(2, "contiguous"), (2, "striped"), (1, "contiguous")])
def test_pixels_that_are_no_whole_rows_are_refused_by_all_ranks(ranks: int, layout: str) -> None:
    def refused(mesh: ringattn.Mesh) -> None:
        with pytest.raises(ringattn.InputError, match="whole rows of 5"):
            Rows(ringattn.Sharding(56, mesh, layout=layout), 5)

    ringattn.simulate(refused, ring=ranks)


def test_ranks_without_pixels_take_part_in_the_backward_pass() -> None:
    """Their parameters get zeros, and those whose neighbours' rows they might have had do not wait for them."""
    layout = ringattn.Explicit([[(0, WIDTH)], [(WIDTH, 2 * WIDTH)], []])

    def run(mesh: ringattn.Mesh) -> list[float]:
        rows = Rows(ringattn.Sharding(2 * WIDTH, mesh, layout), WIDTH)
        module = HybridAttention(CHANNELS, dilations=(1,))
        module(torch.ones(1, CHANNELS, rows.sharding.count), rows).sum().backward()
        return [float(x.grad.abs().sum()) for x in module.parameters() if x.grad is not None]

    *_, without = ringattn.simulate(run, ring=3).results
    assert len(without) == len(list(HybridAttention(CHANNELS, dilations=(1,)).parameters()))


@pytest.mark.parametrize("make", [lambda: Convolution((1, 1), 2), lambda: DeformableConvolution((1, 1), bound=0)])
def test_bad_arguments(make: Any) -> None:
    with pytest.raises(ringattn.InputError):
        make()
