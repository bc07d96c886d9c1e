"""The oracle against torch's own float64 attention, finite differences, and itself in other blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ringattn import reference
from ringattn.errors import InputError
from ringattn.reference import measure

Array = NDArray[np.float64]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def inputs(
    heads: int = 4, kv_heads: int = 2, queries: int = 13, keys: int = 17, dim: int = 8, value_dim: int = 5
) -> tuple[Array, Array, Array, Array, Array]:
    q, k, v = (
        random(2, heads, queries, dim),
        random(2, kv_heads, keys, dim),
        random(2, kv_heads, keys, value_dim),
    )
    return q, k, v, random(2, heads, queries, value_dim, seed=1), random(2, heads, queries, seed=2)


def some_mask(queries: int, keys: int) -> NDArray[np.bool_]:
    """A ragged mask in which the rows 3 and the last see nothing and key 2 is seen by nobody."""
    allowed = np.random.default_rng(5).random((queries, keys)) < 0.6
    allowed[3], allowed[-1], allowed[:, 2] = False, False, False
    return allowed


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: NDArray[np.bool_], scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention by autograd-able torch float64, with unreachable rows 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = torch.from_numpy(allowed)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    safe = lse.masked_fill(~mask.any(-1), 0.0)
    p = (scores - safe[..., None]).exp().masked_fill(~mask, 0.0)
    return p @ v, lse


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_and_gradients_are_those_of_torch(kv_heads: int, scale: float | None) -> None:
    q, k, v, dout, dlse = inputs(kv_heads=kv_heads)
    allowed = some_mask(13, 17)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    out, lse = torch_attention(tensors[0], tensors[1], tensors[2], allowed, scale)
    reachable = torch.from_numpy(allowed.any(1))
    ((out * torch.from_numpy(dout)).sum() + (lse * torch.from_numpy(dlse))[..., reachable].sum()).backward()

    got = reference.evaluate(q, k, v, allowed, dout, dlse, scale=scale)
    np.testing.assert_allclose(got.out, out.detach().numpy(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(got.lse, lse.detach().numpy(), rtol=0, atol=1e-14)
    for actual, tensor in zip((got.gradients.dq, got.gradients.dk, got.gradients.dv), tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(actual, tensor.grad.numpy(), rtol=0, atol=1e-13)


def test_causal_output_is_that_of_scaled_dot_product_attention() -> None:
    q, k, v = random(1, 3, 300, 16), random(1, 3, 300, 16, seed=1), random(1, 3, 300, 16, seed=2)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(tensors[0], tensors[1], tensors[2], is_causal=True)
    out, _ = reference.attention(q, k, v, np.tri(300, dtype=bool))
    assert reference.error(out, expected.numpy(), expected.numpy()) < 1e-14


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_are_finite_differences(which: int) -> None:
    *qkv, dout, dlse = inputs(heads=2, kv_heads=1, queries=4, keys=5, dim=3, value_dim=2)
    allowed = np.tri(4, 5, 1, dtype=bool)

    def loss(x: Array) -> float:
        q, k, v = (x if i == which else y for i, y in enumerate(qkv))
        out, lse = reference.attention(q, k, v, allowed)
        return float((out * dout).sum() + (lse * dlse).sum())

    got = reference.gradients(qkv[0], qkv[1], qkv[2], allowed, dout, dlse)
    analytic = (got.dq, got.dk, got.dv)[which]
    numeric = np.zeros_like(analytic)
    for at in np.ndindex(numeric.shape):
        step = np.zeros_like(numeric)
        step[at] = 1e-6
        numeric[at] = (loss(qkv[which] + step) - loss(qkv[which] - step)) / 2e-6
    np.testing.assert_allclose(analytic, numeric, rtol=0, atol=1e-8)


def test_the_gradient_of_the_lse_alone_moves_no_value() -> None:
    q, k, v, _, dlse = inputs()
    got = reference.evaluate(q, k, v, np.ones((13, 17), bool), dlse=dlse)
    assert not got.gradients.dv.any()
    # ∂L/∂q of a row is λ Σ P k: with dlse = 1 that is attention with the keys as values
    ones = reference.gradients(q, k, v, np.ones((13, 17), bool), np.zeros((2, 4, 13, 5)), np.ones_like(dlse))
    keys_as_values, _ = reference.attention(q, k, k, np.ones((13, 17), bool))
    np.testing.assert_allclose(ones.dq, keys_as_values * 8**-0.5, rtol=0, atol=1e-14)


def test_an_unreachable_row_gives_zero_and_minus_infinity_and_no_gradient() -> None:
    q, k, v, dout, dlse = inputs()
    dlse[..., 3] = np.nan  # what a loss over −inf sends back
    got = reference.evaluate(q, k, v, some_mask(13, 17), dout, dlse)
    for row in (3, 12):
        assert not got.out[:, :, row].any() and not got.gradients.dq[:, :, row].any()
        assert np.isneginf(got.lse[:, :, row]).all()
    assert not got.gradients.dk[:, :, 2].any() and not got.gradients.dv[:, :, 2].any()
    everything = (got.out, got.gradients.dq, got.gradients.dk, got.gradients.dv, got.magnitudes.dk)
    assert all(np.isfinite(x).all() for x in everything)


@pytest.mark.parametrize("elements", [1, 40, 100, 10**9])
def test_the_size_of_the_blocks_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout, dlse = inputs()
    allowed = some_mask(13, 17)
    expected = reference.evaluate(q, k, v, allowed, dout, dlse)
    monkeypatch.setattr(measure, "_BLOCK_ELEMENTS", elements)
    asked: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> NDArray[np.bool_]:
        asked.append((start, stop))
        return allowed[start:stop]

    got = reference.evaluate(q, k, v, rows, dout, dlse)
    assert asked[0][0] == 0 and asked[-1][1] == 13
    assert all(a[1] == b[0] for a, b in itertools.pairwise(asked))
    np.testing.assert_allclose(got.lse, expected.lse, rtol=0, atol=1e-14)
    for a, b in ((got.gradients, expected.gradients), (got.magnitudes, expected.magnitudes)):
        for name in ("dq", "dk", "dv"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-13)


def test_magnitudes_are_the_formulas_with_absolute_factors() -> None:
    q, k, v, dout, dlse = inputs(heads=2, kv_heads=2)
    allowed = some_mask(13, 17)
    out, lse = reference.attention(q, k, v, allowed)
    shift = np.where(np.isfinite(lse), lse, 0.0)[..., None]
    p = np.where(allowed, np.exp(q @ k.swapaxes(2, 3) / np.sqrt(8) - shift), 0.0)
    e = np.abs(dout) @ np.abs(v).swapaxes(2, 3) + np.abs(dout * out).sum(-1, keepdims=True)
    e = p * (e + np.abs(dlse)[..., None])
    got = reference.magnitudes(q, k, v, allowed, dout, dlse)
    np.testing.assert_allclose(got.out, p @ np.abs(v), atol=1e-13)
    np.testing.assert_allclose(got.dv, p.swapaxes(2, 3) @ np.abs(dout), atol=1e-13)
    np.testing.assert_allclose(got.dq, e @ np.abs(k) / np.sqrt(8), atol=1e-13)
    np.testing.assert_allclose(got.dk, e.swapaxes(2, 3) @ np.abs(q) / np.sqrt(8), atol=1e-13)


def test_no_queries_no_keys_and_large_scores() -> None:
    q, k, v, dout, _ = inputs(queries=0)
    assert reference.evaluate(q, k, v, np.zeros((0, 17), bool), dout).out.shape == (2, 4, 0, 5)
    q, k, v, dout, _ = inputs(keys=0)
    nothing = reference.evaluate(q, k, v, np.zeros((13, 0), bool), dout)
    assert not nothing.out.any() and np.isneginf(nothing.lse).all() and nothing.gradients.dk.shape == (2, 2, 0, 8)
    q, k, v, dout, _ = inputs()
    out, lse = reference.attention(q * 1e4, k, v, np.ones((13, 17), bool))
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_error_is_relative_to_the_magnitude() -> None:
    assert reference.error([3.0, 0.0], [3.0, 4.0], [0.0, 8.0]) == 0.5
    assert reference.error([0.0], [0.0], [0.0]) == 0.0
    assert reference.error([], [], []) == 0.0
    assert reference.error([1.0], [0.0], [0.0]) == np.inf
    assert reference.error([np.nan], [1.0], [1.0]) == np.inf
    assert reference.error([np.inf], [1.0], [1.0]) == np.inf
    assert reference.error([1.0], [-np.inf], [1.0]) == np.inf
    assert reference.error([-np.inf, 2.0], [-np.inf, 1.0], [-np.inf, 2.0]) == 0.5
    with pytest.raises(ValueError, match="shape"):
        reference.error([1.0, 2.0], [1.0], [1.0])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda q, k, v: (q[0], k, v, True), "4 dims"),
        (lambda q, k, v: (q, k[..., :3], v, True), "shapes disagree"),
        (lambda q, k, v: (q[:, :3], k, v, True), "3 query heads"),
        (lambda q, k, v: (q, k, v, np.ones((13, 16), bool)), r"needs shape \(13, 17\)"),
        (lambda q, k, v: (q, k, v, np.ones((13, 17))), "needs booleans"),
        (lambda q, k, v: (q, k, v, lambda a, b: np.ones((13, 17), bool)[a : b - 1]), "for rows 0 to 13"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    broken: Callable[..., tuple[Array, Array, Array, Array]], message: str
) -> None:
    q, k, v, allowed = broken(*inputs()[:3])
    with pytest.raises(ValueError, match=message):
        reference.attention(q, k, v, allowed)


def test_torch_tensors_are_accepted() -> None:
    q, k, v, dout, _ = inputs()
    allowed = some_mask(13, 17)
    tensors = [torch.from_numpy(x) for x in (q, k, v, allowed, dout)]
    expected = reference.evaluate(q, k, v, allowed, dout)
    np.testing.assert_array_equal(reference.evaluate(*tensors).gradients.dq, expected.gradients.dq)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "features", [(), ("softcap",), ("alibi", "relative"), ("bias", "dropout"), ("softcap", "alibi", "bias")]
)
def test_what_changes_scores_and_weights_is_that_of_torch(features: tuple[str, ...], sinks: bool) -> None:
    q, k, v, dout, dlse = inputs()
    allowed = some_mask(13, 17)
    offered = {"alibi": random(4), "relative": random(4, 7), "bias": random(4, 13, 17), "sinks": random(4)}
    tables = {name: x for name, x in offered.items() if name in features or (sinks and name == "sinks")}
    x, y, z, *rest = (torch.from_numpy(part).requires_grad_() for part in (q, k, v, *tables.values()))
    learned = dict(zip(tables, rest, strict=True))
    scores = x @ y.repeat_interleave(2, 1).mT * 8**-0.5
    if "softcap" in features:
        scores = 1.5 * torch.tanh(scores / 1.5)
    offset = torch.arange(13)[:, None] - torch.arange(17)
    if "alibi" in features:
        scores = scores - learned["alibi"][:, None, None] * offset.abs()
    if "relative" in features:
        scores = scores + learned["relative"][:, offset.clamp(-3, 3) + 3]
    if "bias" in features:
        scores = scores + learned["bias"]
    scores = scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)
    if sinks:
        scores = torch.cat([scores, learned["sinks"][None, :, None, None].expand(2, 4, 13, 1)], dim=3)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])[..., :17]
    if "dropout" in features:
        weights = weights * torch.from_numpy(reference.kept(3, 0.4, 2, 4, range(13), range(17))) / 0.6
    out = weights @ z.repeat_interleave(2, 1)
    fine = lse.isfinite()
    ((out * torch.from_numpy(dout)).sum() + (lse[fine] * torch.from_numpy(dlse)[fine]).sum()).backward()

    scalars = {"softcap": 1.5 if "softcap" in features else None, "dropout": 0.4 * ("dropout" in features), "seed": 3}
    got = reference.evaluate(q, k, v, allowed, dout, dlse, **scalars, **tables)
    np.testing.assert_allclose(got.out, out.detach().numpy(), atol=1e-13)
    np.testing.assert_allclose(got.lse, lse.detach().numpy(), atol=1e-13)
    found = {"q": got.gradients.dq, "k": got.gradients.dk, "v": got.gradients.dv, **got.gradients.params}
    sizes = {"q": got.magnitudes.dq, "k": got.magnitudes.dk, "v": got.magnitudes.dv, **got.magnitudes.params}
    for name, leaf in {"q": x, "k": y, "v": z, **learned}.items():
        assert leaf.grad is not None
        np.testing.assert_allclose(found[name], leaf.grad.numpy(), atol=1e-12, err_msg=name)
        assert (np.abs(found[name]) <= sizes[name] * (1 + 1e-12)).all(), name


def test_dropout_keeps_the_share_it_says_and_looks_random() -> None:
    keep = reference.kept(7, 0.3, 2, 3, range(200), range(100, 400))
    assert abs(keep.mean() - 0.7) < 4 * np.sqrt(0.21 / keep.size)
    for dim in range(4):  # neighbours do not know of each other
        a, b = np.split(keep if keep.shape[dim] % 2 == 0 else np.delete(keep, 0, dim), 2, axis=dim)
        assert abs((a == b).mean() - 0.58) < 5 * np.sqrt(0.25 / a.size)
    assert (reference.kept(8, 0.3, 2, 3, range(200), range(100, 400)) != keep).mean() > 0.4


def test_linear_is_that_of_torch() -> None:
    q, k, v, dout, _ = inputs()
    allowed = some_mask(13, 17)
    x, y, z = (torch.from_numpy(part).requires_grad_() for part in (q, k, v))
    phi = [torch.nn.functional.elu(part) + 1 for part in (x, y)]
    weights = phi[0] @ phi[1].repeat_interleave(2, 1).mT * torch.from_numpy(allowed)
    total = weights.sum(-1, keepdim=True)
    out = weights @ z.repeat_interleave(2, 1) / torch.where(total == 0, 1, total)
    (out * torch.from_numpy(dout)).sum().backward()
    got = reference.linear(q, k, v, allowed, dout)
    np.testing.assert_allclose(got.out, out.detach().numpy(), atol=1e-13)
    for found, size, leaf in (
        (got.gradients.dq, got.magnitudes.dq, x),
        (got.gradients.dk, got.magnitudes.dk, y),
        (got.gradients.dv, got.magnitudes.dv, z),
    ):
        assert leaf.grad is not None
        np.testing.assert_allclose(found, leaf.grad.numpy(), atol=1e-12)
        assert (np.abs(found) <= size * (1 + 1e-12)).all()


def test_hard_takes_the_best_and_of_equals_the_first() -> None:
    q, k, v, dout, _ = inputs()
    allowed = some_mask(13, 17)
    k[:, :, 9] = k[:, :, 4]  # a tie wherever both are seen
    got = reference.hard(q, k, v, allowed, dout)
    x, y = torch.from_numpy(q), torch.from_numpy(k).repeat_interleave(2, 1)
    scores = (x[:, :, :, None] * y[:, :, None]).sum(-1).masked_fill(~torch.from_numpy(allowed), -torch.inf)
    z = torch.from_numpy(v).requires_grad_()
    index = scores.argmax(-1)[..., None].expand(-1, -1, -1, 5)
    out = z.repeat_interleave(2, 1).gather(2, index) * torch.from_numpy(allowed.any(axis=1))[:, None]
    (out * torch.from_numpy(dout)).sum().backward()
    assert z.grad is not None
    np.testing.assert_array_equal(got.out, out.detach().numpy())
    np.testing.assert_allclose(got.gradients.dv, z.grad.numpy(), atol=1e-13)
    assert not got.gradients.dq.any() and not got.gradients.dk.any()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"scale": float("nan")}, "scale must be a finite number; got nan"),
        ({"scale": "1"}, "scale must be an array of real numbers: they are <U1"),
        ({"softcap": 0}, "softcap must be a finite number above 0; got 0"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1"),
        ({"seed": -1}, "seed must be an integer"),
        ({"sinks": np.ones(3)}, r"sinks needs shape \(4,\)"),
        ({"relative": np.ones((4, 2))}, r"relative needs shape \(4, 3\)"),
        ({"bias": np.ones((4, 13, 13))}, r"bias needs shape \(4, 13, 17\)"),
        ({"temperature": 1}, "scores are scale, softcap, .*; got temperature"),
    ],
)
def test_scores_that_make_no_sense_are_refused(scores: dict[str, Any], message: str) -> None:
    q, k, v = inputs()[:3]
    with pytest.raises(InputError, match=message):
        reference.attention(q, k, v, np.ones((13, 17), bool), **scores)


@pytest.mark.parametrize("evaluate", [reference.evaluate, reference.hard, reference.linear])
def test_what_is_no_array_of_numbers_is_refused(evaluate: Callable[..., Any]) -> None:
    q, k, v, dout, _ = inputs()
    everything = np.ones((13, 17), bool)
    wrong: Any
    for wrong in ("x", None, [[1], [1, 2]], q * 1j):
        with pytest.raises(InputError, match="q must be an array of real numbers"):
            evaluate(wrong, k, v, everything)
    with pytest.raises(InputError, match="dout needs shape"):
        evaluate(q, k, v, everything, dout[..., :1])
    with pytest.raises(InputError, match="allowed must be a matrix of booleans"):
        evaluate(q, k, v, [[True], [True, False]])
    with pytest.raises(InputError, match="at least one dim a head"):
        evaluate(q[..., :0], k[..., :0], v, everything)
