"""Scores, sinks, dropout and hard choices: what must hold besides being exact, which conformance shows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn import reference
from ringattn.conformance import FEATURES, Case, attend, errors, joined, oracle, simulated
from ringattn.errors import AgreementError, InputError, UnsupportedError
from ringattn.mechanisms.dropout import kept
from tests.workers import Workers

EVERY = frozenset(FEATURES)


def test_dropout_is_the_oracles_hash() -> None:
    b, h, i, j = (torch.arange(n) for n in (2, 3, 40, 50))
    found = kept(2**62 - 7, 0.3, b[:, None, None, None], h[:, None, None], i[:, None], j)
    assert torch.equal(found, torch.from_numpy(reference.kept(2**62 - 7, 0.3, 2, 3, range(40), range(50))))


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("schedule", ["ring", "route"])
def test_dropout_is_the_same_on_any_ranks_and_schedule(ranks: int, layout: str, schedule: str) -> None:
    one = Case(60, ringattn.Causal(), groups=2, features=frozenset({"dropout"}), dtype=torch.float64, seed=5)
    whole = simulated(one)
    parts = simulated(dataclasses.replace(one, ranks=ranks, layout=layout, schedule=schedule))
    assert all(torch.allclose(parts[name], whole[name], rtol=1e-12, atol=1e-13) for name in whole)


def _dropped(mesh: ringattn.Mesh, seed: int | None) -> torch.Tensor:
    sharding = ringattn.Sharding(24, mesh)
    q, k, v = (torch.ones(1, 2, sharding.count, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mechanism = ringattn.Softmax(dropout=0.5, seed=seed)

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return ringattn.attention(x[0], x[1], x[2], ringattn.Causal(), sharding=sharding, mechanism=mechanism)

    out = checkpoint(attend, q, k, v, use_reentrant=False)
    out.sum().backward()
    assert v.grad is not None
    # P and V are constant, so that the gradient of V shows the same draw as the output
    return torch.stack([sharding.join(out.detach(), 2).sum(), sharding.join(v.grad, 2).sum()])


def test_seeds_come_from_the_default_generator_or_the_user() -> None:
    def twice(mesh: ringattn.Mesh, seed: int | None) -> list[torch.Tensor]:
        return [_dropped(mesh, seed), _dropped(mesh, seed)]

    def two(ranks: int, seed: int | None) -> list[torch.Tensor]:
        torch.manual_seed(3)
        results: list[list[torch.Tensor]] = ringattn.simulate(twice, seed, ring=ranks).results
        return results[0]

    for ranks in (1, 3):
        first, second = two(ranks, None)
        assert not torch.equal(first, second), "every call draws anew"
        assert torch.allclose(first, two(1, None)[0]) and torch.allclose(second, two(1, None)[1])
        assert torch.isclose(first[0], first[1]), "the backward pass, and recomputation, draw what forward drew"
        assert torch.equal(*two(ranks, 9))


def _apart(mesh: ringattn.Mesh) -> str:
    torch.manual_seed(mesh.rank)
    try:
        _dropped(mesh, None)
    except AgreementError as error:
        return str(error)
    return "no error"


def test_ranks_with_other_seeds_learn_it(gloo: Workers) -> None:
    for run in (gloo.run(3, _apart), ringattn.simulate(_apart, ring=3).results):
        assert all("they differ in seed (rank 0: " in said for said in run), run


def test_virtual_ranks_have_random_states_of_their_own() -> None:
    def draw(mesh: ringattn.Mesh) -> torch.Tensor:
        first = torch.rand(2)
        sharding = ringattn.Sharding(mesh.size, mesh)
        sharding.join(torch.zeros(1), 0)  # the others run in between
        return torch.cat([first, torch.rand(2)])

    torch.manual_seed(1)
    results = ringattn.simulate(draw, ring=3).results
    after = torch.rand(1)
    torch.manual_seed(1)
    expected = torch.cat([torch.rand(2), torch.rand(2)])
    assert torch.equal(after, torch.rand(1)), "the caller draws on as after one rank"
    assert all(torch.equal(x, expected) for x in results), "every rank draws on from the caller's state, undisturbed"


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("schedule", ["ring", "route"])
def test_features_and_mechanisms_on_gloo(gloo: Workers, ranks: int, schedule: str) -> None:
    packed = ringattn.Documents([40, 1, 49]) & ringattn.Causal()
    window = ringattn.Window(9, 9)
    for case in (
        Case(90, packed, kv_heads=2, groups=3, features=EVERY, use_lse=True, layout="balanced"),
        Case(90, packed | ringattn.Prefix(5), kv_heads=1, groups=4, features=EVERY - {"dropout"}, layout="striped"),
        Case(70, window, kv_length=50, features=frozenset({"bias"})),
        Case(90, packed, mechanism="hard", layout="zigzag"),
        Case(90, packed, mechanism="linear", layout="striped", value_dim=5),
    ):
        case = dataclasses.replace(case, ranks=ranks, schedule=schedule)
        found, virtual = joined(case, gloo.run(ranks, attend, case)), simulated(case)
        assert all(torch.equal(found[name], virtual[name]) for name in found)
        assert max(errors(found, oracle(case)).values()) <= 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_hard_ties_go_to_the_first_key_on_any_ranks(layout: str) -> None:
    """Keys that are equal score equally to the bit, however the sequence is cut."""
    g = torch.Generator().manual_seed(0)
    q, few, v = (torch.randn(1, 2, n, 24, generator=g, dtype=torch.float64) for n in (61, 4, 61))
    k = few[:, :, torch.randint(4, (61,), generator=g)]

    def fn(mesh: ringattn.Mesh) -> torch.Tensor:
        sharding = ringattn.Sharding(61, mesh, layout)
        a, b, c = (sharding.split(x, 2) for x in (q, k, v))
        out = ringattn.attention(a, b, c, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Hard())
        return sharding.join(out, 2)

    exact = reference.hard(q, k, v, ringattn.Causal().dense(range(61), range(61)).numpy()).out
    for ranks in (1, 4, 7):
        assert torch.equal(ringattn.simulate(fn, ring=ranks).results[0], torch.from_numpy(exact))


def test_large_tables_are_read_in_bounded_parts() -> None:
    """A bias is never expanded over the batch, nor joined from other ranks."""
    case = Case(300, ringattn.Causal(), ranks=3, batch=2, groups=2, features=frozenset({"bias"}))
    moved = ringattn.simulate(attend, case, ring=3).traffic
    plain = ringattn.simulate(attend, dataclasses.replace(case, features=frozenset(), kernel="reference"), ring=3)
    assert [t.sent_bytes for t in moved] == [t.sent_bytes for t in plain.traffic]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"softcap": "30"}, "softcap must be a finite number"),
        ({"dropout": 1.0}, "probability from 0 to below 1"),
        ({"dropout": -0.1}, "probability from 0 to below 1"),
        ({"dropout": None}, "dropout must be a finite number"),
        ({"seed": True}, "seed is a number"),
        ({"seed": -1}, "seed is a number from 0 to below 2"),
        ({"sinks": [1.0]}, "sinks must be a tensor of floating point numbers"),
        ({"alibi": torch.ones(4, dtype=torch.int64)}, "alibi must be a tensor of floating point numbers"),
        ({"sinks": torch.ones(3)}, r"sinks must have shape \[4\], one for each query head; got \[3\]"),
        ({"alibi": torch.ones(4, 1)}, r"alibi must have shape \[4\], one for each query head; got \[4, 1\]"),
        ({"sinks": torch.ones(4, device="meta")}, "sinks must be where q, k and v are, on cpu; got meta"),
        ({"relative": torch.ones(4, 6)}, r"relative must have shape \[4, 2 R \+ 1\]"),
        (
            {"bias": torch.ones(4, 12, 12)},
            r"bias must have shape \[4, 6, 12\]: .*split\(bias, 1\).*; got \[4, 12, 12\]",
        ),
        ({"additive": torch.ones(4)}, r"additive must have shape \[4, 8\], query heads and dims; got \[4\]"),
        ({"width": 3.0}, "centres and width belong together"),
        ({"centres": torch.ones(1, 4, 6)}, "centres and width belong together"),
        ({"centres": torch.ones(1, 4, 6), "width": 0}, "width is a number of tokens above 0"),
        ({"centres": torch.ones(1, 4, 12), "width": 2}, r"centres must have shape \[1, 4, 6\]: .*split\(centres, 2\)"),
    ],
)
def test_bad_features_say_what_is_needed(given: dict[str, Any], words: str) -> None:
    x = torch.randn(1, 4, 6, 8)
    sharding = ringattn.Sharding(12, ringattn.Mesh.virtual(2))
    with pytest.raises(InputError, match=words):
        ringattn.explain(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Softmax(**given))


@pytest.mark.parametrize(
    ("kernel", "mechanism", "words"),
    [
        ("sdpa", ringattn.Softmax(softcap=2.0), "sdpa has no soft cap"),
        ("sdpa", ringattn.Softmax(alibi=torch.ones(2)), "sdpa has no ALiBi"),
        ("onednn", ringattn.Softmax(alibi=torch.ones(2)), "onednn has no ALiBi"),
        ("sdpa", ringattn.Softmax(relative=torch.ones(2, 3)), "sdpa has no relative position bias"),
        ("onednn", ringattn.Softmax(relative=torch.ones(2, 3)), "onednn has no relative position bias"),
        ("sdpa", ringattn.Softmax(bias=torch.ones(2, 6, 6)), "sdpa has no additive bias"),
        ("onednn", ringattn.Softmax(bias=torch.ones(2, 6, 6)), "onednn has no additive bias"),
        ("sdpa", ringattn.Softmax(additive=torch.ones(2, 8)), "sdpa has no additive scores"),
        ("onednn", ringattn.Softmax(centres=torch.ones(1, 2, 6), width=2), "onednn has no predictive local attention"),
        ("sdpa", ringattn.Softmax(dropout=0.1), "sdpa has no dropout that can be replayed"),
        ("onednn", ringattn.Softmax(dropout=0.1), "onednn has no dropout that can be replayed"),
    ],
)
def test_kernels_refuse_by_name_and_auto_says_so(kernel: str, mechanism: ringattn.Softmax, words: str) -> None:
    x, sharding = torch.randn(1, 2, 6, 8), ringattn.Sharding(6, ringattn.init())
    with pytest.raises(UnsupportedError, match=words):
        ringattn.attention(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=mechanism, kernel=kernel)
    said = ringattn.explain(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=mechanism)
    if mechanism.softcap is None:
        fell = said[said.index("kernel reference: auto fell to it: ") :]
        assert words in fell
    else:
        assert f"kernel onednn: auto fell to it: {words}" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_additive_scores_far_from_zero(dtype: torch.dtype) -> None:
    """Where one exponential is infinite and the other 0, their sum in the tangent is an ordinary number."""
    q, k, v, weights = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((9, 4), (7, 4), (7, 4), (4,))
    )
    q[:5] += torch.tensor([400.0, 29.0, -60.0, 0.0])
    k[:4] -= torch.tensor([399.0, 31.0, -45.0, 90.0])
    tensors = [x.to(dtype)[None, None].requires_grad_() for x in (q, k, v)] + [weights.to(dtype)[None].requires_grad_()]
    q, k, v, weights = tensors
    sharding, keys = ringattn.Sharding(9, ringattn.init()), ringattn.Sharding(7, ringattn.init())
    mechanism = ringattn.Softmax(additive=weights)
    out = ringattn.attention(q, k, v, ringattn.Full(), sharding=sharding, kv_sharding=keys, mechanism=mechanism)
    found = [out, *torch.autograd.grad(out.sum(), tensors)]
    q, k, v, weights = (x.double() for x in tensors)
    exact = ((weights * torch.tanh(q.unsqueeze(3) + k.unsqueeze(2))).sum(dim=-1)).softmax(dim=-1) @ v
    for x, y in zip(found, [exact, *torch.autograd.grad(exact.sum(), tensors)], strict=True):
        assert (x - y).norm() <= 20 * torch.finfo(dtype).eps * (1 + y.norm())


def test_sinks_run_in_the_fast_kernels() -> None:
    x, sharding = torch.randn(1, 2, 6, 8), ringattn.Sharding(6, ringattn.init())
    mechanism = ringattn.Softmax(sinks=torch.randn(2))
    said = ringattn.explain(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=mechanism)
    assert "kernel sdpa: auto took the fastest kernel" in said
    same = ringattn.explain(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=mechanism, kernel="onednn")
    assert "kernel onednn: as asked" in same


def test_new_tensors_reuse_the_plan_and_keep_no_old_ones() -> None:
    """A step's learned tensors are not held by what is kept for the next."""
    import weakref

    x, sharding = torch.randn(1, 2, 6, 8), ringattn.Sharding(6, ringattn.init())
    sinks = torch.randn(2)
    old = weakref.ref(sinks)
    ringattn.attention(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Softmax(sinks=sinks))
    del sinks
    assert old() is None
    ringattn.attention(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Softmax(sinks=torch.ones(2)))
    assert len(sharding.calls) == 1
    for seed in (1, 2):
        mechanism = ringattn.Softmax(dropout=0.1, seed=seed)
        ringattn.attention(x, x, x, ringattn.Causal(), sharding=sharding, mechanism=mechanism)
    assert len(sharding.calls) == 2, "another seed is no other plan"


