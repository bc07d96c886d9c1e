"""Starts the ranks of a run on this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


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
        try:
            return process.wait()
        except KeyboardInterrupt:  # the ranks got it too: let them end
            process.wait()
            raise


def _torchrun() -> int:
    """torchrun, which ends quietly when it is stopped: who started it says so."""
    from torch.distributed import run  # which only this process needs
    from torch.distributed.elastic.multiprocessing.api import SignalException

    logging.disable(logging.WARNING)
    try:
        run.main()
    except (SignalException, KeyboardInterrupt):
        return 130
    return 0


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(_torchrun())
