"""Being asked to stop, by SIGTERM.

Schedulers send it before they take a machine away, and torchrun before it starts the ranks again in another number.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

GRACE = 6.0  # seconds in which an agent of torchrun that has seen another number of nodes stops its ranks
AGAIN = 75  # EX_TEMPFAIL: an exit code by which torchrun starts the ranks that are left again


class Stop:
    """Within it SIGTERM is a wish, to be granted at the end of a step; without ``heeded`` it ends the process as ever.

    Attributes:
        asked: whether it came.
    """

    def __init__(self, heeded: bool) -> None:
        self.asked = False
        self._heeded = heeded
        self._before: Any = None

    def __enter__(self) -> Stop:
        if self._heeded:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heeded:
            signal.signal(signal.SIGTERM, self._before)

    def exit_code(self) -> int:
        """How a rank ends when one of them was asked, and all have saved: 0.

        torchrun takes a run whose ranks end with 0 for finished. So a rank that was not asked itself waits for its own
        agent to notice what another has; if that one lost its machine, the others are to go on without it.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return 0
        end = time.monotonic() + GRACE
        while not self.asked and time.monotonic() < end:
            time.sleep(0.05)
        restarts, most = (
            int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS")
        )
        return 0 if self.asked or restarts >= most else AGAIN

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.asked = True
