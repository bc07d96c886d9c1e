"""Ulysses: heads are exchanged for sequence, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import ringattn
from ringattn.errors import AgreementError, InputError, PlanError, UnsupportedError
from ringattn.layouts import positions
from ringattn.layouts.grouped import Grouped, rows_in_groups
from ringattn.mechanisms.base import Mechanism
from ringattn.plans.deal import Part, deal
from ringattn.plans.ulysses import UlyssesPlan

MESHES = ((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (1, 4), (2, 3), (1, 5))
HEADS = ((8, 8), (8, 2), (6, 3), (5, 1), (12, 4))
DOCUMENTS = ringattn.Documents([13, 1, 15]) & ringattn.Causal()
MASKS = (
    ringattn.Causal(),
    DOCUMENTS,
    ringattn.Window(5) | ringattn.SinkTokens(2),
    ringattn.Prefix(4) | ringattn.Causal(),
    ringattn.Predicate(lambda q, k: (q * k) % 3 != 1),
    ringattn.Blocks(np.tri(4, dtype=bool), 8),
)
SHAPE: dict[str, Any] = {"head_dims": (8, 12), "dtype": "float32"}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "counts"),
    [(6, 3, 4, [2, 2, 1, 1]), (8, 2, 3, [3, 3, 2]), (5, 1, 5, [1] * 5), (12, 4, 1, [12])],
)
def test_heads_are_dealt_once_each_with_the_key_heads_they_read(
    heads: int, kv_heads: int, ranks: int, counts: list[int]
) -> None:
    for slices in (1, 2, 7):
        dealt = deal(heads, kv_heads, ranks, slices)
        assert [sum(part.heads for parts in own for part in parts) for own in dealt] == counts
        read = []
        for own in dealt:
            assert len(own) == len(dealt[0]) <= slices
            seen = [kv for parts in own for part in parts for kv in range(part.kv_first, part.kv_stop)]
            assert len(seen) == len({*seen}), "a key head goes to a rank once"
            for part in (part for parts in own for part in parts):
                each = part.heads // part.kv_heads
                read += [(part.first + nth, part.kv_first + nth // each) for nth in range(part.heads)]
        assert read == [(head, head // (heads // kv_heads)) for head in range(heads)]


def test_more_ranks_than_query_heads_are_refused_with_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match=r"got 4 heads on 6 ranks\. Use ulysses=4 or fewer"):
        ringattn.plan_all(ringattn.Causal(), 8, schedule="ulysses", ulysses=6, heads=(4, 2))
    with pytest.raises(InputError, match="give heads="):
        ringattn.plan_all(ringattn.Causal(), 8, schedule="ulysses", ulysses=2)
    with pytest.raises(InputError, match="inner schedule is one along the ring"):
        ringattn.Ulysses("ulysses")


@pytest.mark.parametrize("layout", [ringattn.Contiguous(), ringattn.Zigzag(), ringattn.Striped()])
def test_a_group_holds_what_its_members_hold(layout: ringattn.Layout) -> None:
    for length in (0, 3, 29, 60):
        for ring, size in MESHES:
            spans = layout.spans(length, ring * size)
            joined = Grouped(layout, size).spans(length, ring)
            table = rows_in_groups(spans, joined, size)
            for rank in range(ring * size):
                own, group = positions(spans, rank), positions(joined, rank // size)
                assert {*own.tolist()} <= {*group.tolist()}
                for _, start, there, count in table[table[:, 0] == rank].tolist():
                    assert np.array_equal(own[start : start + count], group[there : there + count])
                assert table[table[:, 0] == rank][:, 3].sum() == len(own)


def test_zigzag_groups_are_as_balanced_as_zigzag_ranks() -> None:
    plans = ringattn.plan_all(ringattn.Causal(), 4096, schedule="ulysses", ring=4, ulysses=2, heads=(4, 4))
    assert ringattn.balance(plans).area < 1.001
    assert len(Grouped(ringattn.Zigzag(), 2).spans(4096, 4)) == 7, "neighbours' runs are one"


# -- plans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ring", "ulysses"), MESHES)
def test_every_plan_is_verified_and_what_is_sent_is_received(ring: int, ulysses: int) -> None:
    for nth, (mask, layout) in enumerate((m, x) for m in MASKS for x in ("zigzag", "striped", "contiguous")):
        schedule = ringattn.Ulysses(("route", "ring", "auto")[nth % 3], 1 + nth % 2, keep=nth % 4 != 3)
        heads = HEADS[nth % len(HEADS)]
        plans = ringattn.plan_all(mask, 29, layout, schedule, ring, ulysses, heads=heads, **SHAPE)
        ringattn.verify(plans)
        moved = [plan.traffic() for plan in plans]
        for name in ("messages", "bytes", "tokens"):
            if name != "messages":
                assert sum(getattr(x, f"sent_{name}") for x in moved) == sum(
                    getattr(x, f"received_{name}") for x in moved
                )
        assert sum(x.backward_sent_bytes or 0 for x in moved) == sum(x.backward_received_bytes or 0 for x in moved)
        assert sum(plan.tokens for plan in plans) == 29
        for rank, plan in enumerate(plans):
            mesh = ringattn.Mesh.virtual(ring, ulysses, rank)
            own = ringattn.plan(mask, ringattn.Sharding(29, mesh, layout, mask), schedule, heads=heads, **SHAPE)
            assert own.hash == plan.hash, "a rank plans alone what all are planned together"
            assert plan.memory().total > 0
            assert "exchanges heads for sequence" in plan.explain()


def _without_last_part(plan: UlyssesPlan) -> UlyssesPlan:
    dealt = (*plan.swap.dealt[:-1], ((plan.swap.dealt[-1][0][:-1]),))
    return _swapped(plan, dealt=dealt)


def _other_key_head(plan: UlyssesPlan) -> UlyssesPlan:
    last = plan.swap.dealt[-1][0][-1]
    wrong = Part(last.first, last.stop, last.kv_first - 1, last.kv_stop - 1)
    return _swapped(plan, dealt=(*plan.swap.dealt[:-1], ((*plan.swap.dealt[-1][0][:-1], wrong),)))


def _rows_lost(plan: UlyssesPlan) -> UlyssesPlan:
    return _swapped(plan, q_rows=plan.swap.q_rows[1:])


def _rows_moved(plan: UlyssesPlan) -> UlyssesPlan:
    rows = plan.swap.k_rows.copy()
    rows[[0, -1], 2] = rows[[-1, 0], 2]
    return _swapped(plan, k_rows=rows)


def _inner_tile_lost(plan: UlyssesPlan) -> UlyssesPlan:
    inner = plan.inner
    inner = dataclasses.replace(inner, tile_rows=inner.tile_rows[1:], tile_phases=inner.tile_phases[1:])
    return dataclasses.replace(plan, inner=inner)


def _swapped(plan: UlyssesPlan, **changes: Any) -> UlyssesPlan:
    return dataclasses.replace(plan, swap=dataclasses.replace(plan.swap, **changes))


@pytest.mark.parametrize("fault", [_without_last_part, _other_key_head, _rows_lost, _rows_moved, _inner_tile_lost])
def test_a_planted_fault_is_found(fault: Callable[[UlyssesPlan], UlyssesPlan]) -> None:
    def plans() -> list[ringattn.Plan]:
        return ringattn.plan_all(DOCUMENTS, 29, "zigzag", "ulysses", 2, 2, heads=(8, 4), **SHAPE)

    for rank in range(4):
        made = plans()
        plan = made[rank]
        assert isinstance(plan, UlyssesPlan)
        made[rank] = fault(plan)
        with pytest.raises(PlanError):
            made[rank].verify()
        with pytest.raises(PlanError):
            ringattn.verify(made)


@pytest.mark.parametrize(
    "change", [{"keep": False}, {"gradient_wire": "input"}, {"dealt": deal(8, 4, 2, slices=2)}], ids=str
)
def test_ranks_that_do_not_exchange_alike_are_found(change: dict[str, Any]) -> None:
    made = ringattn.plan_all(DOCUMENTS, 29, "zigzag", "ulysses", 2, 2, heads=(8, 4), **SHAPE)
    plan = made[3]
    assert isinstance(plan, UlyssesPlan)
    made[3] = _swapped(plan, **change)
    made[3].verify()
    with pytest.raises(PlanError, match="rank 0"):
        ringattn.verify(made)


# -- calls ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """One call over all positions; `make` gives the mechanism of one rank."""

    heads: tuple[int, int]
    mask: ringattn.Mask
    make: Callable[[ringattn.Sharding, torch.Generator], Mechanism]
    extras: tuple[str, ...] = ()
    length: int = 29
    keys: int = 29
    dtype: torch.dtype = torch.float64

    def run(self, mesh: ringattn.Mesh, layout: str, schedule: Any) -> dict[str, torch.Tensor]:
        """The results and the gradients, joined."""
        g = torch.Generator().manual_seed(0)
        sharding = ringattn.Sharding(self.length, mesh, layout, self.mask)
        kv = sharding if self.keys == self.length else ringattn.Sharding(self.keys, mesh, "contiguous")
        sizes = (self.heads[0], self.length, 8), (self.heads[1], self.keys, 8), (self.heads[1], self.keys, 12)
        full = [torch.randn(2, *size, generator=g, dtype=torch.float64).to(self.dtype) for size in sizes]
        dout = torch.randn(2, self.heads[0], self.length, 12, generator=g, dtype=torch.float64).to(self.dtype)
        q, k, v = (own.split(x, 2).clone().requires_grad_() for x, own in zip(full, (sharding, kv, kv), strict=True))
        mechanism = self.make(sharding, g)
        results = ringattn.attention(
            q,
            k,
            v,
            self.mask,
            sharding=sharding,
            kv_sharding=None if kv is sharding else kv,
            mechanism=mechanism,
            schedule=schedule,
            extras=self.extras,
        )
        out, *extras = results if isinstance(results, tuple) else (results,)
        loss = (out * sharding.split(dout, 2)).sum()
        for x in extras:
            if x.is_floating_point():
                loss = loss + 0.3 * torch.where(x.isfinite(), x, 0).sum()
        loss.backward()
        found = {str(nth): sharding.join(x.detach(), 2) for nth, x in enumerate((out, *extras))}
        for name, x, own in (("q", q, sharding), ("k", k, kv), ("v", v, kv)):
            found[name] = own.join(x.grad, 2)  # type: ignore[arg-type]
        for name, param in mechanism.params.items():
            assert param.grad is not None
            dim = mechanism.sharded.get(name)
            found[name] = ringattn.reduce(param.grad, mesh, "sum") if dim is None else sharding.join(param.grad, dim)
        return found


def _scored(heads: int, length: int, keys: int, *names: str, **options: Any) -> Any:
    def make(sharding: ringattn.Sharding, g: torch.Generator) -> ringattn.Softmax:
        tensors = {
            "sinks": torch.randn(heads, generator=g),
            "alibi": torch.rand(heads, generator=g) / 10,
            "relative": torch.randn(heads, 7, generator=g),
            "bias": sharding.split(torch.randn(heads, length, keys, generator=g), 1),
        }
        chosen: dict[str, Any] = {name: tensors[name].double().requires_grad_() for name in names}
        return ringattn.Softmax(**chosen, **options)

    return make


def _gated(sharding: ringattn.Sharding, g: torch.Generator) -> ringattn.Gated:
    return ringattn.Gated(sharding.split(-torch.rand(2, 2, 29, generator=g), 2).requires_grad_())


def _plain(mechanism: Any) -> Any:
    return lambda sharding, g: mechanism


CASES = {
    "softmax": Asked((8, 2), DOCUMENTS, _plain(ringattn.Softmax()), ("lse",)),
    "sinks, alibi": Asked((6, 3), MASKS[2], _scored(6, 29, 29, "sinks", "alibi"), ("lse",)),
    "bias, table": Asked((5, 1), MASKS[3], _scored(5, 29, 29, "bias", "relative", softcap=3.0)),
    "dropout": Asked((12, 4), ringattn.Causal(), _plain(ringattn.Softmax(dropout=0.3, seed=4))),
    "predicate": Asked((8, 8), MASKS[4], _plain(ringattn.Softmax())),
    "blocks": Asked((6, 3), MASKS[5], _plain(ringattn.Softmax())),
    "cross": Asked((8, 2), ringattn.Full(), _scored(8, 29, 17, "sinks"), ("lse",), keys=17),
    "short": Asked((8, 8), ringattn.Causal(), _plain(ringattn.Softmax()), length=3, keys=3),
    "hard": Asked((6, 3), ringattn.Causal(), _plain(ringattn.Hard(top=2)), ("position", "score")),
    "linear": Asked((8, 2), ringattn.Causal(), _plain(ringattn.Linear())),
    "entmax": Asked((5, 1), DOCUMENTS, _plain(ringattn.Entmax())),
    "sampled": Asked((12, 4), DOCUMENTS, _plain(ringattn.Sampled(seed=2)), ("position", "log_prob")),
    "gated": Asked((8, 2), ringattn.Causal(), _gated),
}


def _differences(case: Asked, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((found[name].double() - x.double()).norm() / x.double().norm().clamp(min=1e-9))
        for name, x in wanted.items()
        if x.is_floating_point()
    }


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_one_rank(name: str) -> None:
    """Several meshes, layouts, slices and inner schedules; what is kept and what is exchanged again."""
    case = CASES[name]
    wanted = ringattn.simulate(lambda mesh: case.run(mesh, "contiguous", "auto"), ring=1).results[0]
    for nth, (ring, ulysses) in enumerate(((2, 2), (1, 4), (3, 2), (1, 5), (2, 3))):
        nth += len(name)
        if ulysses > case.heads[0]:
            continue
        layout = ("zigzag", "striped", "contiguous")[nth % 3] if name != "linear" else "zigzag"
        schedule = ringattn.Ulysses("auto" if nth % 2 else "route", 1 + nth % 3, keep=nth % 2 == 0)
        results = ringattn.simulate(lambda mesh: case.run(mesh, layout, schedule), ring=ring, ulysses=ulysses).results  # noqa: B023
        for found in results:
            for x, y in ((found[n], wanted[n]) for n in wanted if not wanted[n].is_floating_point()):
                assert torch.equal(x, y)
            limit = 1e-6 if name == "gated" else 1e-12  # whose decays are carried in float32
            differences = _differences(case, found, wanted)
            assert max(differences.values()) < limit, (ring, ulysses, layout, schedule, differences)


@pytest.mark.parametrize("mechanism", [ringattn.Monotonic(), ringattn.MoChA(4)])
def test_a_wave_goes_along_the_ring(mechanism: Any) -> None:
    case = Asked((6, 3), ringattn.Full(), _plain(mechanism))
    wanted = ringattn.simulate(lambda mesh: case.run(mesh, "contiguous", "auto"), ring=1).results[0]
    for ring, ulysses in ((1, 4), (2, 2)):
        results = ringattn.simulate(
            lambda mesh: case.run(mesh, "contiguous", ringattn.Ulysses(slices=2)), ring=ring, ulysses=ulysses
        ).results
        assert max(_differences(case, results[0], wanted).values()) < 1e-12
    with pytest.raises(UnsupportedError, match="keep=True"):
        ringattn.simulate(lambda mesh: case.run(mesh, "contiguous", ringattn.Ulysses(keep=False)), ring=1, ulysses=2)


@pytest.mark.parametrize("keep", [True, False])
def test_the_bytes_that_travel_are_those_of_the_plan(keep: bool) -> None:
    """Forward and backward; the log-sum-exp goes home where nothing is kept."""
    schedule = ringattn.Ulysses("route", 2, keep=keep)

    def passes(mesh: ringattn.Mesh) -> list[tuple[int, int, int]]:
        sharding = ringattn.Sharding(29, mesh, "zigzag", DOCUMENTS)
        x = [torch.randn(2, h, sharding.count, d).bfloat16().requires_grad_() for h, d in ((6, 8), (3, 8), (3, 12))]
        counters, found = mesh.connected().counters, []
        out = ringattn.attention(*x, DOCUMENTS, sharding=sharding, schedule=schedule)  # type: ignore[call-overload]
        found.append((counters.messages, counters.sent_bytes, counters.received_bytes))
        out.sum().backward()
        found.append((counters.messages, counters.sent_bytes, counters.received_bytes))
        return found

    found = ringattn.simulate(passes, ring=2, ulysses=2).results
    shape: dict[str, Any] = {"heads": (6, 3), "head_dims": (8, 12), "dtype": "bfloat16", "batch": 2}
    plans = ringattn.plan_all(DOCUMENTS, 29, "zigzag", schedule, 2, 2, mechanism=ringattn.Softmax(), **shape)
    for (forward, both), plan in zip(found, plans, strict=True):
        moved = plan.traffic()
        assert forward == (moved.messages, moved.sent_bytes, moved.received_bytes)
        backward = tuple(b - a for a, b in zip(forward, both, strict=True))
        assert backward == (moved.backward_messages, moved.backward_sent_bytes, moved.backward_received_bytes)


def test_what_crosses_between_nodes_is_counted() -> None:
    for node, groups_cross, ring_crosses in ((4, False, True), (8, False, False), (2, True, True)):
        plans = ringattn.plan_all(
            ringattn.Full(), 64, "contiguous", ringattn.Ulysses("route"), 2, 4, heads=(8, 8), node=node
        )
        for plan in plans:
            assert isinstance(plan, UlyssesPlan)
            others = {m.peer for m in plan.swap.outward(0)[1] if m.peer // node != plan.rank // node}
            assert bool(others) == groups_cross
            inside = plan.inner.traffic().received_tokens
            assert plan.traffic().between_nodes_tokens == 8 * len(others) + inside * ring_crosses


def test_members_without_tokens_send_nothing() -> None:
    """Two tokens on four ranks: the messages that are counted are those that are sent."""
    schedule = ringattn.Ulysses("route")

    def passes(mesh: ringattn.Mesh) -> tuple[int, int]:
        sharding = ringattn.Sharding(2, mesh, "contiguous")
        x = torch.randn(1, 4, sharding.count, 8, requires_grad=True)
        out = ringattn.attention(x, x, x, ringattn.Causal(), sharding=sharding, schedule=schedule)
        forward = mesh.connected().counters.messages
        out.sum().backward()
        return forward, mesh.connected().counters.messages - forward

    found = ringattn.simulate(passes, ring=1, ulysses=4).results
    shape: dict[str, Any] = {"heads": (4, 4), "head_dims": (8, 8), "dtype": "float32"}
    plans = ringattn.plan_all(ringattn.Causal(), 2, "contiguous", schedule, 1, 4, **shape)
    assert found == [(plan.traffic().messages, plan.traffic().backward_messages) for plan in plans]


def test_key_heads_that_several_ranks_read_are_sent_to_each_once_and_added_up_in_float32() -> None:
    plan = ringattn.plan_all(
        ringattn.Full(), 40, schedule="ulysses", ulysses=4, heads=(8, 2), head_dims=(8, 8), dtype="bfloat16"
    )[0]
    moved, tokens = plan.traffic(), 10
    # outward 2 query heads and 1 key head, of q, k and v, to each of three; homeward 2 heads of the output
    assert moved.sent_bytes == 3 * tokens * (2 * 8 + 1 * 16 + 2 * 8) * 2
    assert moved.backward_sent_bytes == 3 * tokens * ((2 * 8) * 2 + (2 * 8) * 2 + (1 * 16) * 4)


def test_ranks_that_want_other_results_are_told() -> None:
    def differ(mesh: ringattn.Mesh) -> None:
        sharding = ringattn.Sharding(8, mesh)
        q = torch.randn(1, 2, sharding.count, 4)
        ringattn.attention(q, q, q, ringattn.Full(), sharding=sharding, schedule="ulysses", return_lse=mesh.rank == 0)  # type: ignore[call-overload]

    with pytest.raises(AgreementError, match="lse"):
        ringattn.simulate(differ, ring=1, ulysses=2)


def test_bits_that_must_not_depend_on_ranks_are_refused() -> None:
    def attend(mesh: ringattn.Mesh) -> None:
        sharding = ringattn.Sharding(8, mesh)
        q = torch.randn(1, 2, sharding.count, 4)
        ringattn.attention(q, q, q, ringattn.Full(), sharding=sharding, schedule="ulysses", deterministic=True)

    with pytest.raises(UnsupportedError, match="ulysses computes some heads at once"):
        ringattn.simulate(attend, ring=1, ulysses=2)


def test_compiled_code_exchanges_again() -> None:
    def attend(mesh: ringattn.Mesh) -> list[torch.Tensor]:
        sharding = ringattn.Sharding(16, mesh)
        g = torch.Generator().manual_seed(0)
        q = sharding.split(torch.randn(1, 4, 16, 8, generator=g), 2).requires_grad_()

        def f(x: torch.Tensor) -> torch.Tensor:
            return ringattn.attention(x, x, x, ringattn_mask, sharding=sharding, schedule=ringattn.Ulysses()).sin()

        grads = []
        for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            (grad,) = torch.autograd.grad(run(q).sum(), q)
            grads.append(grad)
        return grads

    ringattn_mask = ringattn.Causal()
    for eager, compiled in ringattn.simulate(attend, ring=1, ulysses=2).results:
        assert torch.allclose(eager, compiled, atol=1e-6)
