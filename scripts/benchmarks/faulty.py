"""One rank of `scripts/bench faults`: a step and a checkpoint that go well, then the same with a fault in it.

Rank 1 has the fault, in its second step: before the ranks meet, in the middle of a forward or a backward pass, when it
has relayed nothing yet of what it received, or while a checkpoint is being written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch

import ringattn
from ringattn.training import checkpoint, storage, sum_gradients
from ringattn.transports.mpi import end_job

RANKS, ODD, LENGTH = 3, 1, 48
STARTED, FAULT = "started", "fault"  # files: a rank is there, the time of the fault
Place = Literal["start", "forward", "backward", "save"]
TWICE = {"wrong shape", "wrong dtype", "wrong mask", "skips", "twice"}


class Model(torch.nn.Module):
    """An attention layer, of another size or dtype where a rank is to be wrong."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(8, 3 * width, dtype=dtype)

    def forward(self, x: torch.Tensor, mask: ringattn.Mask, sharding: ringattn.Sharding) -> torch.Tensor:
        q, k, v = self.qkv(x.to(self.qkv.weight.dtype)).view(1, len(x), 3, 2, -1).permute(2, 0, 3, 1, 4)
        return ringattn.attention(q, k, v, mask, sharding=sharding, schedule="ring")


class Rank:
    """What one process does.

    Args:
        fault: what happens on one of the ranks.
        place: where.
    """

    def __init__(self, transport: str, fault: str, place: Place, timeout: float, folder: Path) -> None:
        self.fault, self.place, self.timeout, self.folder = fault, place, timeout, folder
        self.transport: Any = transport
        self.rank = int(os.environ.get("PMI_RANK", os.environ.get("RANK", "0")))
        self.odd = self.rank == ODD

    def run(self) -> None:
        if self.place == "start":
            self._fail()
            if self.odd and self.fault == "missing":
                return
        mesh = ringattn.init(transport=self.transport, timeout=self.timeout)
        if self.place == "start" and self.odd and self.fault == "twice":
            ringattn.init(transport=self.transport, timeout=self.timeout)
        self.mesh, self.sharding = mesh, ringattn.Sharding(LENGTH, mesh)
        model, mask = Model(), cast(ringattn.Mask, ringattn.Causal())
        self._step(model, mask)
        self._save(model, 1)
        if self.odd and self.place == "forward":
            model = {"wrong shape": Model(32), "wrong dtype": Model(dtype=torch.float64)}.get(self.fault, model)
            mask = ringattn.Full() if self.fault == "wrong mask" else mask
        self._step(model, mask, at=self.place)
        if self.odd and self.place == "save":
            model = {"wrong shape": Model(32), "wrong dtype": Model(dtype=torch.float64)}.get(self.fault, model)
            self._in_writing()
        for _ in range(self._times("save")):
            self._save(model, 2)

    def _step(self, model: Model, mask: Any, at: str = "") -> None:
        """One step, with the fault in one of its passes."""
        x = torch.randn(self.sharding.count, 8)
        if at == "forward":
            self._in_exchanges()
        out = [model(x, mask, self.sharding) for _ in range(self._times(at if at == "forward" else ""))]
        if at == "backward":
            self._in_exchanges()
        for _ in range(self._times(at if at == "backward" else "") if out else 0):
            out[0].sum().backward(retain_graph=True)
        sum_gradients(model, self.mesh)

    def _save(self, model: Model, step: int) -> None:
        checkpoint.save(self.folder / "checkpoints", model=model, step=step, mesh=self.mesh)

    def _times(self, here: str) -> int:
        """How often this rank does what the others do once."""
        if not self.odd or self.place != here or self.fault not in TWICE:
            return 1
        self._mark()
        return {"skips": 0, "twice": 2}.get(self.fault, 1)

    def _in_exchanges(self) -> None:
        """The fault, in the second exchange of the next pass."""
        transport: Any = self.mesh.connected()
        exchange, exchanges = transport.exchange, 0

        def counted(*arguments: Any, control: bool = False, **options: Any) -> Any:
            nonlocal exchanges
            exchanges += not control
            if exchanges == 2 and not control:
                self._fail()
            return exchange(*arguments, control=control, **options)

        transport.exchange = counted

    def _in_writing(self) -> None:
        write: Callable[..., Any] = storage.Writer.write_data

        def failing(*arguments: Any) -> Any:
            self._fail()
            return write(*arguments)

        storage.Writer.write_data = failing  # type: ignore[method-assign, assignment]

    def _mark(self) -> None:
        (self.folder / FAULT).write_text(str(time.time()))

    def _fail(self) -> None:
        if not self.odd:
            return
        self._mark()
        if self.fault == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.fault == "exception":
            raise ZeroDivisionError("on purpose")
        elif self.fault == "out of memory":
            torch.empty(1 << 50)
        elif self.fault == "closed socket":
            _close_sockets(int(os.environ.get("MASTER_PORT", "0")))


def _close_sockets(store: int) -> None:
    """Those to the other ranks; that to the store stays."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "socket" in str(link.readlink()):
                with socket.socket(fileno=os.dup(int(link.name))) as end:
                    if end.family != socket.AF_UNIX and end.getpeername()[1] != store:
                        end.shutdown(socket.SHUT_RDWR)


def main(transport: str, fault: str, place: Any, timeout: float, folder: Path) -> int:
    """The exit code of a rank, which says in one line what has ended it."""
    torch.set_num_threads(1)
    rank = Rank(transport, fault, place, timeout, folder)
    (folder / f"{STARTED} {rank.rank}").touch()
    while len(list(folder.glob(f"{STARTED} *"))) < RANKS:  # what a busy machine needs for imports is no fault
        time.sleep(0.01)
    try:
        rank.run()
    except Exception as error:
        said, code = f"{type(error).__name__}: {' '.join(str(error).split())}", 1
    else:
        said, code = "done", 0
    (folder / f"rank {rank.rank}").write_text(said)
    end_job(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), Path(sys.argv[5])))
