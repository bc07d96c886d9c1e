"""TorchDistributed: exchanges over a torch.distributed process group, Gloo on CPUs and NCCL on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ringattn.errors import TransportError
from ringattn.groups import new_group, timeout_of
from ringattn.transports.base import Message, Transport


class TorchDistributed(Transport):
    """Point-to-point exchanges in one batch over a process group.

    Args:
        group: the ranks that share a sequence. Its timeout bounds every wait.
        agreement: whether the ranks compare each call. On NCCL they do it over a Gloo group of the same ranks, while
            the GPU works.
    """

    def __init__(self, group: dist.ProcessGroup, agreement: bool = True) -> None:
        self.group = group
        super().__init__(dist.get_backend(group), dist.get_rank(group), dist.get_world_size(group), agreement)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.name == "nccl" else torch.device("cpu")

    @functools.cached_property
    def control(self) -> Transport:
        return self if self.name == "gloo" else self._over(dist.get_process_group_ranks(self.group), "gloo")

    def among(self, ranks: Sequence[int]) -> Transport:
        return self._over(ranks, self.name)

    def _over(self, ranks: Sequence[int], backend: str) -> TorchDistributed:
        return TorchDistributed(new_group(ranks, timeout_of(self.group), backend), self.agreement)

    def refusal(self, device: torch.device) -> str | None:
        if self.name == "gloo" and device.type != "cpu":
            return (
                f"Gloo exchanges CPU tensors; got tensors on {device}. Use the nccl backend, or move them to the CPU."
            )
        if self.name == "nccl" and device.type != "cuda":
            return f"NCCL exchanges CUDA tensors; got tensors on {device}. Use the gloo backend, or move them to a GPU."
        return None

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        # Receives first: on Gloo a send completes only when its receive is posted.
        messages = [*receives, *sends]
        kinds = [dist.irecv] * len(receives) + [dist.isend] * len(sends)
        operations = [
            dist.P2POp(kind, buffer, group=self.group, group_peer=peer)
            for kind, (peer, buffer) in zip(kinds, messages, strict=True)
        ]
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._failure(label, [peer for peer, _ in messages], error) from error

        def complete() -> None:
            for work, (peer, _) in zip(works, messages, strict=False):
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._failure(label, [peer], error) from error

        return complete

    def _sum(self, x: torch.Tensor, label: str) -> None:
        if x.device.type == "cpu" and self.control is not self:
            return self.control.sum(x, label=label)

        def complete() -> None:
            try:
                dist.all_reduce(x, group=self.group)
            except RuntimeError as error:
                others = [rank for rank in range(self.size) if rank != self.rank]
                raise self._failure(label, others, error) from error

        return self._collective(x, complete)

    def _failure(self, label: str, peers: list[int], error: RuntimeError) -> TransportError:
        """The backend's own words stay the error's cause."""
        who, words = ", ".join(map(str, sorted(set(peers)))), str(error)
        if "timed out" in words.lower() or "timeout" in words.lower():
            what = "It did not make the same call within the timeout: look at what it was doing, or raise the timeout"
        elif "closed" in words or "reset" in words or "refused" in words:
            what = "It has ended: its own output says why"
        else:
            what = f"{self.name} says: {words.splitlines()[0] if words else type(error).__name__}"
        return TransportError(
            f"Rank {self.rank} of {self.size} lost rank {who} during {label or 'an exchange'}. {what.rstrip('.')}."
        )
