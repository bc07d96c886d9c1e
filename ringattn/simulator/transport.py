"""Simulator: virtual ranks in one process, with rendezvous semantics and checks that no network makes.

One thread a rank, and one baton: exactly one rank runs. It passes the baton on only when it waits for a message
that is not there, to the next rank in cyclic order that can go on. So a run is reproducible, and when nobody can
go on that is a deadlock, known at once.

A send completes when its receive is posted, as on Gloo and MPI. What is sent is checksummed when it is posted and
again when it completes, and receive buffers are filled with NaN until they are waited for: a program that writes
or reads a buffer in flight fails here, not on the cluster.

As processes have, every rank has a default random generator of its own: all begin in the caller's state, and the
caller goes on in that of rank 0. (PyTorch's CPU generator; others are the process's.)
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import zlib
from collections.abc import Callable, Sequence

import torch

from ringattn.errors import DeadlockError, InFlightError, TransportError
from ringattn.transports.base import Message, Transport


class Abandoned(BaseException):
    """Ends a virtual rank because another one failed. Not an Exception, so that no handler keeps the rank alive."""


def _checksum(buffer: torch.Tensor) -> int:
    return zlib.adler32(buffer.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)


def _poison(buffer: torch.Tensor) -> None:
    """NaN where the dtype has it, all bits set elsewhere."""
    buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer.view(torch.uint8).fill_(255)


@dataclasses.dataclass(eq=False)
class _Post:
    """One side of a message: posted, then matched with the other side."""

    sender: int
    receiver: int
    sending: bool
    buffer: torch.Tensor
    label: str
    checksum: int
    payload: torch.Tensor | None = None
    matched: bool = False

    def __str__(self) -> str:
        side = f"to send to rank {self.receiver}" if self.sending else f"to receive from rank {self.sender}"
        return f"waits in {self.label or 'an exchange'} {side} ({self.buffer.nbytes} bytes)"

    @property
    def owner(self) -> int:
        return self.sender if self.sending else self.receiver

    @property
    def peer(self) -> int:
        return self.receiver if self.sending else self.sender

    def unharmed(self) -> None:
        """Raises when the buffer was written since it was posted."""
        if _checksum(self.buffer) != self.checksum:
            what = "sends" if self.sending else "receives into"
            raise InFlightError(
                f"Rank {self.owner} wrote a buffer in flight: {self.label or 'an exchange'} still {what} it "
                f"({'to' if self.sending else 'from'} rank {self.peer}). Wait for the exchange first."
            )


class Hub:
    """Where the virtual ranks of one simulation meet: the baton and the posted messages."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.failure: BaseException | None = None
        self.failed_rank = -1
        self._posts: dict[tuple[int, int, bool], collections.deque[_Post]] = collections.defaultdict(collections.deque)
        self._blocked: dict[int, list[_Post]] = {}
        self._finished: set[int] = set()
        self._go = [threading.Semaphore(0) for _ in range(size)]
        self._random = [torch.get_rng_state()] * size

    # -- the baton ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Gives the baton to rank 0."""
        self._go[0].release()

    def begin(self, rank: int) -> None:
        """Waits for the rank's first turn."""
        self._take(rank)

    def end(self) -> None:
        """Leaves the caller with rank 0's random state."""
        torch.set_rng_state(self._random[0])

    def finish(self, rank: int, failure: BaseException | None) -> None:
        """The rank is done, or failed; the first failure is the one reported and ends all others."""
        self._finished.add(rank)
        if failure is not None and not isinstance(failure, Abandoned) and self.failure is None:
            self.failure, self.failed_rank = failure, rank
        self._pass_on(rank)

    def wait(self, rank: int, posts: list[_Post]) -> None:
        """Blocks the rank until all its posts are matched."""
        while not all(post.matched for post in posts):
            self._blocked[rank] = posts
            self._pass_on(rank)
            try:
                self._take(rank)
            finally:
                del self._blocked[rank]

    def _take(self, rank: int) -> None:
        self._go[rank].acquire()
        torch.set_rng_state(self._random[rank])
        if self.failure is not None:
            raise Abandoned

    def _ready(self, rank: int) -> bool:
        if rank in self._finished:
            return False
        return self.failure is not None or all(post.matched for post in self._blocked.get(rank, []))

    def _pass_on(self, rank: int) -> None:
        self._random[rank] = torch.get_rng_state()
        turns = [(rank + step) % self.size for step in range(1, self.size + 1)]
        following = next((peer for peer in turns if self._ready(peer)), None)
        if following is None and self._blocked:
            self.failure, self.failed_rank = DeadlockError(self._deadlock()), min(self._blocked)
            following = next(peer for peer in turns if peer not in self._finished)
        if following is not None:
            self._go[following].release()

    def _deadlock(self) -> str:
        waiting = {rank: next(p for p in posts if not p.matched) for rank, posts in sorted(self._blocked.items())}
        lines = [f"  rank {rank} {post}" for rank, post in waiting.items()]
        lines += [f"  rank {rank} has finished" for rank in sorted(self._finished)]
        path, rank = [], min(waiting)
        while rank in waiting and rank not in path:
            path.append(rank)
            rank = waiting[rank].peer
        end = (
            f"cycle: {' -> '.join(map(str, [*path[path.index(rank) :], rank]))}"
            if rank in path
            else (f"rank {path[-1]} waits for rank {rank}, which has finished")
        )
        return "\n".join(["Deadlock: no virtual rank can go on.", *lines, f"  {end}"])

    # -- the messages -------------------------------------------------------------------------------------------

    def post(self, sender: int, receiver: int, sending: bool, buffer: torch.Tensor, label: str) -> _Post:
        """Posts one side of a message and matches it with the first of the other side, if there is one."""
        if not sending:
            _poison(buffer)
        post = _Post(sender, receiver, sending, buffer, label, _checksum(buffer))
        others = self._posts[sender, receiver, not sending]
        if others:
            other = others.popleft()
            self._match(post, other) if sending else self._match(other, post)
        else:
            self._posts[sender, receiver, sending].append(post)
        return post

    @staticmethod
    def _match(send: _Post, receive: _Post) -> None:
        if send.buffer.dtype != receive.buffer.dtype or send.buffer.nbytes != receive.buffer.nbytes:
            raise TransportError(
                f"Rank {send.sender} sends {send.buffer.nbytes} bytes of {send.buffer.dtype} in "
                f"{send.label or 'an exchange'}, but rank {receive.receiver} receives {receive.buffer.nbytes} bytes of "
                f"{receive.buffer.dtype} in {receive.label or 'an exchange'}."
            )
        send.unharmed()
        receive.payload = send.buffer.detach().reshape(-1).clone()
        send.matched = receive.matched = True

    def unreceived(self) -> str | None:
        """Messages that were posted and never met their other side, in words."""
        left = [post for posts in self._posts.values() for post in posts]
        return "\n".join(f"  rank {post.owner} {post}" for post in left) or None


class Simulator(Transport):
    """One virtual rank's transport."""

    def __init__(self, hub: Hub, rank: int, agreement: bool = True) -> None:
        super().__init__("simulator", rank=rank, size=hub.size, agreement=agreement)
        self._hub = hub

    def refusal(self, device: torch.device) -> str | None:
        return None

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        hub, rank = self._hub, self.rank
        posts = [hub.post(peer, rank, False, buffer, label) for peer, buffer in receives]
        posts += [hub.post(rank, peer, True, buffer, label) for peer, buffer in sends]

        def complete() -> None:
            hub.wait(rank, posts)
            for post in posts:
                post.unharmed()
                if post.payload is not None:
                    post.buffer.view(-1).copy_(post.payload)

        return complete
