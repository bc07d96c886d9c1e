"""General, location, cosine and local attention, against Luong's equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ringattn
from ringattn import modules
from tests.modules.dense import Axes, Inputs, compare, drawn

MASKS = (ringattn.Full(), ringattn.Causal())
SELF: Axes = {"q": ("tokens", 2), "k": ("tokens", 2), "v": ("tokens", 2)}
CROSS: Axes = {"q": ("tokens", 2), "k": ("keys", 2), "v": ("keys", 2)}


def _softmax(scores: torch.Tensor, v: torch.Tensor, mask: ringattn.Mask) -> torch.Tensor:
    m, n = scores.shape[-2:]
    scores = scores.masked_fill(~mask.dense(range(m), range(n)), -math.inf)
    return scores.softmax(-1) @ v.repeat_interleave(scores.shape[1] // v.shape[1], dim=1)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_general(mask: ringattn.Mask) -> None:
    def equation(module: modules.General, x: Inputs) -> torch.Tensor:
        k = x["k"].repeat_interleave(2, dim=1)
        return _softmax(torch.einsum("bhid,hde,bhje->bhij", x["q"], module.weight, k), x["v"], mask)

    compare(
        modules.General(4, 3, 6),
        lambda module, x, own: module(
            x["q"], x["k"], x["v"], mask, sharding=own["tokens"], kv_sharding=own["keys"], schedule="route"
        ),
        equation,
        drawn(q=(2, 4, 20, 3), k=(2, 2, 31, 6), v=(2, 2, 31, 5)),
        CROSS,
        {"tokens": 20, "keys": 31},
    )


def test_location() -> None:
    def equation(module: modules.Location, x: Inputs) -> torch.Tensor:
        return _softmax(torch.einsum("bhid,hjd->bhij", x["q"], module.weight), x["v"], ringattn.Full())

    compare(
        modules.Location(2, 3, 25),
        lambda module, x, own: module(x["q"], x["v"], ringattn.Full(), sharding=own["tokens"], kv_sharding=own["keys"]),
        equation,
        drawn(q=(2, 2, 20, 3), v=(2, 2, 25, 5)),
        CROSS,
        {"tokens": 20, "keys": 25},
    )


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_cosine(mask: ringattn.Mask) -> None:
    def equation(module: modules.Cosine, x: Inputs) -> torch.Tensor:
        products = x["q"] @ x["k"].mT
        lengths = (x["q"] ** 2).sum(-1).sqrt()[..., None] * (x["k"] ** 2).sum(-1).sqrt()[..., None, :]
        return _softmax(module.log_sharpness.exp()[:, None, None] * products / lengths, x["v"], mask)

    compare(
        modules.Cosine(2, 3.0),
        lambda module, x, own: module(x["q"], x["k"], x["v"], mask, sharding=own["tokens"]),
        equation,
        drawn(q=(2, 2, 23, 4), k=(2, 2, 23, 4), v=(2, 2, 23, 5)),
        SELF,
        {"tokens": 23},
    )


def test_local_m() -> None:
    def equation(_: nn.Module, x: Inputs) -> torch.Tensor:
        i, j = torch.arange(40)[:, None], torch.arange(40)
        scores = (x["q"] @ x["k"].mT / 2).masked_fill(((i - j).abs() > 6) | (j > i), -math.inf)
        return scores.softmax(-1) @ x["v"]

    compare(
        modules.LocalM(6),
        lambda module, x, own: module(x["q"], x["k"], x["v"], ringattn.Causal(), sharding=own["tokens"]),
        equation,
        drawn(q=(1, 2, 40, 4), k=(1, 2, 40, 4), v=(1, 2, 40, 5)),
        SELF,
        {"tokens": 40},
    )


def test_local_p() -> None:
    def equation(module: modules.LocalP, x: Inputs) -> torch.Tensor:
        inner = torch.tanh(torch.einsum("bhid,hde->bhie", x["q"], module.hidden))
        centres = 30 * torch.sigmoid(torch.einsum("bhie,hef->bhif", inner, module.centre))
        distance = torch.arange(30).double() - centres
        weights = (x["q"] @ x["k"].mT / 2).masked_fill(distance.abs() > 8, -math.inf).softmax(-1)
        return (weights * torch.exp(-(distance**2) / (2 * (8 / 2) ** 2))) @ x["v"]

    compare(
        modules.LocalP(2, 4, 3, 8.0),
        lambda module, x, own: module(x["q"], x["k"], x["v"], ringattn.Full(), sharding=own["tokens"]),
        equation,
        drawn(q=(1, 2, 30, 4), k=(1, 2, 30, 4), v=(1, 2, 30, 5)),
        SELF,
        {"tokens": 30},
    )
