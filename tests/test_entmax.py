"""Entmax: against the entmax package and float64 formulas; the search for thresholds; what is hard about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import entmax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn
from ringattn.conformance import Case, attend, errors, joined, limits, oracle, simulated
from ringattn.errors import InputError
from ringattn.mechanisms import thresholds
from ringattn.mechanisms.base import State
from tests.workers import Workers

ALPHAS = (1.05, 1.25, 1.37, 1.5, 1.8, 2.0)


def _packaged(scores: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """The entmax package's weights of the last dim."""
    if alpha == 2:
        found = entmax.sparsemax(scores, dim=-1)
    elif alpha == 1.5:
        found = entmax.entmax15(scores, dim=-1)
    else:
        found = entmax.entmax_bisect(scores, alpha, dim=-1, n_iter=60)
    assert isinstance(found, torch.Tensor)
    return found


def _dense(z: torch.Tensor, power: torch.Tensor | float) -> torch.Tensor:
    """``[(z - t)+]^power`` whose rows sum to 1, differentiable: a threshold by bisection and one step of Newton's."""
    with torch.no_grad():
        low = z.amax(dim=-1, keepdim=True) - 1
        high = low + 1
        for _ in range(70):
            middle = (low + high) / 2
            enough = ((z - middle).clamp(min=0) ** power).sum(dim=-1, keepdim=True) >= 1
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above = z - low
    inside = torch.where(above > 0, above, 1.0)
    total = torch.where(above > 0, inside**power, 0.0).sum(dim=-1, keepdim=True)
    slope = torch.where(above > 0, power * inside ** (power - 1), 0.0).sum(dim=-1, keepdim=True).detach()
    moved = inside - (total - 1) / slope
    return torch.where(above > 0, moved.clamp(min=0) ** power, 0.0)


def _rows(mesh: ringattn.Mesh, q: torch.Tensor, k: torch.Tensor, mechanism: ringattn.Entmax) -> torch.Tensor:
    sharding = ringattn.Sharding(q.shape[2], mesh)
    q, k = sharding.split(q, 2), sharding.split(k, 2)
    rows = range(sharding.length)
    weights = ringattn.attention_rows(q, k, ringattn.Full(), rows, sharding=sharding, mechanism=mechanism)
    return sharding.join(weights, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_are_those_of_the_package(alpha: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 83, 16, generator=g, dtype=dtype) for _ in range(2))
    for scale in (0.01, 0.25, 2.0):
        expected = _packaged(scale * q.double() @ k.double().mT, alpha)
        for ranks in (1, 3):
            mechanism = ringattn.Entmax(alpha, scale=scale)
            for found in ringattn.simulate(_rows, q, k, mechanism, ring=ranks).results:
                assert found.dtype == dtype
                assert (found.double() - expected).norm() <= 1e-6 * expected.norm()
                assert (found.double().sum(dim=-1) - 1).abs().max() <= 1e-6


def _entmax(params: dict[str, torch.Tensor], **more: Any) -> ringattn.Entmax:
    fields: dict[str, Any] = {**params, **more}
    return ringattn.Entmax(**fields)


def _all_of_it(mesh: ringattn.Mesh, tensors: dict[str, torch.Tensor], layout: str, mask: Any) -> list[torch.Tensor]:
    """Output and all gradients of the whole sequence, with everything that scores can have and a learned alpha."""
    length = tensors["q"].shape[2]
    sharding = ringattn.Sharding(length, mesh, layout)
    dims = {"q": 2, "k": 2, "v": 2, "bias": 1}
    own = {name: sharding.split(x, dims[name]) if name in dims else x for name, x in tensors.items() if name != "dout"}
    own = {name: x.detach().clone().requires_grad_() for name, x in own.items()}
    params = {name: x for name, x in own.items() if name not in ("q", "k", "v")}
    out = ringattn.attention(
        own["q"], own["k"], own["v"], mask, sharding=sharding, mechanism=_entmax(params, softcap=3.0)
    )
    out.backward(sharding.split(tensors["dout"], 2))
    found = [sharding.join(out.detach(), 2)]
    for name, x in own.items():
        assert x.grad is not None
        found.append(sharding.join(x.grad, dims[name]) if name in dims else ringattn.reduce(x.grad, mesh, "sum"))
    return found


