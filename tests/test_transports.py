"""One contract for every transport, Local, Simulator, Gloo and MPI; and what only the simulator can catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ringattn
from ringattn.errors import DeadlockError, InFlightError, TransportError
from ringattn.transports.base import SUMMED
from tests.workers import Workers

Run = Callable[..., list[Any]]


@pytest.fixture(params=["simulator", "gloo", "mpi"])
def run(request: pytest.FixtureRequest) -> Run:
    """``run(fn)``: the results of ``fn(mesh)`` on three ranks."""
    if request.param == "simulator":
        return lambda fn, *args: ringattn.simulate(fn, *args, ring=3).results
    workers: Workers = request.getfixturevalue(request.param)
    return lambda fn, *args: workers.run(3, fn, *args)


def _around(mesh: ringattn.Mesh, dtype: torch.dtype) -> bool:
    """Everybody sends to everybody, different sizes, twice from the same buffers."""
    transport = mesh.connected()
    peers = [rank for rank in range(mesh.size) if rank != mesh.rank]
    for turn in range(2):
        sends = [(peer, torch.full((peer + 1, 2), mesh.rank + 3 * turn).to(dtype)) for peer in peers]
        receives = [
            (peer, transport.buffers.take(f"{peer}", (mesh.rank + 1, 2), dtype, torch.device("cpu"))) for peer in peers
        ]
        handle = transport.exchange(sends, receives, label="around")
        handle.wait()
        handle.wait()  # a second wait changes nothing
        if not all((buffer == peer + 3 * turn).all() for peer, buffer in receives):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_everybody_to_everybody(run: Run, dtype: torch.dtype) -> None:
    assert run(_around, dtype) == [True, True, True]


def _in_order(mesh: ringattn.Mesh) -> list[float]:
    """Exchanges in flight at once between the same ranks keep their order, short messages and long ones."""
    transport = mesh.connected()
    left, right = (mesh.rank - 1) % mesh.size, (mesh.rank + 1) % mesh.size
    buffers = [torch.zeros(size) for size in (3, 70_000, 5, 40_000)]
    handles = [
        transport.exchange([(right, torch.full_like(buffer, float(nth)))], [(left, buffer)])
        for nth, buffer in enumerate(buffers)
    ]
    for handle in handles:
        handle.wait()
    return [float(buffer[0]) for buffer in buffers if (buffer == buffer[0]).all()]


def test_messages_arrive_in_the_order_they_were_sent(run: Run) -> None:
    assert run(_in_order) == [[0.0, 1.0, 2.0, 3.0]] * 3


def _crossing(mesh: ringattn.Mesh) -> float:
    """Rank 0 has posted what rank 1 sends, and waits for what rank 2 sends when it has heard of rank 1."""
    first, second, short = torch.full((9000,), 1.0 + mesh.rank), torch.zeros(9000), torch.zeros(1)
    transport = mesh.connected()
    if mesh.rank == 0:
        posted = transport.exchange([], [(1, second)])
        transport.exchange([], [(2, short)]).wait()
        posted.wait()
    elif mesh.rank == 1:
        transport.exchange([(0, first)], []).wait()
        transport.exchange([(2, short)], []).wait()
    else:
        transport.exchange([], [(1, short)]).wait()
        transport.exchange([(0, short)], []).wait()
    return float(second.mean())


def test_a_send_completes_when_its_receive_is_posted_wherever_the_receiver_waits(run: Run) -> None:
    assert run(_crossing) == [2.0, 0.0, 0.0]


def _count(mesh: ringattn.Mesh) -> tuple[int, int, int, int]:
    transport = mesh.connected()
    c = transport.counters
    before = (c.messages, c.sent_bytes, c.received_bytes, c.control_bytes)
    left, right = (mesh.rank - 1) % mesh.size, (mesh.rank + 1) % mesh.size
    for control in (False, True):
        sends = [(right, torch.zeros(5)), (left, torch.zeros(0))]
        receives = [(left, torch.zeros(5)), (right, torch.zeros(0))]
        transport.exchange(sends, receives, control=control).wait()
    after = (c.messages, c.sent_bytes, c.received_bytes, c.control_bytes)
    messages, sent, received, control_bytes = (b - a for a, b in zip(before, after, strict=True))
    return messages, sent, received, control_bytes


def test_payload_and_control_are_counted_apart_and_empty_messages_are_not_sent(run: Run) -> None:
    assert run(_count) == [(1, 20, 20, 20)] * 3


def _refused(mesh: ringattn.Mesh) -> list[str]:
    transport, said = mesh.connected(), []
    for peer, buffer in ((mesh.rank, torch.zeros(2)), (9, torch.zeros(2)), ((mesh.rank + 1) % 3, torch.zeros(4)[::2])):
        with pytest.raises(TransportError) as caught:
            transport.exchange([(peer, buffer)], [])
        said.append(str(caught.value))
    return said


def test_what_cannot_be_sent_is_refused(run: Run) -> None:
    for said in run(_refused):
        for words, text in zip(("exchanges with the others", "got peer 9", "contiguous"), said, strict=True):
            assert words in text


def _summed(mesh: ringattn.Mesh, dtype: torch.dtype, count: int) -> tuple[list[float], bytes, list[float]]:
    """A sum of what differs by rank, its bits, and a sum of numbers."""
    transport = mesh.connected()
    x = torch.linspace(-3, 7, count).add(mesh.rank).mul(10).to(dtype).view(-1, 1)
    transport.sum(x)
    return x.flatten().tolist(), bytes(x.view(torch.uint8).flatten().numpy()), transport.sum_numbers(mesh.rank, 2**40)


@pytest.mark.parametrize("count", [0, 1, 5, 70_001])
@pytest.mark.parametrize("dtype", SUMMED)
def test_sums_are_the_same_bits_on_every_rank(run: Run, dtype: torch.dtype, count: int) -> None:
    values, bits, numbers = zip(*run(_summed, dtype, count), strict=True)
    parts = torch.stack([torch.linspace(-3, 7, count).add(rank).mul(10).to(dtype) for rank in range(3)])
    assert len({*bits}) == 1 and numbers == ([3.0, 3 * 2.0**40],) * 3
    torch.testing.assert_close(torch.tensor(values[0], dtype=dtype), parts.double().sum(0).to(dtype))


def _not_summed(mesh: ringattn.Mesh) -> list[str]:
    said = []
    for x in (torch.zeros(4, 2)[:, 0], torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(TransportError, match="Tensors that are added up are contiguous") as caught:
            mesh.connected().sum(x)
        said.append(str(caught.value))
    return said


def test_what_cannot_be_summed_is_refused(run: Run) -> None:
    run(_not_summed)


def test_local_has_nobody_to_talk_to() -> None:
    transport = ringattn.Mesh.local().connected()
    transport.exchange([], []).wait()
    with pytest.raises(TransportError, match="exchanges with the others"):
        transport.exchange([(0, torch.zeros(1))], [])


def test_buffers_are_reused_and_grow() -> None:
    buffers = ringattn.Mesh.local().connected().buffers
    cpu = torch.device("cpu")
    first = buffers.take("a", (4, 2), torch.float32, cpu)
    again = buffers.take("a", (2, 2), torch.bfloat16, cpu)
    assert again.data_ptr() == first.data_ptr() and again.shape == (2, 2)
    assert buffers.take("b", (1,), torch.float32, cpu).data_ptr() != first.data_ptr()
    assert buffers.take("a", (100,), torch.float32, cpu).numel() == 100
    assert buffers.held_bytes == 400 + 4


# -- what only the simulator catches -------------------------------------------------------------------------------


def test_a_buffer_written_in_flight_is_caught() -> None:
    def fn(mesh: ringattn.Mesh, side: str) -> None:
        mine, theirs = torch.zeros(4), torch.zeros(4)
        peer = 1 - mesh.rank
        handle = mesh.connected().exchange([(peer, mine)], [(peer, theirs)], label="the test")
        (mine if side == "sent" else theirs)[1] = 7
        handle.wait()

    for side, words in (("sent", "the test still sends it"), ("received", "the test still receives into it")):
        with pytest.raises(InFlightError, match=words):
            ringattn.simulate(fn, side, ring=2)


def test_a_buffer_read_in_flight_holds_nan() -> None:
    def fn(mesh: ringattn.Mesh) -> tuple[bool, bool]:
        theirs, peer = torch.zeros(4), 1 - mesh.rank
        handle = mesh.connected().exchange([(peer, torch.ones(4))], [(peer, theirs)])
        early = bool(theirs.isnan().all())
        handle.wait()
        return early, bool((theirs == 1).all())

    assert ringattn.simulate(fn, ring=2).results == [(True, True)] * 2


def test_a_deadlock_names_who_waits_for_whom() -> None:
    def fn(mesh: ringattn.Mesh) -> None:
        # everybody receives before anybody sends
        left, right = (mesh.rank - 1) % 3, (mesh.rank + 1) % 3
        mesh.connected().exchange([], [(left, torch.zeros(1))], label="step 1").wait()
        mesh.connected().exchange([(right, torch.zeros(1))], []).wait()

    with pytest.raises(DeadlockError) as caught:
        ringattn.simulate(fn, ring=3)
    text = str(caught.value)
    assert "rank 0 waits in step 1 to receive from rank 2 (4 bytes)" in text
    assert "cycle: 0 -> 2 -> 1 -> 0" in text


def test_a_send_completes_only_when_its_receive_is_posted() -> None:
    def fn(mesh: ringattn.Mesh) -> None:
        peer = 1 - mesh.rank
        mesh.connected().exchange([(peer, torch.zeros(1))], []).wait()
        mesh.connected().exchange([], [(peer, torch.zeros(1))]).wait()

    with pytest.raises(DeadlockError, match="to send to rank 1"):
        ringattn.simulate(fn, ring=2)


def test_waiting_for_a_rank_that_has_finished_is_a_deadlock() -> None:
    def fn(mesh: ringattn.Mesh) -> None:
        if mesh.rank:
            mesh.connected().exchange([], [(0, torch.zeros(1))]).wait()

    with pytest.raises(DeadlockError, match="rank 1 waits for rank 0, which has finished"):
        ringattn.simulate(fn, ring=2)


def test_messages_that_do_not_fit_or_are_never_received() -> None:
    def misfit(mesh: ringattn.Mesh) -> None:
        peer = 1 - mesh.rank
        mesh.connected().exchange([(peer, torch.zeros(2 + mesh.rank))], [(peer, torch.zeros(2))]).wait()

    def lost(mesh: ringattn.Mesh) -> None:
        if mesh.rank == 0:
            mesh.connected().exchange([(1, torch.zeros(2))], [], label="a whisper")

    with pytest.raises(TransportError, match=r"Rank 1 sends 12 bytes of torch.float32.* rank 0 receives 8 bytes"):
        ringattn.simulate(misfit, ring=2)
    with pytest.raises(TransportError, match="no rank answered:\n  rank 0 waits in a whisper to send to rank 1"):
        ringattn.simulate(lost, ring=2)


def test_one_ranks_exception_ends_all_and_is_the_one_reported() -> None:
    ended = []

    def fn(mesh: ringattn.Mesh) -> None:
        try:
            if mesh.rank == 2:
                raise ZeroDivisionError("on purpose")
            mesh.connected().exchange([], [(2, torch.zeros(1))]).wait()
        finally:
            ended.append(mesh.rank)

    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        ringattn.simulate(fn, ring=4)
    assert sorted(ended) == [0, 1, 2, 3] or sorted(ended) == [0, 1, 2]  # rank 3 may not have begun
    assert caught.traceback[-1].name == "fn"


def test_ranks_run_in_order_and_give_way_only_where_they_wait() -> None:
    def fn(mesh: ringattn.Mesh, log: list[str]) -> None:
        peer = 1 - mesh.rank
        for turn in range(2):
            log.append(f"{mesh.rank}.{turn}")
            mesh.connected().exchange([(peer, torch.zeros(1))], [(peer, torch.zeros(1))]).wait()

    log: list[str] = []
    ringattn.simulate(fn, log, ring=2)
    assert log == ["0.0", "1.0", "1.1", "0.1"]


def test_simulate_hands_over_arguments_results_and_traffic() -> None:
    sim = ringattn.simulate(lambda mesh, a, b: (mesh.rank, mesh.axes["ring"], a + b), 2, 3, ring=64)
    assert sim.results == [(rank, 64, 5) for rank in range(64)]
    assert len(sim.traffic) == 64 and sim.traffic[0].messages == 0
