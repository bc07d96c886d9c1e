"""Agreement: every difference is seen by every rank, in messages that grow with the logarithm of the ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn.errors import AgreementError
from ringattn.mesh import Mesh
from ringattn.runtime import agreement
from ringattn.transports.base import Transport
from tests.workers import Workers


@given(ranks=st.integers(1, 20), odd=st.integers(0, 19), differs=st.booleans())
def test_one_rank_that_differs_is_seen_by_all(ranks: int, odd: int, differs: bool) -> None:
    def fn(mesh: Mesh) -> tuple[bool, list[bytes]]:
        own = b"another" if differs and mesh.rank == odd else b"thesame"
        transport = mesh.connected()
        return agreement.alike(transport, own, "test"), agreement.exchanged(transport, bytes([mesh.rank] * 3), "test")

    expected = not (differs and odd < ranks and ranks > 1)
    everyone = [bytes([rank] * 3) for rank in range(ranks)]
    assert ringattn.simulate(fn, ring=ranks).results == [(expected, everyone)] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_messages_of_a_call_are_the_logarithm_of_the_ranks(ranks: int) -> None:
    """At 64 ranks 6 messages of 16 bytes from each rank, forward and backward, the first time and again."""

    def fn(mesh: Mesh) -> list[tuple[int, int]]:
        sharding = ringattn.Sharding(2 * ranks, mesh)
        counters, seen = mesh.connected().counters, []
        for _ in range(2):
            q = torch.randn(1, 1, sharding.count, 4, requires_grad=True)
            options = {"sharding": sharding, "schedule": "ring", "kernel": "reference"}
            out = ringattn.attention(q, q, q, ringattn.Causal(), **options)  # type: ignore[call-overload]
            seen.append((counters.control_messages, counters.control_bytes))
            out.sum().backward()
            seen.append((counters.control_messages, counters.control_bytes))
        return seen

    rounds = math.ceil(math.log2(ranks))
    for seen in ringattn.simulate(fn, ring=ranks).results:
        assert seen == [(turn * rounds, turn * rounds * 16) for turn in (1, 2, 3, 4)]


class _Apart(Transport):
    """A transport whose payload cannot wait for words, as NCCL's: they go another way."""

    def __init__(self, inner: Transport, log: list[str]) -> None:
        super().__init__("apart", inner.rank, inner.size, agreement=True)
        self._inner, self._log = inner, log

    @property
    def control(self) -> Transport:
        self._log.append("words")
        return self._inner

    def refusal(self, device: torch.device) -> str | None:
        return None

    def _start(self, sends: Any, receives: Any, label: str) -> Any:
        self._log.append("payload")
        return self._inner.exchange(sends, receives, label=label).wait


@pytest.mark.parametrize("differ", [False, True])
def test_words_that_travel_apart_are_compared_when_the_payload_is_under_way(differ: bool) -> None:
    def fn(mesh: Mesh) -> tuple[list[str], str]:
        log: list[str] = []
        apart = Mesh.virtual(2, rank=mesh.rank, transport=_Apart(mesh.connected(), log))
        sharding = ringattn.Sharding(8, apart)
        q = torch.randn(1, 1, sharding.count, 4)
        softmax = ringattn.Softmax(scale=0.5 if differ and mesh.rank else 1.0)
        try:
            ringattn.attention(q, q, q, ringattn.Causal(), sharding=sharding, mechanism=softmax, kernel="reference")
            return log, ""
        except AgreementError as error:
            return log, str(error)

    for log, said in ringattn.simulate(fn, ring=2).results:
        assert log.index("payload") < len(log) - 1 - log[::-1].index("words")
        assert ("they differ in mechanism" in said) == differ


def _disagree(mesh: Mesh) -> str:
    sharding = ringattn.Sharding(16, mesh)
    q = torch.randn(1, 2, sharding.count, 4 + 4 * (mesh.rank == 2))
    with pytest.raises(AgreementError) as caught:
        ringattn.attention(q, q, q, ringattn.Causal(), sharding=sharding)
    return str(caught.value)


def test_ranks_of_mpi_that_disagree_all_learn_who_differs_in_what(mpi: Workers) -> None:
    said = mpi.run(4, _disagree)
    assert len({*said}) == 1 and "they differ in shapes (rank 0, 1, 3: " in said[0]
