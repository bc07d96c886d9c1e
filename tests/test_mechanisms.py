"""Laws of every mechanism: the state is a monoid, blocks merge to the whole, unreachable rows stay empty."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.mechanisms.base import Mechanism, Problem, State
from ringattn.mechanisms.softmax import Softmax

MECHANISMS: tuple[Mechanism, ...] = (Softmax(), Softmax(scale=0.3))


def _problem(mechanism: Mechanism) -> Problem:
    return Problem(mechanism, 2, 4, 2, 8, 6, torch.float64, torch.device("cpu"))


def _block(problem: Problem, seed: int, masked: bool) -> State:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, v = (torch.randn(2, 2, 7, d, generator=g, dtype=torch.float64) for d in (8, 6))
    allowed = torch.rand(5, 7, generator=g) < 0.3 if masked else None
    if allowed is not None:
        allowed[2] = False  # a row that no key of this block may reach
    return problem.mechanism.tile(problem, q, k, v, allowed)


def _merged(problem: Problem, *parts: State) -> State:
    out = tuple(x.clone() for x in parts[0])
    for part in parts[1:]:
        problem.mechanism.merge(out, part)
    return out


def _close(a: State, b: State) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-14, equal_nan=False) for x, y in zip(a, b, strict=True))


@given(mechanism=st.sampled_from(MECHANISMS), seeds=st.tuples(*[st.integers(0, 99)] * 3), masked=st.booleans())
def test_merging_is_a_monoid(mechanism: Mechanism, seeds: tuple[int, int, int], masked: bool) -> None:
    problem = _problem(mechanism)
    a, b, c = (_block(problem, seed, masked) for seed in seeds)
    assert _close(_merged(problem, _merged(problem, a, b), c), _merged(problem, a, _merged(problem, b, c)))
    empty = mechanism.empty(problem, 5)
    assert _close(_merged(problem, empty, a), a)
    assert _close(_merged(problem, a, empty), a)
    assert _close(_merged(problem, empty, empty), empty)


@given(mechanism=st.sampled_from(MECHANISMS), cut=st.integers(1, 6))
def test_blocks_merge_to_the_whole(mechanism: Mechanism, cut: int) -> None:
    problem = _problem(mechanism)
    g = torch.Generator().manual_seed(cut)
    q, k, v = (
        torch.randn(2, h, n, d, generator=g, dtype=torch.float64) for h, n, d in ((4, 5, 8), (2, 7, 8), (2, 7, 6))
    )
    allowed = torch.rand(5, 7, generator=g) < 0.5
    whole = mechanism.tile(problem, q, k, v, allowed)
    parts = [mechanism.tile(problem, q, k[:, :, s], v[:, :, s], allowed[:, s]) for s in (slice(cut), slice(cut, None))]
    assert _close(_merged(problem, *parts), whole)


def test_softmax_of_large_scores_does_not_overflow() -> None:
    problem = _problem(Softmax(scale=1e4))
    state = _merged(problem, *(_block(problem, seed, masked=False) for seed in range(4)))
    assert all(x.isfinite().all() for x in state)


def test_unreachable_rows_are_zero_with_lse_minus_infinity() -> None:
    problem = _problem(Softmax())
    out, lse = _merged(problem, problem.mechanism.empty(problem, 5), _block(problem, 3, masked=True))
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -torch.inf).all()
