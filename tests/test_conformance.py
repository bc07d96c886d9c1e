"""Every schedule, layout, mask and shape against the float64 oracle, forward and all gradients, on virtual ranks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ringattn
from ringattn import reference
from ringattn.layouts import Layout
from ringattn.schedules.base import Schedule
from tests.conformance import (
    LAYOUTS,
    SCHEDULES,
    Case,
    cases,
    errors,
    lengths_of_documents,
    oracle,
    simulated,
    single_device,
)

many = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6}


@many
@given(case=cases())
def test_exact(case: Case) -> None:
    found = errors(simulated(case), oracle(case))
    assert max(found.values()) <= LIMIT[case.dtype], found


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("schedule", ["ring", "route"])
def test_64_ranks(schedule: str, kernel: str) -> None:
    case = Case(length=1000, mask=ringattn.Causal(), ranks=64, groups=2, schedule=schedule, kernel=kernel)
    assert max(errors(simulated(case), oracle(case)).values()) <= 3e-6


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_low_precision_is_at_most_twice_as_far_off_as_one_device(data: st.DataObject, dtype: torch.dtype) -> None:
    length = data.draw(st.integers(1, 257))
    case = Case(
        length=length,
        mask=ringattn.Documents(data.draw(lengths_of_documents(length))) & ringattn.Causal(),
        ranks=data.draw(st.integers(1, 9)),
        kv_heads=2,
        groups=2,
        dim=16,
        value_dim=16,
        layout=data.draw(st.sampled_from(("contiguous", "zigzag", "striped"))),
        schedule=data.draw(st.sampled_from(("ring", "route"))),
        dtype=dtype,
        seed=data.draw(st.integers(0, 2**16)),
    )
    expected = oracle(case)
    ours = errors(simulated(case), expected)
    theirs = {**simulated(dataclasses.replace(case, ranks=1)), **single_device(case)}
    one_device = errors(theirs, expected)
    # Where PyTorch happens to be exact, as on one-key rows, rounding the result is still allowed: half a unit.
    rounding = torch.finfo(dtype).eps / 2
    for name in ("out", "dq", "dk", "dv"):
        assert ours[name] <= 2 * max(one_device[name], rounding), (name, ours, one_device)


@settings(max_examples=40, deadline=None)
@given(case=cases((torch.float32,)))
def test_the_same_call_gives_the_same_bits(case: Case) -> None:
    first, second = simulated(case), simulated(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_relative_norms_where_nothing_cancels() -> None:
    case = Case(length=200, mask=ringattn.Full(), ranks=4, groups=2, dim=16, value_dim=16)
    found, expected = simulated(case), oracle(case)
    for name in ("dq", "dk", "dv"):
        exact = getattr(expected.gradients, name)
        assert reference.error(found[name].double().numpy(), exact, exact) <= 2e-6


@pytest.mark.parametrize("wire", ["float32", "input"])
def test_the_gradients_wire_dtype_costs_what_it_says(wire: str) -> None:
    schedule = ringattn.Route(gradient_wire=wire)  # type: ignore[arg-type]
    case = Case(length=150, mask=ringattn.Causal(), ranks=4, dtype=torch.bfloat16, schedule=schedule)
    found, expected = errors(simulated(case), oracle(case)), oracle(case)
    once = errors(simulated(dataclasses.replace(case, ranks=1)), expected)
    extra = 0 if wire == "float32" else 2**-9
    assert max(found["dk"] - 2 * once["dk"], found["dv"] - 2 * once["dv"]) <= extra


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    length=st.integers(0, 60),
    kv_length=st.integers(0, 60),
    ranks=st.integers(1, 5),
    schedule=st.sampled_from(SCHEDULES),
    layout=st.sampled_from(LAYOUTS),
    kv_layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from((None, 0.3, 0.0, -0.7)),
)
def test_cross_attention_between_two_shardings(
    data: st.DataObject,
    length: int,
    kv_length: int,
    ranks: int,
    schedule: Schedule,
    layout: Layout,
    kv_layout: Layout,
    scale: float | None,
) -> None:
    """Two sequences of other lengths and layouts; strides need not be equal."""
    mask = data.draw(masks_of_two(length, kv_length))
    g = torch.Generator().manual_seed(length)
    shapes = ((4, length, 8), (2, kv_length, 8), (2, kv_length, 8), (4, length, 8))
    q, k, v, dout = (torch.randn(1, *shape, generator=g, dtype=torch.float64) for shape in shapes)

    def fn(mesh: ringattn.Mesh) -> list[torch.Tensor]:
        own, other = ringattn.Sharding(length, mesh, layout), ringattn.Sharding(kv_length, mesh, kv_layout)
        parts = [s.split(x, 2).clone().requires_grad_() for s, x in ((own, q), (other, k), (other, v))]
        out = ringattn.attention(
            parts[0],
            parts[1],
            parts[2],
            mask,
            sharding=own,
            kv_sharding=other,
            schedule=schedule,
            mechanism=ringattn.Softmax(scale),
        )
        (out * own.split(dout, 2)).sum().backward()
        grads = [x.grad for x in parts if x.grad is not None]
        return [s.join(x, 2) for s, x in zip((own, own, other, other), (out.detach(), *grads), strict=True)]

    found = ringattn.simulate(fn, ring=ranks).results[0]
    allowed = mask.dense(torch.arange(length), torch.arange(kv_length)).numpy()
    wanted = reference.evaluate(q, k, v, allowed, dout, scale=scale)
    exact = (wanted.out, wanted.gradients.dq, wanted.gradients.dk, wanted.gradients.dv)
    sizes = (wanted.magnitudes.out, wanted.magnitudes.dq, wanted.magnitudes.dk, wanted.magnitudes.dv)
    assert all(reference.error(*x) <= LIMIT[torch.float64] for x in zip(found, exact, sizes, strict=True))


def masks_of_two(length: int, kv_length: int) -> st.SearchStrategy[ringattn.Mask]:
    """Masks of a query and a key sequence, packed documents of both among them."""

    def packed(cuts: list[tuple[int, int]]) -> ringattn.Mask:
        lengths = [
            [b - a for a, b in itertools.pairwise([0, *sorted(cut[side] % (n + 1) for cut in cuts), n])]
            for side, n in enumerate((length, kv_length))
        ]
        return ringattn.Documents(*lengths)

    both = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=4).map(packed)
    window = st.builds(ringattn.Window, st.integers(0, 9), st.integers(0, 9))
    return st.one_of(
        both,
        window,
        st.builds(lambda a, b: a & b, both, window),
        st.builds(lambda a, n: a | ringattn.Prefix(n), window, st.integers(0, 9)),
        window.map(lambda a: ~a),
        st.sampled_from((ringattn.Causal(), ringattn.Full(), ringattn.SinkTokens(2))),
    )
