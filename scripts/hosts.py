"""Hosts of one machine: network namespaces whose packets all go through one forwarder, which makes links slow.

Every host has a network of its own with one interface, a tun device; what it sends there is read by the forwarder, held
for as long as a link of the given rate and delay would take, and written to the device of the host that it is for. A
queue of a link that is longer than `QUEUE` seconds drops packets, as a switch does; TCP then slows down. So the kernel
needs no traffic control, which many lack.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import heapq
import multiprocessing
import os
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

DEVICE, MTU = "net0", 9000
PORT = 29_400
NETWORKS = Path("/etc/netns")
QUEUE = 0.2  # seconds of packets that wait for a link, before it drops more
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 1, 0x1000, 0x40000000
PYTHON = sys.executable
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Link:
    """What lies between any two hosts.

    Attributes:
        delay: seconds that a packet is under way, one way.
        rate: bytes a second that a host sends at most.
        loss: the share of packets that are lost.
    """

    delay: float = 0.0
    rate: float = float("inf")
    loss: float = 0.0


def address(host: int) -> str:
    """Of a host, numbered from 0."""
    return f"10.77.0.{host + 1}"


def refusal() -> str | None:
    """Why there can be no hosts here, in words; None where there can."""
    if not shutil.which("ip"):
        return "hosts need the command ip, of Debian's package iproute2"
    if os.geteuid():
        return "hosts need network namespaces, which only root may make"
    name = f"ringattn-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"hosts need network namespaces, and this kernel allows none ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None if os.access("/dev/net/tun", os.W_OK) else "hosts need tun devices, and /dev/net/tun cannot be opened"


class Hosts:
    """Some hosts, from ``with`` to its end, when everything that still runs on them is killed."""

    def __init__(self, count: int, link: Link) -> None:
        self.count, self._link = count, link
        self._names = [f"ringattn-{os.getpid()}-{host}" for host in range(count)]
        self._started: list[subprocess.Popen[str]] = []
        context = multiprocessing.get_context("spawn")
        self._orders, self._theirs = context.Pipe()
        self._forwarder = context.Process(target=_forward, args=(self._names, link, self._theirs), daemon=True)

    def __enter__(self) -> Hosts:
        try:
            for host, name in enumerate(self._names):
                _ip("netns", "add", name)
                self._tell_names(name)
                _ip("-n", name, "tuntap", "add", "dev", DEVICE, "mode", "tun")
                _ip("-n", name, "addr", "add", f"{address(host)}/24", "dev", DEVICE)
                _ip("-n", name, "link", "set", DEVICE, "mtu", str(MTU), "up")
                _ip("-n", name, "link", "set", "lo", "up")
            self._forwarder.start()
            self._orders.recv()  # it has opened the devices
        except BaseException:
            self.__exit__()
            raise
        return self

    def _tell_names(self, name: str) -> None:
        """What ``ip netns exec`` puts in the place of /etc/hosts."""
        folder = NETWORKS / name
        folder.mkdir(parents=True)
        others = "".join(f"{address(host)} host{host}\n" for host in range(self.count))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{others}")

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in map(int, pids.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(NETWORKS / name, ignore_errors=True)
        for process in self._started:
            process.wait()
        if self._forwarder.is_alive():
            self._forwarder.kill()
            self._forwarder.join()
        self._orders.close()
        self._theirs.close()

    def start(self, host: int, command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts a command on a host, which has a name of its own. Its output and its errors are one pipe."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname host{host}; exec "$@"', "sh"]
        told = {"NODE": str(host), "NODES": str(self.count), "HEAD": address(0), "PORT": str(PORT)}
        told |= {"ADDRESS": address(host), "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._names[host], *named, *command],
            env={**os.environ, **told, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._started.append(process)
        return process

    def cut(self, host: int) -> None:
        """From now on no packet reaches the host, and none leaves it."""
        self._orders.send(host)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _open(name: str) -> int:
    """The packets of a host's device. A file of /dev/net/tun belongs to the namespace in which it was opened."""
    with Path(f"/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return device


def _forward(names: Sequence[str], link: Link, orders: Connection) -> None:
    """The forwarder's process: reads packets, holds them, writes them."""
    devices = [_open(name) for name in names]
    orders.send("ready")
    switch, selector = _Switch(devices, link), selectors.DefaultSelector()
    for host, device in enumerate(devices):
        selector.register(device, selectors.EVENT_READ, host)
    selector.register(orders, selectors.EVENT_READ, -1)
    while True:
        for key, _ in selector.select(switch.until_next()):
            if key.data >= 0:
                switch.take(key.data)
                continue
            try:
                switch.lost.add(orders.recv())
            except EOFError:
                return
        switch.deliver()


class _Switch:
    """Packets under way between the hosts."""

    def __init__(self, devices: Sequence[int], link: Link) -> None:
        self._devices, self._link = devices, link
        self._free = [0.0] * len(devices)  # when a host's link has sent all that waits for it
        self._held: list[tuple[float, int, int, bytes]] = []
        self._count, self._random = 0, random.Random(0)
        self.lost: set[int] = set()  # hosts that are cut off

    def until_next(self) -> float | None:
        """Seconds until a packet arrives; None where none is under way."""
        return max(0.0, self._held[0][0] - time.monotonic()) if self._held else None

    def take(self, host: int) -> None:
        """Reads what a host sends."""
        while True:
            try:
                packet = os.read(self._devices[host], MTU + 64)
            except BlockingIOError:
                return
            if len(packet) >= 20 and packet[0] >> 4 == 4:  # IPv4
                self._hold(host, packet[19] - 1, packet)

    def _hold(self, host: int, target: int, packet: bytes) -> None:
        now, gone = time.monotonic(), {host, target} & self.lost
        waits = self._free[host] - now
        if gone or not 0 <= target < len(self._devices) or waits > QUEUE or self._random.random() < self._link.loss:
            return
        self._free[host] = max(now, self._free[host]) + len(packet) / self._link.rate
        self._count += 1
        heapq.heappush(self._held, (self._free[host] + self._link.delay, self._count, target, packet))

    def deliver(self) -> None:
        """Writes what has arrived."""
        while self._held and self._held[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(self._held)
            with contextlib.suppress(OSError):  # a full device, or a host that has gone: lost, as anywhere
                if target not in self.lost:
                    os.write(self._devices[target], packet)


# -- the command -----------------------------------------------------------------------------------------------------


def run(
    hosts: Hosts, command: Sequence[str], variables: Mapping[str, str], cut: tuple[int, str] | None = None
) -> list[int]:
    """Runs a command on every host and shows what each says; the exit codes, when all have ended.

    Args:
        cut: a host, and words: when they have been said, the host is cut off.
    """
    processes = [hosts.start(host, command, variables) for host in range(hosts.count)]
    readers = [
        threading.Thread(target=_show, args=(hosts, host, process, cut), daemon=True)
        for host, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    codes = []
    for host, process in enumerate(processes):
        if cut is not None and host == cut[0]:
            codes.append(0)  # nobody waits for a host that is gone
            continue
        codes.append(process.wait())
        readers[host].join(5)
    return codes


def _show(hosts: Hosts, host: int, process: subprocess.Popen[str], cut: tuple[int, str] | None) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(f"host{host} | {line}", end="", flush=True)
            if cut is not None and cut[1] in line and host != cut[0]:
                print(f"        host{cut[0]} is cut off", flush=True)
                hosts.cut(cut[0])
                cut = None


def _elastic(least: int, most: int, *program: str) -> list[str]:
    """Torchrun on every host, meeting at host 0, going on with as few as ``least``."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address(0)}:{PORT}", "--rdzv-id", "cluster"]
    start = [PYTHON, "-m", "torch.distributed.run", "--nnodes", f"{least}:{most}", "--nproc-per-node", "1"]
    start += ["--max-restarts", "3", *meeting]
    here = '--local-addr "$ADDRESS"'
    return ["bash", "-c", f'exec "$@" {here} {" ".join(program)}', "bash", *start]


def show(hosts: Hosts) -> int:
    """The doctor, then the trainer, of which the last host is cut off in the middle."""
    print("== ringattn doctor on all hosts")
    failed = max(run(hosts, _elastic(hosts.count, hosts.count, "-m", "ringattn.cli", "doctor"), {}))
    with tempfile.TemporaryDirectory(prefix="ringattn-cluster-") as folder:
        print(f"== the trainer on all hosts; host{hosts.count - 1} is cut off after step 5")
        options = "--length 1024 --steps 12 --eval-every 100 --save-every 2 --resume auto --timeout 20"
        train = _elastic(hosts.count - 1, hosts.count, str(ROOT / "launch/train.py"), options, "--folder", folder)
        return max(failed, *run(hosts, train, {}, (hosts.count - 1, "step    5 ")))


@contextlib.contextmanager
def _ended_cleanly() -> Iterator[None]:
    """SIGTERM takes the hosts away, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/cluster", description=__doc__)
    parser.add_argument("--hosts", type=int, default=3, choices=range(2, 17), metavar="N", help="2 to 16 (default 3)")
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds, one way (default 20)")
    parser.add_argument("--rate", type=float, default=200.0, help="Mbit/s that a host sends (default 200)")
    parser.add_argument("--loss", type=float, default=0.0, help="percent of packets that are lost (default 0)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what to run on every host")
    options = parser.parse_args()
    if options.rate <= 0 or options.delay < 0 or not 0 <= options.loss < 100:
        parser.error("a rate is above 0, a delay 0 or more, a loss 0 to below 100 percent")
    if words := refusal():
        print(f"scripts/cluster was skipped: {words}.", file=sys.stderr)
        return 0
    link = Link(options.delay / 1e3, options.rate * 1e6 / 8, options.loss / 100)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    with _ended_cleanly(), Hosts(options.hosts, link) as hosts:
        return max(run(hosts, command, {})) if command else show(hosts)


if __name__ == "__main__":
    sys.exit(main())
