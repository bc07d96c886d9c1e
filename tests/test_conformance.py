"""Every schedule, layout, mask and shape against the float64 oracle, forward and all gradients, on virtual ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ringattn
from ringattn import reference
from ringattn.conformance import Case, errors, oracle, simulated
from tests.conformance import cases, cross_cases, lengths_of_documents, single_device

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6}


@many
@given(case=cases())
def test_exact(case: Case) -> None:
    found = errors(simulated(case), oracle(case))
    assert max(found.values()) <= LIMIT[case.dtype], found


@pytest.mark.parametrize(("schedule", "kernel"), [("ring", "onednn"), ("route", "sdpa"), ("route", "reference")])
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


@settings(max_examples=90, deadline=None)
@given(case=cross_cases())
def test_cross_attention_between_two_shardings(case: Case) -> None:
    found = errors(simulated(case), oracle(case))
    assert max(found.values()) <= LIMIT[case.dtype], found
