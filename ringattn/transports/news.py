"""News of a lost rank, over torch.distributed: who learns it tells the others through the store.

What can end a wait in torch 2.13, found by experiment:

- A killed process closes its connections: Gloo's waits *for it* fail at once, those for anybody else go on until the
  group's timeout.
- ``Work.wait(timeout)`` cannot wait in slices: after the first that is not enough Gloo closes the connections of the
  whole group. ``is_completed`` stays False until something waits. A ``Work`` of Gloo has no abort, and ``abort`` and
  ``shutdown`` of its group leave waits as they are. On NCCL ``abort`` ends them.
- That very closing is the way: a receive that nobody sends, waited for in another thread for a millisecond, ends every
  wait of the group, here ("Application timeout caused pair closure") and at its peers ("Connection closed by peer"),
  those of collectives too. Other groups of the same ranks go on.

So a thread asks twice a second whether there is news, over a connection of its own, and ends this rank's waits when
there is. A call pays for one assignment before each wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import threading
import time
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ringattn.errors import TransportError
from ringattn.transports.told import CarefulStore

POLL = 0.5  # seconds from one look to the next
PATIENCE = 2.0  # seconds for which the store is waited for, and what other ranks say
GRACE = 0.3  # seconds in which a rank that has closed a connection, and lives, says why
TAG = 1 << 20  # of a message that nobody sends
INSTANT = datetime.timedelta(milliseconds=1)
REASON = 400  # characters of an exception
ENDED = "has ended: its own output says why"
CUT = "lives, but the connection to it was closed"
LATE = "did not come within"


class Place(NamedTuple):
    """What a rank is doing.

    Attributes:
        what: the label of its last exchange or sum.
        peer: the rank it waits for; None when it does not wait, or for all.
        why: that wait has failed, by itself.
    """

    what: str
    peer: int | None = None
    why: str = ""

    def __str__(self) -> str:
        return self.what if self.peer is None else f"{self.what}, where it waited for rank {self.peer}"


@dataclasses.dataclass(frozen=True)
class Loss:
    """The first thing that went wrong, in the words of the rank that found it.

    Attributes:
        teller: that rank.
        lost: the rank that is lost; the teller itself where it has raised an exception; None where it is not known.
        among: the ranks of which it is one.
        where: what the teller was doing.
        why: what is known of the lost rank.
        advice: what to do about it.
    """

    teller: int
    lost: int | None
    among: Sequence[int]
    where: str
    why: str
    advice: str = ""


class News:
    """What the ranks of a run tell each other when one of them is lost.

    Args:
        store: that all of them reach.
        key: in it, the same on all ranks and used once.
        rank, size: this rank in the world, which errors name.
        host: the rank that hosts the store; None for another process.

    Attributes:
        place: what this rank is doing; set by its transports.
        loss: what was told; None as long as all is well.
    """

    def __init__(self, store: Store, key: str, rank: int, size: int, host: int | None = None) -> None:
        self.rank, self.size = rank, size
        self.place = Place("no exchange")
        self.loss: Loss | None = None
        self._key, self._host = key, host
        self._store = CarefulStore(store, PATIENCE)
        self._groups: list[dist.ProcessGroup] = []
        stop = threading.Event()
        thread = threading.Thread(target=_watch, args=(weakref.ref(self), stop), name="news", daemon=True)
        weakref.finalize(self, _end, stop, thread)  # before the interpreter goes: a thread in torch may abort it then
        thread.start()

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> News:
        """Among the ranks of a group, for as long as there is no mesh that has more."""
        store = dist.distributed_c10d._get_default_store()
        return cls(store, f"ringattn/news/{group.group_name}", dist.get_rank(), dist.get_world_size())

    def follow(self, group: dist.ProcessGroup) -> None:
        """Ends the waits of this group too when there is news."""
        self._groups.append(group)

    def look(self) -> bool:
        """Asks for news once; whether it is worth asking again."""
        if said := self._store.look(f"{self._key}/first"):
            self._hear(Loss(**json.loads(said)))
        return self.loss is None and self._store.there

    def failed(self, place: Place, among: Sequence[int], error: RuntimeError, timeout: float) -> TransportError:
        """The error of a wait that has failed, after telling and hearing the others."""
        why, advice = _reason(error, timeout)
        if why == ENDED:  # or Gloo has closed it at the other end, where a wait was over and the reason is known
            self._give_time()
        self.place = place if self.loss else place._replace(why=why)
        self._tell(Loss(self.rank, place.peer, among, place.what, why, advice))
        return self.error(place)

    def abandon(self, what: str, error: BaseException) -> None:
        """Tells the others that this rank has raised an exception in mid-call, and ends their waits for it."""
        why = f"raised {type(error).__name__}: {' '.join(str(error).split())[:REASON]}".rstrip(": .")
        self._tell(Loss(self.rank, self.rank, (self.rank,), what, why))
        self._linger(time.monotonic() + PATIENCE)

    def error(self, place: Place) -> TransportError:
        """What is known, in one line, on a rank that waits or would wait there."""
        loss, end = self.loss, time.monotonic() + PATIENCE
        assert loss is not None
        lost, why, said = self._lost(loss, end)
        if place.peer is not None and place.peer not in said:
            said[place.peer] = self._said(place.peer, end)
        who = ", ".join(map(str, lost)) or "another"
        own = "cannot go on" if lost == [self.rank] else f"lost rank {who}"
        if why == ENDED and lost and all(said[rank] for rank in lost):
            why = CUT
        found = "" if loss.teller == self.rank else f", as rank {loss.teller} found in {loss.where}"
        lines = [
            f"Rank {self.rank} of {self.size} {own} in {place}.",
            f"Rank {who} {why}{f' (in {loss.where})' if lost == [loss.teller] else found}{loss.advice}.",
            *(
                f"Rank {rank} was last in {place}."
                for rank, place in sorted(said.items())
                if place and rank not in (self.rank, loss.teller)
            ),
        ]
        if not self._store.there:
            host = "the process that hosts it" if self._host is None else f"rank {self._host}, which hosts it,"
            lines.append(f"The store of the run is gone too: {host} has ended or is frozen.")
        self._linger(end)
        return TransportError(" ".join(lines))

    def _lost(self, loss: Loss, end: float) -> tuple[list[int], str, dict[int, Place | None]]:
        """Which ranks are lost, why, and where those are that were asked."""
        if not self._store.there and self._host not in (None, self.rank):
            return [self._host], loss.why, {self._host: None}
        if loss.lost is None:
            said = {rank: self._said(rank, end) for rank in loss.among}
            silent = [rank for rank, place in said.items() if place is None]
            elsewhere = [rank for rank, place in said.items() if place and place.what != loss.where]
            return silent or elsewhere, loss.why, said
        lost, why, said = loss.lost, loss.why, {loss.lost: self._said(loss.lost, end)}
        while (place := said[lost]) and place.peer is not None and LATE in f"{place.why} {why}":
            if place.peer in (loss.teller, *said):
                break
            lost, why = place.peer, place.why or why  # of a live rank that waits for another
            said[lost] = self._said(lost, end)
        return [lost], why, said

    def _give_time(self) -> None:
        """Returns when there is news of another rank, or there has been time for it."""
        if said := self._awaited("first", time.monotonic() + GRACE):
            self._hear(Loss(**json.loads(said)))

    def _tell(self, loss: Loss) -> None:
        """To all ranks, unless another has told first."""
        self._hear(Loss(**json.loads(self._store.first(f"{self._key}/first", json.dumps(dataclasses.asdict(loss))))))

    def _hear(self, loss: Loss) -> None:
        if self.loss is None or self.place.why:
            self.loss = self.loss or loss
            self._store.write(f"{self._key}/{self.rank}", json.dumps(self.place))
            for group in self._groups:
                end_waits(group)

    def _said(self, rank: int, end: float) -> Place | None:
        """Where another rank is, by itself; None where it says nothing until then."""
        if rank == self.rank:
            return self.place
        said = self._awaited(str(rank), end)
        return Place(*json.loads(said)) if said else None

    def _awaited(self, key: str, end: float) -> str:
        """What is in the store, as soon as it is; nothing where nothing is until then."""
        said = self._store.read(f"{self._key}/{key}")
        while not said and self._store.there and time.monotonic() < end:
            time.sleep(0.02)
            said = self._store.read(f"{self._key}/{key}")
        return said

    def _linger(self, end: float) -> None:
        """Rank 0 may host the store: it stays until the others have heard."""
        for rank in range(1, self.size) if self.rank == 0 else ():
            self._said(rank, end)


def end_waits(group: dist.ProcessGroup) -> None:
    """Ends every wait of this rank in the group, and its peers' waits for it. The group is of no more use then."""
    if dist.get_backend(group) == "nccl":
        group.abort()
        return
    for peer in range(group.size()):
        if peer != group.rank():
            with contextlib.suppress(RuntimeError):  # the millisecond is over, or the peer has ended
                group.recv([torch.empty(1)], peer, TAG).wait(INSTANT)


def _reason(error: RuntimeError, timeout: float) -> tuple[str, str]:
    """What a backend's error says about the peer, and what to do."""
    words = str(error)
    lower = words.lower()
    if "timed out" in lower or "timeout" in lower:
        return f"{LATE} {timeout:g} s", ": look at what it was doing, or raise the timeout"
    if any(word in lower for word in ("closed", "reset", "refused", "broken pipe")):
        return ENDED, ""
    return f"could not be reached: {words.splitlines()[0] if words else type(error).__name__}", ""


def _watch(news: weakref.ref[News], stop: threading.Event) -> None:
    """Asks for news as long as somebody would hear them."""
    while not stop.wait(POLL):
        there = news()
        if there is None or not there.look():
            return
        del there


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(PATIENCE)
