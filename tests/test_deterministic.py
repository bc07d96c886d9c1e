"""``deterministic=True``: the same bits on any ranks, and the right ones; what cannot be is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

import ringattn
from ringattn import Mesh, Sharding
from ringattn.conformance import Case, Results, attend, errors, joined, oracle, simulated
from ringattn.conformance.drawing import cross_mask, draw, layout
from ringattn.conformance.judging import limits
from ringattn.errors import AgreementError, InputError, PlanError, UnsupportedError
from ringattn.masks import Transposed
from ringattn.plans import grid
from ringattn.plans.demand import Demand
from ringattn.plans.grid import TILE, Grid
from ringattn.runtime import deterministic, gathering
from tests.conformance import RANDOMS
from tests.workers import Workers

PACKED = ringattn.Documents([100, 1, 139, 30]) & ringattn.Causal()
_CASES = (
    Case(270, ringattn.Causal(), kv_heads=2, groups=2, value_dim=12, use_lse=True),
    Case(270, PACKED, kv_heads=1, groups=3, dim=5, dtype=torch.bfloat16),
    Case(270, ringattn.Window(40), batch=2, dtype=torch.bfloat16, use_lse=True),
    Case(270, PACKED | ringattn.Prefix(20), dtype=torch.float64),
)
CASES = tuple(dataclasses.replace(case, deterministic=True) for case in _CASES)
CAUSAL = ringattn.Causal()
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")


def _bits(results: Results) -> dict[str, str]:
    """Of every result a hash of its bytes: torch.equal takes 0 and -0 for one."""
    return {
        name: hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, x in results.items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_ranks_layout_and_schedule_give_the_bits_of_one_rank(case: Case) -> None:
    whole = _bits(simulated(case))
    for ranks, where in itertools.product((2, 4, 8), LAYOUTS):
        for schedule in ("ring", "route") if where in ("contiguous", "zigzag") else ("auto",):
            parts = dataclasses.replace(case, ranks=ranks, layout=where, schedule=schedule)
            assert _bits(simulated(parts)) == whole, (ranks, where, schedule)


@given(RANDOMS)
@settings(max_examples=40)
def test_any_call_gives_the_bits_of_one_rank_and_is_right(random: Random) -> None:
    case = draw(random, served_by=("auto", "ring", "route"))
    assume(case.attends.by_rows)
    case = dataclasses.replace(
        case, deterministic=True, features=case.features - {"bias", "centres"}, layout="contiguous", ranks=1
    )
    if random.random() < 0.3:
        keys = random.randint(0, 300)
        case = dataclasses.replace(case, kv_length=keys, mask=cross_mask(random, case.length, keys))
    whole = simulated(case)
    ranks = random.choice((2, 3, 4, 7, 8))
    placed = layout(random, case.length, ranks)
    parts = dataclasses.replace(case, ranks=ranks, layout="striped" if case.kv_length is not None else placed)
    assert _bits(simulated(parts)) == _bits(whole)
    answer = oracle(case)
    found, most = errors(whole, answer), limits(dataclasses.replace(case, deterministic=False), answer)
    assert all(found[name] <= most[name] for name in found), (found, most)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gloo_gives_the_bits_of_one_rank(gloo: Workers, ranks: int) -> None:
    for case, where in itertools.product(CASES, ("contiguous", "zigzag", "striped")):
        parts = dataclasses.replace(case, ranks=ranks, layout=where)
        assert _bits(joined(parts, gloo.run(ranks, attend, parts))) == _bits(simulated(case))


def test_more_threads_give_the_same_bits() -> None:
    """Tiles are so small that their products' sums are not divided among threads."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append([_bits(simulated(case)) for case in CASES])
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


def test_the_ordinary_call_gives_other_bits() -> None:
    """Or the tests above would show nothing."""
    case = dataclasses.replace(CASES[0], deterministic=False)
    several = dataclasses.replace(case, ranks=4, layout="zigzag")
    assert _bits(simulated(several)) != _bits(simulated(case))


def test_rows_out_of_their_places_give_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two planted faults, by which results stay right: blocks that begin where a rank's rows do, and another order."""
    case = dataclasses.replace(CASES[0], use_lse=False)
    whole, parts = simulated(case), dataclasses.replace(case, ranks=3, layout="contiguous")
    in_order = grid._tiles
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_tiles", lambda *args: (tiles[::-1] for tiles in in_order(*args)))
        turned = simulated(parts)
    with monkeypatch.context() as patch:
        patch.setattr(grid, "TILE", 90)
        patch.setattr(deterministic, "TILE", 90)
        patch.setattr(gathering, "TILE", 90)
        moved = simulated(parts)
    for found in (turned, moved):
        assert _bits(found) != _bits(whole)
        assert max(errors(found, oracle(case)).values()) <= 1e-6


