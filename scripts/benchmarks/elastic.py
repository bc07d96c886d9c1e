"""A run of the trainer under four elastic agents, two of which are killed with -9, and one of which comes back.

Nobody helps: the ranks of the killed agents end by themselves, those that are left lose them, torchrun starts them
again, and they go on from the last checkpoint, two at first and then three. Printed are the ranks of every step and the
largest relative difference of its losses from those of four ranks that nobody disturbed. Exit code 1 where it is larger
than it may be, where a step is missing or there twice, or where something is left running.

The agents meet at a store of this process, which survives them. Of torch's own store sharing between agents and ranks
they make no use (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1): in torch 2.13 an agent that comes later waits for an address
that only the first round has left, and those that stay keep the address of one that is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch._C._distributed_c10d import TCPStore

ROOT = Path(__file__).parents[2]
ALLOWED = 1e-6
PATIENCE = 300.0  # seconds for the next step, with all that comes before it
MEETING = "is_host=false,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"


def lines(folder: Path) -> list[dict[str, Any]]:
    """What every step has measured."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if "loss" in line]


class Agents:
    """torchrun once for each host, one rank each."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._options = ["--folder", str(folder), *options]
        self._log = (folder.parent / f"{folder.name}.log").open("wb")
        self.folder, self.log = folder, Path(self._log.name)
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """One more."""
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2:4", "--nproc-per-node", "1"]
        agent += ["--max-restarts", "20", "--rdzv-id", "elastic", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
        agent += ["--rdzv-endpoint", f"127.0.0.1:{self._store.port}", "--rdzv-conf", MEETING]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [*agent, str(ROOT / "launch" / "train.py"), *self._options]
        self.running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self._log, stderr=self._log))

    def kill(self) -> None:
        """Ends the last one with -9, and not its rank."""
        agent = self.running.pop()
        agent.kill()
        agent.wait()

    def reach(self, step: int, ranks: int) -> None:
        """Waits until a step of at least this number has been made by so many ranks."""
        end = time.monotonic() + PATIENCE
        while not any(line["step"] >= step and line["ranks"] == ranks for line in lines(self.folder)):
            if time.monotonic() > end or all(agent.poll() is not None for agent in self.running):
                raise SystemExit(f"No step {step} of {ranks} ranks:\n{self.log.read_text()[-8000:]}")
            time.sleep(0.05)

    def finish(self) -> list[int]:
        """Waits for the end; the exit codes."""
        return [agent.wait(PATIENCE) for agent in self.running]


def processes(folder: Path) -> set[int]:
    """Those that have this folder among their arguments."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found


def interrupted(folder: Path, options: list[str]) -> tuple[list[int], set[int], float]:
    """The run under agents: their exit codes, the processes that are left, and the seconds without a step."""
    agents = Agents(folder, options)
    for _ in range(4):
        agents.start()
    agents.reach(4, ranks=4)
    agents.kill()
    agents.kill()
    killed = time.monotonic()
    agents.reach(5, ranks=2)
    gap = time.monotonic() - killed
    agents.start()
    agents.reach(6, ranks=3)
    codes = agents.finish()
    time.sleep(2)
    left = processes(folder)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return codes, left, gap


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench elastic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="of a run (default 20)")
    parser.add_argument("--length", type=int, default=4096, help="bytes of a sample (default 4096)")
    given = parser.parse_args()
    table = Table(
        "optimizer", "ranks of the steps", "largest difference of the loss", "seconds without a step", "exits"
    )
    fine = True
    for optimizer, rate in (("sgd", "0.3"), ("adamw", "0.006")):
        options = ["--optimizer", optimizer, "--lr", rate, "--length", str(given.length), "--steps", str(given.steps)]
        options += ["--eval-every", str(given.steps), "--eval-packs", "1"]
        with tempfile.TemporaryDirectory() as temporary:
            whole, elastic = Path(temporary) / "whole", Path(temporary) / "elastic"
            command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ranks", "4", "--folder", str(whole)]
            subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            codes, left, gap = interrupted(elastic, [*options, "--save-every", "1", "--resume", "auto"])
            expected, found = lines(whole), lines(elastic)
        same = [line["step"] for line in found] == [line["step"] for line in expected]
        pairs = zip(found, expected, strict=False)
        worst = max(abs(mine["loss"] - its["loss"]) / its["loss"] for mine, its in pairs) if same else float("inf")
        runs = [(ranks, len(list(steps))) for ranks, steps in itertools.groupby(line["ranks"] for line in found)]
        fine &= worst <= ALLOWED and not left and not any(codes)
        said = ", ".join(f"{steps} of {ranks}" for ranks, steps in runs)
        exits = f"{codes}{f', left running: {sorted(left)}' if left else ''}"
        table.add_row(optimizer, said, f"{worst:.1e}", f"{gap:.0f}", exits)
    Console().print(table)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
