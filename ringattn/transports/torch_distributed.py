"""TorchDistributed: exchanges over a torch.distributed process group, Gloo on CPUs and NCCL on GPUs."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ringattn.declared import Collective
from ringattn.errors import TransportError
from ringattn.groups import new_group, timeout_of
from ringattn.transports.base import Message, Transport
from ringattn.transports.news import News, Place


class TorchDistributed(Transport):
    """Point-to-point exchanges in one batch over a process group.

    Args:
        group: the ranks that share a sequence. Its timeout bounds every wait.
        agreement: whether the ranks compare each call. On NCCL they do it over a Gloo group of the same ranks, while
            the GPU works.
        news: of lost ranks in the whole run; None for those of this group alone.
    """

    def __init__(self, group: dist.ProcessGroup, agreement: bool = True, news: News | None = None) -> None:
        self.group = group
        self.news = News.of(group) if news is None else news
        self.news.follow(group)
        self._world = dist.get_process_group_ranks(group)
        super().__init__(dist.get_backend(group), dist.get_rank(group), dist.get_world_size(group), agreement)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.name == "nccl" else torch.device("cpu")

    @functools.cached_property
    def control(self) -> Transport:
        return self if self.name == "gloo" else self._over(dist.get_process_group_ranks(self.group), "gloo")

    def among(self, ranks: Sequence[int], limit: datetime.timedelta | None = None) -> Transport:
        return self._over(ranks, self.name, limit)

    def _over(self, ranks: Sequence[int], backend: str, limit: datetime.timedelta | None = None) -> TorchDistributed:
        group = new_group(ranks, limit or timeout_of(self.group), backend)
        return TorchDistributed(group, self.agreement, self.news)

    def refusal(self, device: torch.device) -> str | None:
        if self.name == "gloo" and device.type != "cpu":
            return (
                f"Gloo exchanges CPU tensors; got tensors on {device}. Use the nccl backend, or move them to the CPU."
            )
        if self.name == "nccl" and device.type != "cuda":
            return f"NCCL exchanges CUDA tensors; got tensors on {device}. Use the gloo backend, or move them to a GPU."
        return None

    def abandon(self, error: BaseException) -> None:
        self.news.abandon(self.doing, error)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        if self.news.loss is not None:
            raise self.news.error(Place(label))
        works: list[dist.Work] = []
        peers = [peer for peer, _ in (*receives, *sends)]
        try:
            self._post(sends, receives, works)
        except RuntimeError as error:
            raise self._failure(label, peers[min(len(works), len(peers) - 1)], error) from error

        def complete() -> None:
            for work, peer in zip(works, peers, strict=False):
                self.news.place = Place(label, self._world[peer])
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._failure(label, peer, error) from error
            self.news.place = Place(label)

        return complete

    def _start_collective(
        self, collective: Collective, sends: Sequence[Message], receives: Sequence[Message], label: str
    ) -> Callable[[], None]:
        """NCCL's own, which take unequal shares too; Gloo's are slower than messages.

        Of an all-gather, equal shares lie in memory of its own until they are all there. An all-to-all is messages that
        start together; what a rank would send to itself is nothing, and stays here.
        """
        if self.name != "nccl":
            return self._start(sends, receives, label)
        if self.news.loss is not None:
            raise self.news.error(Place(label))
        sent, received, (_, own) = dict(sends), dict(receives), sends[0]
        nothing = own.view(-1)[:0]
        try:
            if collective == "all_gather":  # into its own place a rank may write what lies there
                every = [received.get(rank, own) for rank in range(self.size)]
                work = dist.all_gather(every, own, group=self.group, async_op=True)
            else:
                into, every = ([x.get(rank, nothing) for rank in range(self.size)] for x in (received, sent))
                work = dist.all_to_all(into, every, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self._failure(label, None, error) from error

        def complete() -> None:
            self.news.place = Place(label)
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failure(label, None, error) from error

        return complete

    def _post(self, sends: Sequence[Message], receives: Sequence[Message], works: list[dist.Work]) -> None:
        """Receives first: on Gloo a send completes only when its receive is posted."""
        if self.name == "nccl":
            moves = [*((dist.irecv, *each) for each in receives), *((dist.isend, *each) for each in sends)]
            operations = [dist.P2POp(move, x, group=self.group, group_peer=peer) for move, peer, x in moves]
            works += dist.batch_isend_irecv(operations)
        else:
            for peer, x in receives:
                works.append(self.group.recv([x], peer, 0))
            for peer, x in sends:
                works.append(self.group.send([x], peer, 0))

    def _sum(self, x: torch.Tensor, label: str) -> None:
        if x.device.type == "cpu" and self.control is not self:
            return self.control.sum(x, label=label)

        def complete() -> None:
            self.news.place = Place(label)
            try:
                dist.all_reduce(x, group=self.group)
            except RuntimeError as error:
                raise self._failure(label, None, error) from error

        if self.news.loss is not None:
            raise self.news.error(Place(label))
        return self._collective(x, complete)

    def _failure(self, label: str, peer: int | None, error: RuntimeError) -> TransportError:
        """The backend's own words stay the error's cause."""
        place = Place(label or "an exchange", None if peer is None else self._world[peer])
        return self.news.failed(place, self._world, error, timeout_of(self.group).total_seconds())