def test_bytes_on_the_wire_are_those_of_three_passes() -> None:
    """Keys travel twice as the call's plan says, and queries with their outputs once, by the transposed mask's."""
    case = dataclasses.replace(CASES[0], ranks=3, layout="zigzag", schedule="ring")
    heads, dims = (case.heads, case.kv_heads), (case.dim, case.value_dim)
    beside = 2 * case.value_dim + 2  # the output and its gradient, the log-sum-exp and its gradient

    def run(mesh: Mesh) -> tuple[int, int]:
        sharding = Sharding(case.length, mesh, "zigzag")
        attend(mesh, case)
        there = ringattn.plan(case.mask, sharding, "ring", heads=heads, head_dims=dims, dtype=case.dtype)
        queries = (case.heads, case.heads), (case.dim, beside)
        back = ringattn.plan(
            Transposed(case.mask), sharding, "ring", heads=queries[0], head_dims=queries[1], dtype=case.dtype
        )
        planned = 2 * (there.traffic().sent_bytes or 0) + (back.traffic().sent_bytes or 0)
        return mesh.connected().counters.sent_bytes, planned

    for sent, planned in ringattn.simulate(run, ring=3).results:
        assert sent == planned > 0


def _called(mesh: Mesh, deterministic: object, **more: object) -> torch.Tensor:
    sharding = Sharding(20, mesh)
    q = torch.ones(1, 2, sharding.count, 4)
    options: dict[str, object] = {"mask": ringattn.Causal(), "sharding": sharding, "deterministic": deterministic}
    out: torch.Tensor = ringattn.attention(q, q, q, **{**options, **more})  # type: ignore[call-overload]
    return out


def test_ranks_of_which_some_ask_for_it_learn_it() -> None:
    def run(mesh: Mesh) -> str:
        with pytest.raises(AgreementError) as caught:
            _called(mesh, mesh.rank == 1)
        return str(caught.value)

    assert all("kernel (rank 0: auto; rank 1: auto, deterministic" in x for x in ringattn.simulate(run, ring=2).results)


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_it_is_true_or_false(wrong: object) -> None:
    with pytest.raises(InputError, match="deterministic must be True or False"):
        _called(Mesh.local(), wrong)


def test_what_cannot_be_is_refused_by_name() -> None:
    sinks = torch.zeros(2, requires_grad=True)
    bias = ringattn.Softmax(bias=torch.zeros(2, 20, 20))

    class Other(ringattn.Hard):
        by_rows = False

    refused: dict[str, dict[str, object]] = {
        "scan exchanges sums over keys": {"mechanism": ringattn.Linear(), "schedule": "scan"},
        "part of sinks": {"mechanism": ringattn.Softmax(sinks=sinks)},
        "part of bias": {"mechanism": bias},
        "got kernel=sdpa": {"kernel": "sdpa"},
        "Other does not promise it": {"mechanism": Other()},
    }
    for named, more in refused.items():
        with pytest.raises(UnsupportedError, match=named):
            _called(Mesh.local(), True, **more)
    _called(
        Mesh.local(), True, mechanism=ringattn.Softmax(sinks=sinks.detach(), alibi=torch.ones(2)), kernel="reference"
    )


def test_explain_says_what_lies_here_at_once() -> None:
    sharding = Sharding(600, Mesh.virtual(ring=2, rank=1), "contiguous")
    q = torch.zeros(1, 2, 300, 8, requires_grad=True)
    said = ringattn.explain(q, q, q, ringattn.Causal(), sharding=sharding, deterministic=True)
    # five blocks of keys, each row two heads of 8 + 8 numbers; and three of queries, beside which the output and its
    # gradient, the log-sum-exp and its gradient travel
    assert f"300 keys come to the queries and lie there at once in {5 * TILE * 2 * 16 * 4} bytes" in said
    assert f"0 queries come to the keys and lie there at once in {3 * TILE * 2 * (8 + 18) * 4} bytes" in said


def test_tiles_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ringattn.plan_all(ringattn.Causal(), 600, "zigzag", ring=2)[0]
    assert sum(map(len, Grid.of(plan).tiles)) > 3
    whole = Demand.cut
    monkeypatch.setattr(Demand, "cut", lambda *args: whole(*args)[1:])
    with pytest.raises(PlanError, match="do not hold the allowed pairs"):
        Grid.of(plan)


def test_tiles_hold_what_the_mask_allows_and_are_called_full_when_they_are() -> None:
    mask = ringattn.Window(300, 40) | ringattn.Prefix(3) | ringattn.Predicate(lambda q, k: (q + k) % 7 == 0)
    (plan,) = ringattn.plan_all(mask, 700, ring=1)
    made, dense = Grid.of(plan), np.zeros((6 * TILE, 6 * TILE), dtype=bool)
    for nth, tiles in enumerate(made.tiles):
        for tile in tiles:
            allowed = tile.allowed(mask, torch.device("cpu"))
            assert (allowed is None) == tile.full
            dense[made.own.at(nth), made.other.at(tile.other)] = True if allowed is None else allowed.numpy()
    assert np.array_equal(dense[:700, :700], mask.dense(range(700), range(700)).numpy())
    assert not dense[700:].any() and not dense[:, 700:].any()


def _step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    return ringattn.attention(q, k, v, CAUSAL, sharding=sharding, deterministic=True)


def test_compiled_code_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 200, 8, generator=g).requires_grad_() for h in (4, 2, 2))
    sharding, found = Sharding(200, Mesh.local()), []
    for fn in (_step, torch.compile(_step, fullgraph=True, backend="aot_eager")):
        out = fn(q, k, v, sharding)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    torch._dynamo.reset()
