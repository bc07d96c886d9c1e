"""Linear attention by other features: against their papers, over ranks, and what is refused."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch

import ringattn
from ringattn.conformance import Case, attend, errors, joined, limits, oracle, simulated
from ringattn.errors import InputError
from tests.workers import Workers

TAYLOR = ringattn.Linear(features="taylor")
CASES = [
    Case(120, ringattn.Causal(), kv_heads=2, groups=2, value_dim=5, mechanism=TAYLOR),
    Case(61, ringattn.Full(), batch=2, mechanism=TAYLOR, schedule="scan", dtype=torch.float64),
    Case(90, ringattn.Documents([40, 1, 49]) & ringattn.Causal(), layout="striped", mechanism=TAYLOR),
    Case(40, ringattn.Window(5), mechanism=TAYLOR, kernel="reference", dtype=torch.float64),
    Case(64, ringattn.Causal(), mechanism=TAYLOR, dtype=torch.bfloat16, layout="zigzag"),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mask}")
def test_taylor_over_virtual_ranks(case: Case, ranks: int) -> None:
    case = dataclasses.replace(case, ranks=ranks)
    answer = oracle(case)
    most = limits(case, answer)
    assert all(error <= most[name] for name, error in errors(simulated(case), answer).items())


@pytest.mark.parametrize("ranks", [2, 3])
def test_taylor_over_gloo(gloo: Workers, ranks: int) -> None:
    for case in CASES[:2]:
        case = dataclasses.replace(case, ranks=ranks)
        found, virtual = joined(case, gloo.run(ranks, attend, case)), simulated(case)
        assert all(torch.equal(found[name], virtual[name]) for name in found)


def _paper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Arxiv 2007.14902, equation 17, for every key: (sum v + q sum k v) / (N + q sum k)."""
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return (v.sum(2, keepdim=True) + q @ (k.mT @ v)) / (k.shape[2] + q @ k.sum(2)[..., None])


def test_taylor_is_its_paper() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 20, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    sharding = ringattn.Sharding(20, ringattn.init())

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ringattn.attention(q, k, v, ringattn.Full(), sharding=sharding, mechanism=TAYLOR)

    found, exact = ours(q, k, v), _paper(q, k, v)
    assert torch.allclose(found, exact, rtol=0, atol=1e-14)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, exact)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)
    few = [x[:1, :1, :5].detach().requires_grad_() for x in (q, k, v)]
    small = ringattn.Sharding(5, ringattn.init())
    assert torch.autograd.gradcheck(
        lambda q, k, v: ringattn.attention(q, k, v, ringattn.Causal(), sharding=small, mechanism=TAYLOR), few
    )


def test_a_vector_of_zeros_has_no_direction() -> None:
    q, k, v = (torch.zeros(1, 1, 4, 2, requires_grad=True) for _ in "qkv")
    values = torch.arange(8.0).reshape(1, 1, 4, 2)
    sharding = ringattn.Sharding(4, ringattn.init())
    out = ringattn.attention(q, k, v + values, ringattn.Full(), sharding=sharding, mechanism=TAYLOR)
    assert torch.equal(out, values.mean(2, keepdim=True).expand_as(out))
    out.sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_given_features_are_taken_as_they_are() -> None:
    """With elu + 1 applied before, the default's results."""

    def results(mesh: ringattn.Mesh, given: bool) -> list[torch.Tensor]:
        sharding = ringattn.Sharding(70, mesh, "zigzag")
        g = torch.Generator().manual_seed(2)
        q, k, v = (
            sharding.split(torch.randn(1, h, 70, 8, generator=g, dtype=torch.float64), 2).clone().requires_grad_()
            for h in (4, 2, 2)
        )
        if given:
            fq, fk = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        else:
            fq, fk = q, k
        mechanism = ringattn.Linear(features="given" if given else "elu")
        out = ringattn.attention(fq, fk, v, ringattn.Causal(), sharding=sharding, mechanism=mechanism)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]

    given, default = (ringattn.simulate(results, given, ring=3).results for given in (True, False))
    for one, two in zip(given, default, strict=True):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(one, two, strict=True))


def test_weights_of_rows() -> None:
    sharding = ringattn.Sharding(12, ringattn.init())
    q, k = (torch.randn(1, 1, 12, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for features in ("elu", "taylor"):
        mechanism = ringattn.Linear(features)
        rows = ringattn.attention_rows(q, k, ringattn.Causal(), [0, 5, 11], sharding=sharding, mechanism=mechanism)
        whole = ringattn.attention(
            q, k, torch.eye(12)[None, None], ringattn.Causal(), sharding=sharding, mechanism=mechanism
        )
        assert torch.allclose(rows, whole[:, :, [0, 5, 11]], atol=1e-6)


def test_other_features_are_refused() -> None:
    with pytest.raises(InputError, match="features must be one of 'elu', 'taylor', 'given'; got 'relu'"):
        ringattn.Linear(features="relu")


def test_nothing_of_a_launch_is_held_when_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch makes is not in ``plan.memory()`` but once."""
    made: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def watched(name: str) -> None:
        original = getattr(ringattn.Linear, name)

        def method(*args: Any) -> Any:
            if name != "summarise_grad":  # of the same launch as what came before it
                held.append(sum(x() is not None for x in made))
            found = original(*args)
            made.extend(weakref.ref(x) for x in found if x is not None)
            return found

        monkeypatch.setattr(ringattn.Linear, name, method)

    for name in ("tile_grad", "attend_grad", "summarise_grad"):
        watched(name)
    q, k, v = (torch.randn(1, 2, 512, 4, requires_grad=True) for _ in range(3))
    sharding = ringattn.Sharding(512, ringattn.init())
    options: dict[str, Any] = {"mechanism": ringattn.Linear(), "kernel": "chunked"}
    out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, **options)
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    assert len(held) > 2 and not any(held)
