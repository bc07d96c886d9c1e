"""A store asked with care: no question outlives its patience, whatever has become of the process that hosts it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

T = TypeVar("T")


class CarefulStore:
    """A connection of its own to a store.

    Where its host has ended, torch writes pages to stderr with every question; where it is frozen, no timeout ends
    one. So a bare connection says whether the host is there, and questions are asked in a thread that can be left.

    Args:
        patience: seconds after which an answer is not waited for any more, nor anything asked again.
    """

    def __init__(self, store: Store, patience: float) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # which its stubs lack
        self._patience = patience
        self._line = _connection(store, patience)
        self._lost = False

    @property
    def there(self) -> bool:
        """Whether it can be asked."""
        self._lost = self._lost or (self._line is not None and _closed(self._line))
        return not self._lost

    def look(self, key: str) -> str:
        """What is there, or nothing. Asked by this thread, which may have to wait for ever."""
        return self._now(lambda: self._store.get(key).decode() if self._store.check([key]) else "", "")

    def read(self, key: str) -> str:
        """What is there; nothing where there is nothing, or no answer."""
        return self._asked(lambda: self.look(key), "")

    def first(self, key: str, text: str) -> str:
        """Writes the text, unless there is one already; the one that is there, or this one where there is no answer."""
        return self._asked(lambda: self._store.compare_set(key, "", text).decode(), text)

    def write(self, key: str, text: str) -> None:
        self._asked(lambda: self._store.set(key, text), None)

    def _asked(self, question: Callable[[], T], otherwise: T) -> T:
        """The answer, if it comes in time."""
        answers: list[T] = []
        thread = threading.Thread(target=lambda: answers.append(self._now(question, otherwise)), daemon=True)
        thread.start()
        thread.join(self._patience)
        self._lost = self._lost or not answers
        return answers[0] if answers else otherwise

    def _now(self, question: Callable[[], T], otherwise: T) -> T:
        if self.there:
            try:
                return question()
            except RuntimeError:  # of torch's stores
                self._lost = True
        return otherwise


def _connection(store: Store, patience: float) -> socket.socket | None:
    """A connection that nothing is said over; None to a store of another kind."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return None
    line = socket.create_connection((store.host, store.port), patience)
    line.setblocking(False)
    return line


def _closed(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