def _tensors(length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    sizes = {"q": (4, length, 8), "k": (2, length, 8), "v": (2, length, 6), "dout": (4, length, 6)}
    drawn = {name: torch.randn(2, *size, generator=g, dtype=dtype) for name, size in sizes.items()}
    return drawn | {
        "alpha": torch.tensor([1.1, 1.37, 1.5, 1.62], dtype=dtype),
        "alibi": torch.rand(4, generator=g, dtype=dtype) / 10,
        "relative": torch.randn(4, 9, generator=g, dtype=dtype),
        "bias": torch.randn(4, length, length, generator=g, dtype=dtype),
    }


def _expected(tensors: dict[str, torch.Tensor], allowed: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same densely, in float64, by autograd; and the sum of what is added up in alpha's gradient, absolute."""
    x = {name: t.double().requires_grad_(name != "dout") for name, t in tensors.items()}
    k, v = (x[name].repeat_interleave(2, dim=1) for name in "kv")
    distance = torch.arange(allowed.shape[0])[:, None] - torch.arange(allowed.shape[0])
    scores = 3 * torch.tanh(x["q"] @ k.mT / 8**0.5 / 3) - x["alibi"][:, None, None] * distance.abs()
    scores = scores + x["relative"][:, distance.clamp(-4, 4) + 4] + x["bias"]
    scores = torch.where(allowed, scores, -1e9)
    less_1 = x["alpha"][:, None, None] - 1
    weights = _dense(less_1 * scores, 1 / less_1) * allowed
    out, wanted = weights @ v, [x[name] for name in x if name != "dout"]
    each = (weights + less_1 * torch.special.entr(weights)) / less_1**2 * (x["dout"].abs() @ v.abs().mT)
    return [out.detach(), *torch.autograd.grad(out, wanted, x["dout"])], each.detach().sum(dim=(0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("ranks", "layout"), [(1, "contiguous"), (2, "zigzag"), (3, "striped"), (5, "contiguous")])
def test_all_terms_of_scores_and_a_learned_alpha(ranks: int, layout: str, dtype: torch.dtype) -> None:
    tensors, mask = _tensors(31, dtype), ringattn.Causal()
    expected, alpha_size = _expected(tensors, mask.dense(range(31), range(31)))
    (found, *_) = ringattn.simulate(_all_of_it, tensors, layout, mask, ring=ranks).results
    sizes = [alpha_size if i == 4 else x for i, x in enumerate(expected)]
    for x, y, size in zip(found, expected, sizes, strict=True):
        assert (x.double() - y).norm() <= (1e-6 if dtype == torch.float32 else 1e-13) * size.norm()


def test_gradcheck() -> None:
    tensors = {name: x[:, :, :7] if name in ("q", "k", "v") else x for name, x in _tensors(7, torch.float64).items()}
    tensors = {name: x[:1] if x.dim() == 4 else x for name, x in tensors.items()}
    names = [name for name in tensors if name != "dout"]
    sharding = ringattn.Sharding(7, ringattn.init())

    def out(*values: torch.Tensor) -> torch.Tensor:
        q, k, v, *params = values
        mechanism = _entmax(dict(zip(names[3:], params, strict=True)))
        return ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, mechanism=mechanism)

    leaves = [tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(out, leaves, atol=1e-6)


@given(
    case=st.builds(
        Case,
        length=st.integers(1, 60),
        mask=st.sampled_from([ringattn.Full(), ringattn.Window(5)]),
        ranks=st.sampled_from([1, 2, 3, 5, 8]),
        groups=st.sampled_from([1, 3]),
        layout=st.sampled_from(["auto", "striped"]),
        schedule=st.sampled_from(["ring", "route"]),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        seed=st.integers(0, 99),
        scale=st.sampled_from([None, 0.0, -3.0, 0.02]),
    ),
    alpha=st.sampled_from(ALPHAS[:-2]),
)
@settings(max_examples=40, deadline=None)
def test_conforms(case: Case, alpha: float) -> None:
    case = dataclasses.replace(case, mechanism=ringattn.Entmax(alpha))
    answer = oracle(case)
    most = limits(case, answer)
    for name, error in errors(simulated(case), answer).items():
        assert error <= most[name], name


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_gives_the_bits_of_the_simulator(gloo: Workers, ranks: int) -> None:
    for mask, layout in ((ringattn.Causal(), "zigzag"), (ringattn.Documents([40, 21]), "contiguous")):
        case = Case(61, mask, ranks=ranks, groups=2, layout=layout, mechanism=ringattn.Entmax(1.37))
        found, virtual = joined(case, gloo.run(ranks, attend, case)), simulated(case)
        assert all(torch.equal(found[name], virtual[name]) for name in found)


@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.5, 2.0])
def test_equal_scores_one_key_and_rows_that_nothing_may_reach(alpha: float) -> None:
    sharding = ringattn.Sharding(300, ringattn.init())
    q, v = torch.randn(1, 1, 300, 4), torch.randn(1, 1, 300, 4)
    k = torch.ones(1, 1, 300, 4)
    mechanism = ringattn.Entmax(alpha)
    mask = ringattn.Causal()
    out = ringattn.attention(q, k, v, mask, sharding=sharding, mechanism=mechanism)
    mean = v.double().cumsum(dim=2) / torch.arange(1, 301)[:, None]
    assert (out - mean).norm() <= 1e-6 * mean.norm()
    nothing = ringattn.attention(q, k, v, ~ringattn.Full(), sharding=sharding, mechanism=mechanism)
    assert (nothing == 0).all()


@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.8, 2.0])
@pytest.mark.parametrize("distinct", [1, 2, 3, 40])
def test_many_keys_alike(alpha: float, distinct: int) -> None:
    """More keys of one score than are kept one by one: the threshold is next to them, or between."""
    g = torch.Generator().manual_seed(distinct)
    values = torch.rand(distinct, generator=g, dtype=torch.float64) * torch.tensor([[0.01], [0.3], [1.0], [4.0]])
    z = values[:, torch.randint(distinct, (2000,), generator=g)]
    cut, passes = _search(z[None, None], 1 / (alpha - 1))
    weights = (z - cut.guess[0, 0, :, None]).clamp(min=0) ** (1 / (alpha - 1))
    assert (weights.sum(dim=-1) - 1).abs().max() <= 1e-8 and passes <= 12


