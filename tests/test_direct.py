"""Messages between processes of one machine: two ends in this one process, which is the other's neighbour."""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time

import pytest
import torch

from ringattn.transports.direct import SHORT, Direct, MismatchError
from ringattn.transports.neighbours import Neighbour

Ends = tuple[Direct, Direct]


@pytest.fixture
def ends() -> Ends:
    """Ranks 0 and 1, whose waits end within a fifth of a second."""
    lines = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limit = datetime.timedelta(seconds=0.2)
    first, second = (Direct({1 - rank: Neighbour(line, os.getpid())}, limit) for rank, line in enumerate(lines))
    return first, second


@pytest.mark.parametrize("count", [SHORT // 4, SHORT // 4 + 1, 1 << 20])
def test_messages_up_to_and_beyond_a_packet(ends: Ends, count: int) -> None:
    x, y = torch.randn(count), torch.zeros(count)
    (sent,) = ends[0].start([(1, x)], [])
    (received,) = ends[1].start([], [(0, y)])
    received()
    sent()
    assert torch.equal(x, y)


def test_a_long_message_is_under_way_until_it_is_received(ends: Ends) -> None:
    (sent,) = ends[0].start([(1, torch.zeros(SHORT))], [])
    with pytest.raises(RuntimeError, match="Timed out"):
        sent()
    ends[1].start([], [(0, torch.zeros(SHORT))])
    sent()


def test_more_packets_than_a_socket_holds(ends: Ends) -> None:
    """They wait in the sender, which goes on when it waits."""
    values = torch.arange(1000.0).repeat_interleave(SHORT // 4).view(1000, -1)
    buffers = torch.zeros_like(values)
    thread = threading.Thread(target=lambda: [wait() for wait in ends[1].start([], [(0, x) for x in buffers])])
    ends[0].start([(1, x) for x in values], [])
    thread.start()
    (answer,) = ends[0].start([], [(1, torch.zeros(1))])
    with pytest.raises(RuntimeError, match="Timed out"):
        answer()
    thread.join()
    assert torch.equal(values, buffers)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (torch.zeros(3), "sent 12 bytes of float32; needed are 8 of float32"),
        (torch.zeros(SHORT), "sent 32768 bytes of float32; needed are 8 of float32"),
        (torch.zeros(2, dtype=torch.int32), "sent 8 bytes of int32; needed are 8 of float32"),
    ],
)
def test_a_message_that_does_not_fit_writes_nothing(ends: Ends, sent: torch.Tensor, words: str) -> None:
    room = torch.ones(2)
    ends[0].start([(1, sent)], [])
    with pytest.raises(MismatchError, match=words):
        ends[1].start([], [(0, room)])
    assert (room == 1).all()


def test_an_end_is_noticed_at_once_after_what_was_sent_before_it(ends: Ends) -> None:
    x, y = torch.ones(5), torch.zeros(5)
    ends[0].start([(1, x)], [])
    ends[0].end()
    waits = ends[1].start([(0, torch.zeros(SHORT))], [(0, y), (0, y)])
    waits[0]()
    assert torch.equal(x, y)
    began = time.monotonic()
    for wait in waits[1:]:
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            wait()
    assert time.monotonic() - began < 0.1


def test_another_thread_ends_a_wait(ends: Ends) -> None:
    (wait,) = ends[0].start([], [(1, torch.zeros(1))])
    threading.Timer(0.05, ends[0].end).start()
    with pytest.raises(RuntimeError, match="closed"):
        wait()
