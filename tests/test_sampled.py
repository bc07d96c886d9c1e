"""Sampled attention: the same draws anywhere, of the right distribution, and gradients of what is not the draw."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import ringattn
from ringattn.conformance import Case, attend, joined, simulated
from ringattn.errors import InputError
from ringattn.mechanisms.dropout import kept, uniform
from tests.workers import Workers

Tensors = dict[str, torch.Tensor]


def _sampled(params: Tensors, **more: Any) -> ringattn.Sampled:
    fields: dict[str, Any] = {**params, **more}
    return ringattn.Sampled(**fields)


def _drawn(
    mesh: ringattn.Mesh, tensors: Tensors, layout: str, schedule: str, mask: ringattn.Mask, kinds: dict[str, Any]
) -> list[torch.Tensor]:
    """Of the whole sequence: output, position, log-probability, entropy, and the gradients where any are wanted."""
    sharding = ringattn.Sharding(tensors["q"].shape[2], mesh, layout, mask=mask)
    dims = {"q": 2, "k": 2, "v": 2, "bias": 1}
    grads = [name for name in tensors if name.startswith("d")]
    own = {name: sharding.split(x, dims[name]) if name in dims else x for name, x in tensors.items()}
    own = {name: x.detach().clone().requires_grad_() for name, x in own.items() if name not in grads}
    params = {name: x for name, x in own.items() if name not in ("q", "k", "v")}
    results = ringattn.attention(
        own["q"],
        own["k"],
        own["v"],
        mask,
        sharding=sharding,
        schedule=schedule,
        mechanism=_sampled(params, **kinds),
        extras=("position", "log_prob", "entropy"),
    )
    found = [sharding.join(x.detach(), 2) for x in results]
    if grads:
        numbers = [x for x in results if x.is_floating_point()]
        torch.autograd.backward(numbers, [sharding.split(tensors[name], 2) for name in grads])
        for name, x in own.items():
            assert x.grad is not None
            found.append(sharding.join(x.grad, dims[name]) if name in dims else ringattn.reduce(x.grad, mesh, "sum"))
    return found


def _inputs(length: int, dtype: torch.dtype, *tables: str) -> Tensors:
    g = torch.Generator().manual_seed(4)
    sizes = {
        "q": (2, 4, length, 8),
        "k": (2, 2, length, 8),
        "v": (2, 2, length, 6),
        "alibi": (4,),
        "relative": (4, 7),
        "additive": (4, 8),
        "bias": (4, length, length),
    }
    made = {name: torch.randn(*size, generator=g, dtype=dtype) for name, size in sizes.items()}
    return {name: x for name, x in made.items() if name in ("q", "k", "v", *tables)}


def _with_grads(tensors: Tensors, length: int) -> Tensors:
    g = torch.Generator().manual_seed(5)
    sizes: dict[str, tuple[int, ...]] = {
        "dout": (2, 4, length, 6),
        "dlog_prob": (2, 4, length),
        "dentropy": (2, 4, length),
    }
    dtype = tensors["q"].dtype
    return tensors | {name: torch.randn(*size, generator=g, dtype=dtype) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("tables", "kinds"),
    [
        ((), {}),
        (("alibi", "relative", "bias"), {"softcap": 2.0}),
        (("additive",), {"softcap": 1.0, "straight_through": 0.5}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_the_same_to_the_bit(tables: tuple[str, ...], kinds: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, mask = _inputs(67, dtype, *tables), ringattn.Documents([40, 27]) & ringattn.Causal()
    kinds = {"seed": 7, **kinds}
    (one,) = ringattn.simulate(_drawn, tensors, "contiguous", "ring", mask, kinds, ring=1).results
    for ranks in (2, 4, 8):
        for layout in ("contiguous", "zigzag", "striped", "balanced"):
            for schedule in ("ring", "route"):
                run = ringattn.simulate(_drawn, tensors, layout, schedule, mask, kinds, ring=ranks)
                for x, y in zip(run.results[0][:2], one[:2], strict=True):
                    assert torch.equal(x, y), (ranks, layout, schedule)


def test_near_ties_are_decided_alike() -> None:
    """Keys that differ in their last bits alone, in a space so large that products round them together."""
    g = torch.Generator().manual_seed(0)
    tensors = _inputs(64, torch.float64)
    tensors["k"] = (
        1e3 * torch.ones_like(tensors["k"]) * (1 + 2.0**-52 * torch.randint(3, tensors["k"].shape, generator=g))
    )
    kinds = {"seed": 3, "scale": 1e6}
    (one,) = ringattn.simulate(_drawn, tensors, "contiguous", "ring", ringattn.Full(), kinds, ring=1).results
    for ranks, layout in ((2, "zigzag"), (4, "striped"), (8, "contiguous")):
        found = ringattn.simulate(_drawn, tensors, layout, "route", ringattn.Full(), kinds, ring=ranks).results[0]
        assert torch.equal(found[1], one[1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_gives_the_bits_of_the_simulator(gloo: Workers, ranks: int) -> None:
    case = Case(61, ringattn.Causal(), ranks=ranks, groups=2, mechanism=ringattn.Sampled(seed=5, straight_through=1.0))
    found, virtual = joined(case, gloo.run(ranks, attend, case)), simulated(case)
    assert all(torch.equal(found[name], virtual[name]) for name in found)
    one = simulated(dataclasses.replace(case, ranks=1))
    assert torch.equal(one["out"], found["out"])


def _repeated(draws: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, ringattn.Sharding, ringattn.Sharding]:
    """Queries that are all the same, over few keys."""
    g, mesh = torch.Generator().manual_seed(2), ringattn.init()
    q = torch.randn(1, 1, 1, 4, generator=g, dtype=torch.float64).expand(1, 1, draws, 4)
    k = torch.randn(1, 1, keys, 4, generator=g, dtype=torch.float64)
    return q, k, ringattn.Sharding(draws, mesh), ringattn.Sharding(keys, mesh)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_chi_square_of_100000_draws(seed: int) -> None:
    q, k, sharding, keys = _repeated(100_000, 12)
    v = torch.zeros_like(k)
    _, position, log_prob = ringattn.attention(
        q,
        k,
        v,
        ringattn.Full(),
        sharding=sharding,
        kv_sharding=keys,
        mechanism=ringattn.Sampled(seed=seed),
        extras=("position", "log_prob"),
    )
    p = (q[0, 0, :1] @ k[0, 0].T / 2).softmax(dim=-1)[0]
    counts = torch.bincount(position.flatten(), minlength=12)
    expected = 100_000 * p
    assert float(((counts - expected) ** 2 / expected).sum()) < 31.26  # 11 degrees of freedom, 1 in 1,000
    assert (log_prob - p.log()[position]).abs().max() < 1e-12
    # draws of neighbouring queries are independent: pairs are as often alike as chance has it
    alike = (position[..., 1:] == position[..., :-1]).double().mean()
    by_chance = (p * p).sum()
    assert (alike - by_chance).abs() < 4 * (by_chance * (1 - by_chance) / 1e5).sqrt()


def test_reinforce_estimates_the_gradient_of_the_expectation() -> None:
    q, k, sharding, keys = _repeated(40_000, 6)
    q, reward = q.clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)
    out, log_prob, entropy = ringattn.attention(
        q,
        k,
        reward[None, None, :, None],
        ringattn.Full(),
        sharding=sharding,
        kv_sharding=keys,
        mechanism=ringattn.Sampled(seed=11),
        extras=("log_prob", "entropy"),
    )
    (out[..., 0].detach() * log_prob + 0.1 * entropy).sum().backward()
    assert q.grad is not None
    each = q.grad[0, 0]
    one = q.detach()[0, 0, 0].requires_grad_()
    p = (k[0, 0] @ one / 2).softmax(dim=-1)
    (exact,) = torch.autograd.grad((p * reward).sum() - 0.1 * (p * p.log()).sum(), one)
    error = each.std(dim=0) / len(each) ** 0.5
    assert ((each.mean(dim=0) - exact).abs() < 4 * error).all() and (error < 0.05 * exact.abs().max()).all()


def _expected(tensors: Tensors, position: torch.Tensor, mask: ringattn.Mask, kinds: dict[str, Any]) -> Any:
    """Densely, in float64, by autograd, given the draws: log-probability, entropy and all gradients."""
    x = {name: t.double().requires_grad_(not name.startswith("d")) for name, t in tensors.items()}
    k, v = (x[name].repeat_interleave(2, dim=1) for name in "kv")
    length = position.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = x["q"] @ k.mT / 8**0.5
    if "additive" in x:
        scores = (torch.tanh(x["q"].unsqueeze(3) + k.unsqueeze(2)) * x["additive"][:, None, None]).sum(dim=-1)
    if "softcap" in kinds:
        scores = kinds["softcap"] * torch.tanh(scores / kinds["softcap"])
    if "alibi" in x:
        scores = scores - x["alibi"][:, None, None] * distance.abs()
        scores = scores + x["relative"][:, distance.clamp(-3, 3) + 3] + x["bias"]
    allowed = mask.dense(range(length), range(length))
    logs = torch.where(allowed, scores, -1e30).log_softmax(dim=-1)
    log_prob = logs.gather(-1, position.unsqueeze(-1)).squeeze(-1)
    entropy = -(logs.exp() * torch.where(allowed, logs, 0.0)).sum(dim=-1)
    hard = torch.nn.functional.one_hot(position, length).double()
    weights = hard
    if "straight_through" in kinds:
        b, h, i, j = (torch.arange(n) for n in (2, 4, length, length))
        u = uniform(kinds["seed"], b[:, None, None, None], h[:, None, None], i[:, None], j)
        perturbed = torch.where(allowed, scores - torch.log(-torch.log(u)), -1e30)
        soft = (perturbed / kinds["straight_through"]).softmax(dim=-1)
        assert torch.equal(perturbed.argmax(dim=-1), position)
        weights = hard + soft - soft.detach()
    found = weights @ v, log_prob, entropy
    wanted = [t for name, t in x.items() if not name.startswith("d")]
    grads = torch.autograd.grad(found, wanted, [x["dout"], x["dlog_prob"], x["dentropy"]])
    return [log_prob.detach(), entropy.detach(), *grads]


@pytest.mark.parametrize(
    ("tables", "kinds"),
    [
        ((), {"straight_through": 0.7}),
        (("alibi", "relative", "bias"), {"softcap": 2.0}),
        (("additive",), {"straight_through": 2.0, "softcap": 3.0}),
    ],
)
@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float64), (3, torch.float64), (2, torch.float32)])
def test_gradients_of_probability_entropy_and_estimate(
    ranks: int, dtype: torch.dtype, tables: tuple[str, ...], kinds: dict[str, Any]
) -> None:
    tensors, mask = _with_grads(_inputs(37, dtype, *tables), 37), ringattn.Causal()
    kinds = {"seed": 9, **kinds}
    (found, *_) = ringattn.simulate(_drawn, tensors, "zigzag", "auto", mask, kinds, ring=ranks).results
    expected = _expected(tensors, found[1], mask, kinds)
    for x, y in zip(found[2:], expected, strict=True):
        assert (x.double() - y).norm() <= (3e-6 if dtype == torch.float32 else 1e-13) * y.norm()


def test_rows_that_nothing_may_reach_and_weights() -> None:
    sharding = ringattn.Sharding(9, ringattn.init())
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    mechanism = ringattn.Sampled(seed=1, straight_through=1.0)
    mask = ~ringattn.Prefix(3) & ringattn.Causal()
    names = "position", "log_prob", "entropy"
    out, position, log_prob, entropy = ringattn.attention(
        q, k, v, mask, sharding=sharding, mechanism=mechanism, extras=names
    )
    assert (out[:, :, :3] == 0).all() and (position[:, :, :3] == 2**63 - 1).all()
    assert (log_prob[:, :, :3] == 0).all() and (entropy[:, :, :3] == 0).all() and not position.requires_grad
    (out.sum() + log_prob.sum() + entropy.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    weights = ringattn.attention_rows(q, k, mask, range(9), sharding=sharding, mechanism=mechanism)
    assert torch.allclose(weights @ v, out)


def test_without_a_seed_every_call_draws_anew() -> None:
    sharding = ringattn.Sharding(200, ringattn.init())
    q = torch.zeros(1, 1, 200, 4)

    def drawn(mechanism: ringattn.Sampled) -> torch.Tensor:
        _, position = ringattn.attention(
            q, q, q, ringattn.Full(), sharding=sharding, mechanism=mechanism, extras=("position",)
        )
        return position

    torch.manual_seed(1)
    a, b = drawn(ringattn.Sampled()), drawn(ringattn.Sampled())
    torch.manual_seed(1)
    assert torch.equal(drawn(ringattn.Sampled()), a) and not torch.equal(a, b)
    assert torch.equal(drawn(ringattn.Sampled(seed=3)), drawn(ringattn.Sampled(seed=3)))


def test_noise_is_independent_of_dropout() -> None:
    j = torch.arange(100_000)
    u, keep = uniform(5, j), kept(5, 0.5, j).double()
    assert ((u > 0) & (u < 1)).all() and (u.mean() - 0.5).abs() < 4 / (12 * 1e5) ** 0.5
    assert torch.corrcoef(torch.stack((u, keep)))[0, 1].abs() < 4 / 1e5**0.5


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"seed": 2**63}, {"seed": 1.5}, {"straight_through": 0}, {"straight_through": "soft"}]
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Sampled's"):
        ringattn.Sampled(**wrong)
