"""Hosts in network namespaces: links as slow as asked for, and a host that is cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from scripts.hosts import NETWORKS, Hosts, Link, refusal, run

SERVER = """
import socket
with socket.create_server(("host0", 5000)) as server, server.accept()[0] as peer:
    while got := peer.recv(65536):
        peer.sendall(got[:1])
"""
CLIENT = """
import socket, time
while True:
    try:
        peer = socket.create_connection(("host0", 5000), timeout=5)
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
started = time.monotonic()
peer.sendall(b"x")
peer.recv(1)
print("round", time.monotonic() - started, socket.gethostname(), flush=True)
started = time.monotonic()
peer.sendall(bytes(500_000))
peer.shutdown(socket.SHUT_WR)
while peer.recv(65536):
    pass
print("bulk", time.monotonic() - started, flush=True)
"""
FOREVER = """
import socket, time
with socket.create_server(("host0", 5000)) as server, server.accept()[0] as peer:
    print("connected", flush=True)
    peer.settimeout(3)
    try:
        while True:
            peer.recv(1)
    except TimeoutError:
        print("silence", flush=True)
"""
TALKER = (
    CLIENT.partition("started =")[0]
    + """
while True:
    peer.sendall(b"x")
    time.sleep(0.1)
"""
)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two, where root and the kernel allow them; everything they took away again."""
    if words := refusal():
        pytest.skip(words)
    made = Hosts(2, Link(delay=0.03, rate=1e6))
    yield made
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ringattn-{os.getpid()}-" not in left
    assert not list(NETWORKS.glob(f"ringattn-{os.getpid()}-*"))


def _programs(first: str, second: str) -> list[str]:
    return [sys.executable, "-c", f"import os; exec({first!r} if os.environ['NODE'] == '0' else {second!r})"]


def test_a_link_is_as_slow_as_asked_for(hosts: Hosts, capfd: pytest.CaptureFixture[str]) -> None:
    with hosts:
        assert run(hosts, _programs(SERVER, CLIENT), {}) == [0, 0]
    words = capfd.readouterr().out.split()
    assert "host1" in words[words.index("round") + 2]
    assert float(words[words.index("round") + 1]) >= 0.06  # 30 ms there, and as much back
    assert float(words[words.index("bulk") + 1]) >= 0.45  # 0.5 MB at 1 MB/s


def test_nothing_is_heard_of_a_host_that_is_cut_off(hosts: Hosts, capfd: pytest.CaptureFixture[str]) -> None:
    with hosts:
        assert run(hosts, _programs(FOREVER, TALKER), {}, cut=(1, "connected")) == [0, 0]
    said = capfd.readouterr().out
    assert "host1 is cut off" in said and "host0 | silence" in said


def test_no_hosts_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root may make" in str(refusal()) or "iproute2" in str(refusal())
