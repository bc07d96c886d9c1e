"""The decoder: rotary positions, the initial weights, shards, sampling."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from ringattn.trainer.model import Decoder, Shape, rope, rotate
from ringattn.trainer.sampling import choose, generate

SHAPE = Shape(layers=2, width=16, heads=4, kv_heads=2)
sdpa = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)


@given(st.integers(0, 1_000_000), st.integers(0, 1000), st.integers(0, 2**31))
def test_rope_scores_depend_on_the_distance_alone(shift: int, distance: int, seed: int) -> None:
    """Su et al. 2021, equation 16, also where positions are large."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def score(at: int) -> torch.Tensor:
        here, there = rope(torch.tensor([at + distance]), 8), rope(torch.tensor([at]), 8)
        return (rotate(q, here) * rotate(k, there)).sum()

    bound = 2e-6 * float(q.norm() * k.norm())
    assert abs(float(score(shift) - score(0))) <= bound


def test_rope_keeps_norms_and_leaves_position_zero() -> None:
    x = torch.randn(1, 3, 5, 8)
    rotation = rope(torch.arange(5), 8)
    torch.testing.assert_close(rotate(x, rotation).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, rotation)[:, :, 0], x[:, :, 0])


def test_weights_are_the_seed_s_alone() -> None:
    first = Decoder(SHAPE, seed=1).state_dict()
    torch.rand(17)
    again, other = Decoder(SHAPE, seed=1).state_dict(), Decoder(SHAPE, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_shard_without_tokens_gives_zero_and_zero_gradients() -> None:
    model = Decoder(SHAPE, seed=0)
    none = torch.empty(1, 0, dtype=torch.int64)
    loss = model(none, none[0], lambda q, k, v: q + 0 * (k.sum() + v.sum())).sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_sampling_repeats_by_seed() -> None:
    model = Decoder(SHAPE, seed=0)
    draw = partial(generate, model, b"def ", 20, context=8, temperature=1.0, top_k=40)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert len(draw(seed=1)) == 20


def test_sampling_takes_only_the_likeliest() -> None:
    logits = torch.arange(256.0)
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, 100.0, 3, generator) for _ in range(200)}
    assert drawn == {253, 254, 255}
    assert choose(logits, 0.0, 256, generator) == 255


@pytest.mark.parametrize("length", [1, 9])
def test_the_first_tokens_do_not_see_the_last(length: int) -> None:
    model = Decoder(SHAPE, seed=0)
    tokens = torch.randint(256, (1, length + 1))
    changed = tokens.clone()
    changed[0, -1] += 1
    changed %= 256
    positions = torch.arange(length + 1)
    before, after = (model(t, positions, sdpa)[:, :-1] for t in (tokens, changed))
    assert torch.equal(before, after)
