"""Four-term spatial attention, against its four terms pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

import ringattn
from ringattn import modules
from ringattn.errors import InputError
from tests.modules.dense import Axes, Inputs, compare, drawn

AXES: Axes = {"q": ("tokens", 2), "k": ("tokens", 2), "v": ("tokens", 2)}


def _relative(n: int, width: int | None, frequencies: int, longest: float) -> torch.Tensor:
    """R of every pair, ``[n, n, 2 F]``: sines of the key's distance from the query, then cosines."""
    at = torch.arange(n)
    axes = [at] if width is None else [at // width, at % width]
    waves = longest ** -(torch.arange(frequencies).double() / frequencies)
    angles = torch.cat([(x[None, :] - x[:, None]).double()[..., None] * waves for x in axes], dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@pytest.mark.parametrize("width", [None, 6], ids=["1-D", "2-D"])
@pytest.mark.parametrize("terms", [{1, 2, 3, 4}, {1}, {2}, {3}, {4}, {1, 4}, {2, 3}], ids=str)
def test_the_terms(terms: set[int], width: int | None) -> None:
    mask = ringattn.Full() if width else ringattn.Causal()

    def equation(module: modules.SpatialAttention, x: Inputs) -> torch.Tensor:
        places = _relative(24, width, 3, 50.0)
        scores = 0 * x["q"] @ x["k"].mT
        if 1 in terms:
            scores = scores + x["q"] @ x["k"].mT
        if 2 in terms:
            scores = scores + torch.einsum("bhid,hdf,ijf->bhij", x["q"], module.places, places)
        if 3 in terms:
            scores = scores + torch.einsum("hd,bhjd->bhj", module.content, x["k"])[:, :, None]
        if 4 in terms:
            scores = scores + torch.einsum("hd,hdf,ijf->hij", module.place, module.places, places)
        return scores.masked_fill(~mask.dense(range(24), range(24)), -math.inf).softmax(-1) @ x["v"]

    inputs = drawn(q=(2, 2, 24, 4), k=(2, 2, 24, 4), v=(2, 2, 24, 5))
    compare(
        modules.SpatialAttention(2, 4, 3, width, terms, longest=50.0),
        lambda module, x, own: module(x["q"], x["k"], x["v"], mask, sharding=own["tokens"]),
        equation,
        inputs,
        AXES,
        {"tokens": 24},
        unused={name for name, uses in (("q", {1, 2}), ("k", {1, 3})) if not terms & uses},
    )


def test_other_terms_are_refused() -> None:
    with pytest.raises(InputError, match=r"terms are some of 1, 2, 3 and 4; got \[5\]"):
        modules.SpatialAttention(1, 2, terms={5})
