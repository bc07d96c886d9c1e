"""Laws of every mechanism: the state is a monoid, blocks merge to the whole, unreachable rows stay empty."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import ringattn
from ringattn.mechanisms.base import Mechanism, OutputGrad, Problem, State, Summarising
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.softmax import Softmax
from ringattn.mechanisms.total import Total

_G = torch.Generator().manual_seed(0)
MECHANISMS: tuple[Mechanism, ...] = (
    Softmax(),
    Softmax(scale=0.3),
    Softmax(
        softcap=2.0,
        alibi=torch.rand(4, generator=_G),
        relative=torch.randn(4, 5, generator=_G),
        bias=torch.randn(4, 5, 7, generator=_G),
        dropout=0.4,
    ),
    ringattn.Hard(),
    ringattn.Hard(top=3),
    ringattn.Hard(top=9),
    ringattn.Sampled(straight_through=0.7),
    ringattn.Sampled(softcap=2.0, bias=torch.randn(4, 5, 7, generator=_G)),
    ringattn.Entmax(),
    ringattn.Entmax(torch.tensor([1.1, 1.4, 1.9, 2.0])),
    ringattn.Linear(),
    ringattn.Linear("taylor"),
    ringattn.Linear("given"),
    ringattn.Gated(),
    ringattn.Gated(carried=True),
    Total(),
)


def _problem(mechanism: Mechanism) -> Problem:
    """A problem of this mechanism; what passes before it would know is that of one block."""
    device, params = torch.device("cpu"), mechanism.params
    problem = Problem(mechanism.without_tensors, 2, 4, 2, 8, 6, torch.float64, device, params, 3)
    before = problem.mechanism.preparation
    if before is None:
        return problem
    over_keys = problem.over_keys(before)
    return dataclasses.replace(problem, known=before.finish(over_keys, _block(over_keys, 5, masked=False))[1])


def _block(problem: Problem, seed: int, masked: bool) -> State:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, v = (torch.randn(2, 2, 7, d, generator=g, dtype=torch.float64) for d in (8, 6))
    allowed = torch.rand(5, 7, generator=g) < 0.3 if masked else None
    if allowed is not None:
        allowed[2] = False  # a row that no key of this block may reach
    return problem.mechanism.tile(problem, _at(slice(0, 7, 1), allowed), q, k, v)


def _at(keys: slice, allowed: torch.Tensor | None) -> Block:
    return Block(slice(0, 5, 1), slice(0, 5, 1), keys, allowed)


def _merged(problem: Problem, *parts: State) -> State:
    out = tuple(x.clone() for x in parts[0])
    for part in parts[1:]:
        problem.mechanism.merge(out, part)
    return out


def _close(a: State, b: State) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-14, equal_nan=False) for x, y in zip(a, b, strict=True))


@given(mechanism=st.sampled_from(MECHANISMS), seed=st.integers(0, 99), cut=st.integers(1, 6))
def test_summaries_stand_for_their_keys(mechanism: Mechanism, seed: int, cut: int) -> None:
    """Attending to the fold of summaries, and its gradients, are those of the keys."""
    assume(isinstance(mechanism, Summarising))
    assert isinstance(mechanism, Summarising)
    problem = _problem(mechanism)
    g = torch.Generator().manual_seed(seed)
    q, k, v, out, dout = (
        torch.randn(2, h, n, d, generator=g, dtype=torch.float64)
        for h, n, d in ((4, 5, 8), (2, 7, 8), (2, 7, 6), (4, 5, 6), (4, 5, 6))
    )
    if mechanism == ringattn.Gated(carried=True):  # keys whose cumulative sums of logarithms of decays fall
        k[..., -3:-1] = k[..., -3:-1].sort(dim=2, descending=True).values
    saved = out, 1 + torch.rand(2, 4, 5, generator=g, dtype=torch.float64)
    block, output_grad = _at(slice(0, 7, 1), None), OutputGrad(saved, dout, (None,))
    cuts = slice(cut), slice(cut, None)
    parts = [mechanism.summarise(problem, k[:, :, s], v[:, :, s]) for s in cuts]
    summaries = torch.stack(parts)
    folded = mechanism.fold(problem, summaries)
    assert _close((folded,), (mechanism.summarise(problem, k, v),))
    assert _close(mechanism.attend(problem, q, folded), mechanism.tile(problem, block, q, k, v))
    dq, dfolded = mechanism.attend_grad(problem, q, folded, output_grad)
    assert dfolded is not None
    dparts = mechanism.fold_grad(problem, summaries, dfolded).expand_as(summaries)
    back = [mechanism.summarise_grad(problem, k[:, :, s], v[:, :, s], d) for s, d in zip(cuts, dparts, strict=True)]
    dk, dv = ([x for x in of if x is not None] for of in zip(*back, strict=True))
    found = *([] if dq is None else [dq]), *(torch.cat(of, dim=2) for of in (dk, dv) if of)
    expected = mechanism.tile_grad(problem, block, q, k, v, output_grad, {})
    assert _close(found, tuple(x for x in expected if x is not None))


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
    whole = mechanism.tile(problem, _at(slice(0, 7, 1), allowed), q, k, v)
    parts = [
        mechanism.tile(problem, _at(s, allowed[:, s]), q, k[:, :, s], v[:, :, s])
        for s in (slice(0, cut, 1), slice(cut, 7, 1))
    ]
    assert _close(_merged(problem, *parts), whole)


def test_softmax_of_large_scores_does_not_overflow() -> None:
    problem = _problem(Softmax(scale=1e4))
    state = _merged(problem, *(_block(problem, seed, masked=False) for seed in range(4)))
    assert all(x.isfinite().all() for x in state)


def test_unreachable_rows_are_zero_with_lse_minus_infinity() -> None:
    problem = _problem(Softmax())
    out, lse = _merged(problem, problem.mechanism.empty(problem, 5), _block(problem, 3, masked=True))
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -torch.inf).all()