@pytest.mark.parametrize("slopes", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slopes_of_low_precision_are_multiplied_in_full(slopes: torch.dtype, dtype: torch.dtype) -> None:
    """Only far keys are allowed: distances rounded to bfloat16, or beyond float16, would decide everything."""
    g = torch.Generator().manual_seed(0)
    sharding = ringattn.Sharding(3000, ringattn.init())
    q, k, v = (torch.randn(1, 2, 3000, 8, generator=g).to(dtype) for _ in range(3))
    alibi = torch.tensor([0.5, 0.125], dtype=slopes)

    def out(*x: torch.Tensor) -> torch.Tensor:
        mechanism = ringattn.Softmax(alibi=x[3])
        return ringattn.attention(x[0], x[1], x[2], ringattn.Prefix(16), sharding=sharding, mechanism=mechanism)

    exact = out(q.double(), k.double(), v.double(), alibi.double())
    assert (out(q, k, v, alibi).double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    "mechanism",
    [ringattn.Softmax(), ringattn.Softmax(softcap=2.0), ringattn.Hard(), ringattn.Linear()],
    ids=str,
)
def test_autocast_outside_changes_nothing_inside(mechanism: Any) -> None:
    sharding = ringattn.Sharding(64, ringattn.init())

    def run(enabled: bool) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        xs = [torch.randn(1, 2, 64, 16, generator=g, requires_grad=True) for _ in range(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ringattn.attention(xs[0], xs[1], xs[2], ringattn.Causal(), sharding=sharding, mechanism=mechanism)
        out.sum().backward()
        return [out.detach(), *(x.grad for x in xs if x.grad is not None)]

    assert all(map(torch.equal, run(True), run(False)))


def test_hard_gives_nan_where_a_score_is_nan_and_nowhere_else() -> None:
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    k[0, 0, 3, 0] = torch.nan
    for kernel in ("auto", ringattn.kernels.reference.Reference(rows=2, columns=2)):
        sharding = ringattn.Sharding(8, ringattn.init())
        out = ringattn.attention(
            q, k, v, ringattn.Causal(), sharding=sharding, mechanism=ringattn.Hard(), kernel=kernel
        )
        assert out[:, :, :3].isfinite().all() and out[:, :, 3:].isnan().all()


def test_numbers_of_any_type_are_one_number() -> None:
    import numpy as np

    given: dict[str, Any] = {"scale": np.float32(0.5), "dropout": 0, "seed": np.int64(3)}
    assert ringattn.Softmax(**given) == ringattn.Softmax(0.5, seed=3)
    assert str(ringattn.Softmax(**given)) == str(ringattn.Softmax(0.5))
