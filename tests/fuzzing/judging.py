"""How a fuzzed call ended: as it should, by an error of ours or rightly, or with a fault."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import ringattn

PATIENCE = 90.0  # seconds for one call on a busy machine: all schedules of 64 ranks are compared in 20 of a quiet one
WORDS = 3  # of an error, at least


class TooLongError(Exception):
    """A call did not come back."""


@dataclasses.dataclass
class Report:
    """What has become of some calls.

    Attributes:
        refused, right: how many ended in an error of ours, and how many as if nothing had been replaced.
        faults: what else has happened, with the first call to which it did.
    """

    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    right: int = 0
    faults: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)

    @property
    def calls(self) -> int:
        return self.refused.total() + self.right + len(self.faults)

    def add(self, name: str, said: Exception | str | None, shown: str) -> None:
        """One more call: an error of ours, what is wrong, or None where all is right."""
        if said is None:
            self.right += 1
        elif isinstance(said, Exception):
            self.refused[type(said).__name__] += 1
        else:
            self.faults.setdefault((name, said), shown)

    def __str__(self) -> str:
        return "\n".join(f"{name}({shown}): {said}" for (name, said), shown in self.faults.items())


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """An error of its own in what does not come back."""

    def late(_: int, __: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judged(call: Callable[[], Any], wrong: str = "", *, theirs: bool = False) -> Exception | str | None:
    """How a call ends: an error of ours, None where it is right, or what is wrong.

    Args:
        wrong: what it must not take, in words.
        theirs: whether a function of the caller's may raise what it likes.
    """
    try:
        with within(PATIENCE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that overflow, as they may
            call()
    except ringattn.RingAttentionError as error:
        return error if len(str(error).split()) >= WORDS else f"{type(error).__name__} says no more than {error}"
    except TooLongError:
        return "does not come back"
    except Exception as error:
        return None if theirs else f"{type(error).__name__}: {str(error)[:200]}"
    return f"took {wrong} without a word" if wrong else None


def text(value: Any) -> str:
    """The value as a report shows it."""
    try:
        return repr(value)[:120]
    except Exception:
        return f"a {type(value).__name__}"
