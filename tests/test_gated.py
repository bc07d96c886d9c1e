"""Gated linear attention: against its recurrence, token by token, over ranks; decays of every size; what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn import reference
from ringattn.conformance import Case, attend, errors, joined, limits, oracle, simulated
from ringattn.errors import InputError, UnsupportedError
from tests.workers import Workers

PACKED = ringattn.Documents([40, 1, 49]) & ringattn.Causal()
CASES = [
    Case(120, ringattn.Causal(), kv_heads=2, groups=2, value_dim=5, mechanism="gated"),
    Case(90, PACKED, layout="contiguous", mechanism="gated", dtype=torch.float64),
    Case(75, ringattn.Window(5), mechanism="gated", layout="zigzag", scale=0.3),
    Case(64, ringattn.Causal(), mechanism="gated", layout="striped", schedule="ring"),
    Case(61, ringattn.Causal(), mechanism="gated", layout="balanced", batch=2, kernel="reference"),
    Case(64, ringattn.Causal(), mechanism="gated", layout="zigzag", dtype=torch.bfloat16),
    Case(3, ringattn.Causal(), mechanism="gated"),
]


def _right(case: Case, found: dict[str, torch.Tensor]) -> None:
    answer = oracle(case)
    most = limits(case, answer)
    assert all(error <= most[name] for name, error in errors(found, answer).items())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mask} {case.layout}")
def test_over_virtual_ranks(case: Case, ranks: int) -> None:
    case = dataclasses.replace(case, ranks=ranks)
    _right(case, simulated(case))


@pytest.mark.parametrize("ranks", [2, 3])
def test_over_gloo(gloo: Workers, ranks: int) -> None:
    for case in CASES[:4]:
        case = dataclasses.replace(case, ranks=ranks)
        found, virtual = joined(case, gloo.run(ranks, attend, case)), simulated(case)
        assert all(torch.equal(found[name], virtual[name]) for name in found)
        _right(case, found)


def _recurrence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """Token by token, as the papers define it."""
    groups, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    state, outs = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        state = torch.exp(log_decay[:, :, t, None, None]) * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(scale * (q[:, :, t, None] @ state.repeat_interleave(groups, dim=1))[:, :, 0])
    return torch.stack(outs, dim=2)


def _inputs(length: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(length)
    q, k, v, log_decay = (
        torch.randn(2, *s, generator=g).double() for s in ((4, length, 3), (2, length, 3), (2, length, 5), (2, length))
    )
    return [x.requires_grad_() for x in (q, k, v, -log_decay.exp())]


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_recurrence(ranks: int) -> None:
    def ours(mesh: ringattn.Mesh) -> list[torch.Tensor]:
        sharding = ringattn.Sharding(29, mesh, "zigzag")
        q, k, v, log_decay = (sharding.split(x.detach(), 2).clone().requires_grad_() for x in _inputs(29))
        mechanism = ringattn.Gated(log_decay)
        out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, mechanism=mechanism)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, log_decay))
        return [sharding.positions, out.detach(), *grads]

    inputs = _inputs(29)
    out = _recurrence(*inputs)
    expected = [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]
    for positions, *found in ringattn.simulate(ours, ring=ranks).results:
        for part, whole in zip(found, expected, strict=True):
            assert torch.allclose(part, whole[:, :, positions], rtol=0, atol=1e-13 * float(whole.abs().max()))


def test_the_reference_is_the_recurrence() -> None:
    inputs = _inputs(17)
    out = _recurrence(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = [x.numpy() for x in (out.detach(), *torch.autograd.grad(out, inputs, dout))]
    plain = [x.detach().numpy() for x in inputs]
    allowed = torch.ones(17, 17, dtype=torch.bool).tril().numpy()
    found = reference.gated(plain[0], plain[1], plain[2], allowed, dout.numpy(), log_decay=plain[3])
    grads, sizes = found.gradients, found.magnitudes
    pairs = [(found.out, sizes.out), (grads.dq, sizes.dq), (grads.dk, sizes.dk), (grads.dv, sizes.dv)]
    pairs.append((grads.params["log_decay"], sizes.params["log_decay"]))
    assert all(reference.error(x, y, size) < 1e-15 for (x, size), y in zip(pairs, expected, strict=True))


def test_gradcheck() -> None:
    sharding = ringattn.Sharding(6, ringattn.init())
    assert torch.autograd.gradcheck(
        lambda q, k, v, g: ringattn.attention(
            q, k, v, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Gated(g)
        ),
        _inputs(6),
    )


@given(kinds=st.lists(st.sampled_from([1.0, 0.999, 0.5, 1e-3, 1e-30, 1e-300, 0.0]), min_size=1, max_size=40))
def test_decays_of_every_size(kinds: list[float]) -> None:
    log_decay = torch.tensor(kinds, dtype=torch.float64).log()
    whole_q, k, v, _ = (x.detach() for x in _inputs(len(kinds)))

    def ours(mesh: ringattn.Mesh, dtype: torch.dtype) -> list[torch.Tensor]:
        sharding = ringattn.Sharding(len(kinds), mesh, "zigzag")
        q, k, v, _ = (sharding.split(x.detach(), 2).to(dtype).clone().requires_grad_() for x in _inputs(len(kinds)))
        g = sharding.split(log_decay.expand(2, 2, -1), 2).clone().requires_grad_()
        mask = ringattn.Causal()
        out = ringattn.attention(q, k, v, mask, sharding=sharding, mechanism=ringattn.Gated(g))
        return [sharding.positions, out.detach(), *torch.autograd.grad(out.sum(), (q, k, v, g))]

    expected = _recurrence(whole_q, k, v, log_decay.expand(2, 2, -1))
    size = float(k.abs().max() * v.abs().max() * len(kinds))
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        for positions, *found in ringattn.simulate(ours, dtype, ring=2).results:
            assert all(bool(x.isfinite().all()) for x in found)
            assert bool(((found[0] - expected[:, :, positions]).abs() <= limit * size).all())


def test_long_sequences_of_strong_decays_keep_their_digits() -> None:
    """A sums to -8,000,000 here, of which float32 alone would keep halves."""
    length, g = 4000, torch.Generator().manual_seed(3)
    decays = torch.where(torch.rand(length, generator=g) < 0.5, -4000 * torch.rand(length, generator=g), -0.01)
    sharding = ringattn.Sharding(length, ringattn.init())
    q, k, v = (torch.randn(1, 1, length, 4, generator=g) for _ in "qkv")
    gates = decays.clamp(min=-800).reshape(1, 1, -1)
    mechanism = ringattn.Gated(gates)
    out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, mechanism=mechanism)
    exact = _recurrence(q.double(), k.double(), v.double(), gates.double())
    assert (out - exact).norm() < 2e-7 * exact.norm()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("decays", [(0.9, 1.0), (1e-2, 1e-1), (1e-6, 1e-4)])
def test_the_gradient_of_decays_keeps_its_digits(decays: tuple[float, float], ranks: int) -> None:
    """Relative to itself, in float32: it is as small as the decays, where what each token gives itself is not."""
    g = torch.Generator().manual_seed(7)
    q, k, v, dout = (torch.randn(1, 2, 300, 16, generator=g) for _ in "qkvd")
    logs = torch.empty(1, 2, 300).uniform_(*decays, generator=g).log()

    def gradient(mesh: ringattn.Mesh, dtype: torch.dtype) -> torch.Tensor:
        sharding = ringattn.Sharding(300, mesh, "zigzag")
        parts = [sharding.split(x, 2).to(dtype) for x in (q, k, v)]
        own = sharding.split(logs, 2).to(dtype).clone().requires_grad_()
        mechanism = ringattn.Gated(own)
        out = ringattn.attention(*parts, ringattn.Causal(), sharding=sharding, mechanism=mechanism)  # type: ignore[call-overload]
        (grad,) = torch.autograd.grad((out * sharding.split(dout, 2)).sum(), own)
        return sharding.join(grad, 2)

    found, exact = (
        ringattn.simulate(gradient, dtype, ring=ranks).results[0].double() for dtype in (torch.float32, torch.float64)
    )
    assert (found - exact).norm() < 5e-6 * exact.norm()


SHAPE: dict[str, Any] = {"heads": (4, 2), "head_dims": (64, 64), "dtype": "bfloat16"}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_bytes_do_not_depend_on_the_length(layout: str) -> None:
    mechanism = ringattn.Gated(torch.zeros(1, 2, 0))

    def moved(length: int) -> list[tuple[int | None, ...]]:
        plans = ringattn.plan_all(ringattn.Causal(), length, layout, ring=4, mechanism=mechanism, **SHAPE)
        ringattn.verify(plans)
        return [dataclasses.astuple(plan.traffic()) for plan in plans]

    assert moved(8_192) == moved(65_536)
    plan = ringattn.plan_all(ringattn.Causal(), 64, "contiguous", ring=2, mechanism=mechanism, **SHAPE)[1]
    assert plan.traffic().received_bytes == 2 * (64 * 64 + 2) * 4


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_plans_know_what_keys_carry(dtype: str) -> None:
    """The cumulative sum and the position beside each key, in float32 at least."""
    mechanism = ringattn.Gated(torch.zeros(1, 1, 0))
    shape: dict[str, Any] = {"heads": (1, 1), "head_dims": (8, 6), "dtype": dtype}
    plan = ringattn.plan_all(ringattn.Causal(), 8, "contiguous", "ring", ring=2, mechanism=mechanism, **shape)[1]
    assert plan.traffic().received_bytes == 4 * (8 + 3 + 6) * (8 if dtype == "float64" else 4)


def test_bytes_counted_do_not_depend_on_the_length() -> None:
    def moved(length: int) -> list[int]:
        case = Case(length, ringattn.Causal(), ranks=3, mechanism="gated")
        return [x.received_bytes for x in ringattn.simulate(attend, case, ring=3).traffic]

    assert moved(512) == moved(4096)


def test_conformance() -> None:
    """Bytes, of the cumulative sum too, and tokens that may not reach others, besides the numbers."""
    for mask in (ringattn.Causal(), PACKED):
        report = ringattn.conformance.check(mechanism="gated", mask=mask, count=6)
        assert report.passed and report.computed, report


def test_it_compiles_to_one_graph() -> None:
    sharding, mask = ringattn.Sharding(24, ringattn.init()), ringattn.Causal()

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return ringattn.attention(q, k, v, mask, sharding=sharding, mechanism=ringattn.Gated(g - 1, scale=0.5))

    inputs = _inputs(24)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float64, torch.bfloat16):
        cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
        outs = [f(*cast) for f in (compiled, fn)]
        assert torch.equal(*outs) and outs[0].dtype == dtype
        grads = [torch.autograd.grad(out.sum(), cast) for out in outs]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rows_of_its_matrix() -> None:
    def rows(mesh: ringattn.Mesh) -> tuple[torch.Tensor, torch.Tensor]:
        sharding = ringattn.Sharding(24, mesh, "zigzag")
        q, k, _, g = (sharding.split(x.detach(), 2) for x in _inputs(24))
        call: dict[str, Any] = {"sharding": sharding, "mechanism": ringattn.Gated(g)}
        found = ringattn.attention_rows(q, k, ringattn.Causal(), [23, 4], **call)
        one = sharding.split(torch.eye(24).double().expand(2, 2, 24, 24), 2)
        whole = sharding.join(ringattn.attention(q, k, one, ringattn.Causal(), **call), 2)
        return sharding.join(found, 3), whole[:, :, [23, 4]]

    for found, expected in ringattn.simulate(rows, ring=3).results:
        assert torch.allclose(found, expected, rtol=0, atol=1e-15)


def test_refusals() -> None:
    sharding = ringattn.Sharding(5, ringattn.init())
    q, k, v, g = _inputs(5)
    call: dict[str, Any] = {"sharding": sharding, "mechanism": ringattn.Gated(g)}
    odd = ringattn.Predicate(lambda q, k: (q + k) % 3 == 0)
    for mask in (ringattn.Full(), ringattn.Window(2, 1), ringattn.Prefix(3), odd, odd & ~ringattn.Causal()):
        with pytest.raises(UnsupportedError, match=r"knows no key that comes after its query, but .* allows some"):
            ringattn.attention(q, k, v, mask, **call)
        with pytest.raises(UnsupportedError, match="Take a causal mask"):
            ringattn.plan_all(mask, 9, mechanism=ringattn.Gated())
    other = ringattn.Sharding(5, ringattn.init(), "striped")
    with pytest.raises(UnsupportedError, match="attends within one sequence; leave kv_sharding out"):
        ringattn.attention(q, k, v, ringattn.Causal(), kv_sharding=other, **call)
    with pytest.raises(InputError, match="log_decay needs queries and keys of one sharding; got 4 and 5"):
        ringattn.attention(q[:, :, 1:], k, v, ringattn.Causal(), **call)
    with pytest.raises(InputError, match=r"log_decay must have shape \[2, 2, 5\].*got \[2, 4\]"):
        ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Gated(g[:, 0, 1:]))
    with pytest.raises(InputError, match="log_decay must be a tensor of floating point numbers"):
        ringattn.Gated(torch.ones(2, 2, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="or what carries its cumulative sum already; got both"):
        ringattn.Gated(g, carried=True)
    with pytest.raises(InputError, match="carried must be True or False"):
        ringattn.Gated(carried="yes")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"known to ringattn\.attention and attention_rows alone"):
        ringattn.pool(q[:, :, :2], k, v, sharding=sharding, mechanism=ringattn.Gated(g))
    assert "scan" in ringattn.explain(q, k, v, ringattn.Causal(), **call)
    assert math.isfinite(float(ringattn.attention(q, k, v, ringattn.Causal(), **call).detach().sum()))