def _search(z: torch.Tensor, p: float, precise: float = 1e-9) -> tuple[thresholds.Cut, int]:
    """The thresholds of scores ``[B, H, M, N]`` in tiles of 500 keys, and the passes they took."""
    state = thresholds.blank(z.shape[:-1], z.device)
    for tile in z.split(500, dim=-1):
        thresholds.join(state, thresholds.sketch(tile))
    cut, passes = thresholds.first_guess(state, p), 1
    while (cut.radius > 0).any() and passes < 100:
        state = thresholds.nothing(z.shape[:-1], z.device)
        for tile in z.split(500, dim=-1):
            thresholds.gather(state, thresholds.gathered(tile, cut, p))
        cut, passes = thresholds.next_guess(state, cut, p, precise), passes + 1
    return cut, passes


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("deviation", [0.01, 0.1, 0.5, 1.0, 3.0])
def test_thresholds_take_two_passes_or_three(alpha: float, deviation: float) -> None:
    z = (alpha - 1) * deviation * torch.randn(1, 1, 200, 4096, generator=torch.Generator().manual_seed(3)).double()
    cut, passes = _search(z, 1 / (alpha - 1))
    assert passes <= 3
    assert (((z - cut.guess[..., None]).clamp(min=0) ** (1 / (alpha - 1))).sum(dim=-1) - 1).abs().max() <= 1e-9


def _same(a: State, b: State) -> bool:
    """Whether sketches or gatherings are, the kept distances as sets."""
    a, b = (x if len(x) == 3 else (x[0], x[1].sort(dim=-1).values) for x in (a, b))
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b, strict=True))


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-12, 0.01, 1.0, 30.0]), known=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_passes_gather_is_a_monoid(seed: int, scale: float, known: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(1, 2, 3, 240, generator=g, dtype=torch.float64)
    z[..., :60] *= 0.1
    z = z.masked_fill(torch.rand(z.shape, generator=g) < 0.3, -torch.inf)
    z[0, 0, 0] = -torch.inf
    cut = thresholds.first_guess(thresholds.sketch(z), 2.0)
    neutral = (thresholds.nothing if known else thresholds.blank)(z.shape[:-1], z.device)

    def part(piece: torch.Tensor) -> State:
        return thresholds.gathered(piece, cut, 2.0) if known else thresholds.sketch(piece)

    def merged(*parts: State) -> State:
        total = tuple(x.clone() for x in parts[0])
        for x in parts[1:]:
            (thresholds.gather if known else thresholds.join)(total, x)
        return total

    a, b, c = (part(x) for x in z.split([60, 100, 80], dim=-1))
    whole = part(z)
    assert _same(merged(merged(a, b), c), whole) and _same(merged(a, merged(b, c)), whole)
    assert _same(merged(c, a, b), whole)
    assert _same(merged(neutral, a), a) and _same(merged(a, neutral), a) and _same(merged(neutral, neutral), neutral)


@pytest.mark.parametrize("alpha", [1.0, 1.01, 2.1, float("nan"), "1.5", None, True])
def test_alpha_out_of_range_is_refused(alpha: Any) -> None:
    with pytest.raises(InputError, match="alpha must be"):
        ringattn.Entmax(alpha)


@pytest.mark.parametrize("alpha", [torch.tensor([1.5, 2.5]), torch.tensor([1.0, 1.5]), torch.tensor([1.5])])
def test_learned_alpha_out_of_range_is_refused(alpha: torch.Tensor) -> None:
    q = torch.randn(1, 2, 12, 4)
    sharding = ringattn.Sharding(12, ringattn.init())
    with pytest.raises(InputError, match="alpha must be"):
        ringattn.attention(q, q, q, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Entmax(alpha))


def test_no_number_is_nan_and_ends() -> None:
    sharding = ringattn.Sharding(12, ringattn.init())
    for bad in (float("nan"), float("inf")):
        q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
        k[0, 0, 3] = bad
        out = ringattn.attention(q, k, v, ringattn.Full(), sharding=sharding, mechanism=ringattn.Entmax())
        assert out[:, 1].isfinite().all()
        assert out[:, 0].isnan().any()


def test_half_precision_is_sane() -> None:
    case = Case(70, ringattn.Causal(), ranks=3, groups=2, dtype=torch.bfloat16, mechanism="entmax")
    answer = oracle(case)
    most = limits(case, answer)
    assert all(error <= most[name] for name, error in errors(simulated(case), answer).items())
