"""Starts the ranks of a run on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType


def start_ranks(program: Path, ranks: int, arguments: Sequence[str]) -> int:
    """Runs `program` in so many processes under torchrun, which finds a free port; returns its exit code.

    The cores are shared out, unless OMP_NUM_THREADS says otherwise: ranks that each take all of them would
    spend their time waiting for each other's threads.
    """
    torchrun = [sys.executable, "-m", __name__, "--standalone", "--nproc-per-node", str(ranks)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    with subprocess.Popen(
        [*torchrun, str(program), *arguments], env={**os.environ, "OMP_NUM_THREADS": threads}
    ) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:  # the ranks got it too: let them end
            process.wait()
            raise


def _torchrun() -> int:
    """torchrun, which ends quietly when it is stopped or a rank fails: who stopped it, and the rank, say so.

    The exit code is that of the rank that failed first; 128 and the signal's number where it was killed.
    """
    from torch.distributed import run  # which only this process needs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    end_with_launcher()
    _hand_on()
    try:
        run.main()
    except (SignalException, KeyboardInterrupt):
        return 130
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        sys.stderr.write(f"rank {rank}: ended by {signal.Signals(-failure.exitcode).name}\n")
        return 128 - failure.exitcode
    return 0


def _hand_on() -> None:
    """SIGTERM goes to the ranks, which end by themselves: torchrun would kill them half a minute later, and fail."""
    ranks = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")

    def tell(_: int, __: FrameType | None) -> None:
        for rank in ranks.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rank), signal.SIGTERM)

    if ranks.exists():  # on Linux
        sys.argv[1:1] = ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
        signal.signal(signal.SIGTERM, tell)


def end_with_launcher() -> None:
    """Has this process end when the one that started it is gone: one that was killed has nobody end its ranks."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        sys.stderr.write(f"error: Process {launcher}, which started this one, has ended, and so does this one.\n")
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(_torchrun())
