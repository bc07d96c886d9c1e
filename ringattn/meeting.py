"""How the ranks of a run meet, and learn whether they were started alike, before any group is made.

Groups are made of what `ringattn.init` was asked for: ranks that ask for other ones would wait for each other, or end
in an error of the store that names neither. So every rank puts its arguments into the store, rank 0 compares them, and
all read what it found.

torchrun's agents keep one store over all restarts of the ranks, so it may hold what ranks that are gone have said, in a
world of another size. Each meeting therefore has a name, drawn by rank 0 and looked for again while others wait: what
was said under an old name reaches nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from ringattn.checking import shown
from ringattn.errors import AgreementError, InputError, TransportError
from ringattn.readable import differing, shortened
from ringattn.rendezvous import Launch
from ringattn.runtime.agreement import exchanged
from ringattn.transports.base import Transport
from ringattn.transports.news import News

BYTES = 2048  # of what a rank says over a transport
FAREWELL = datetime.timedelta(seconds=10)  # for which a failing rank 0 keeps the store open
OFTEN, SELDOM = 1e-3, 0.2  # seconds between two looks at the store: first, and when one of a thousand ranks is late
NAME = "ringattn/meeting"
HOST = "host"  # beside a rank's arguments


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where this rank meets the others.

    Attributes:
        limit: after which a wait for another rank is an error.
        host: the rank that keeps the store; None where another process does, or nobody knows.
        local_rank: among the ranks of this host, where the launcher said so.
        node: how many neighbouring ranks share a host, as `agree` finds; None where all do, or not as many on each.
    """

    store: Store
    rank: int
    world: int
    limit: datetime.timedelta
    local_rank: int = 0
    host: int | None = None
    node: int | None = None

    @classmethod
    def found(cls, launch: Launch, transport: str, limit: datetime.timedelta) -> Meeting:
        """That of the default process group, or of the launcher.

        Raises:
            InputError: there is neither.
            TransportError: the store cannot be reached.
        """
        if dist.is_initialized():
            return cls(_get_default_store(), dist.get_rank(), dist.get_world_size(), limit)
        if not launch.started:
            raise InputError(
                f"transport={transport!r} needs a launcher's environment; RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT "
                f"is not set. Start with torchrun --nproc-per-node N, or use transport='local'."
            )
        if launch.address is None or launch.port is None:
            raise InputError(
                f"transport={transport!r} needs to know where rank 0 is, and {launch.launcher} does not say: give all "
                f"ranks MASTER_ADDR and MASTER_PORT (mpirun -x NAME=VALUE, or -genv NAME VALUE), or use "
                f"transport='mpi'."
            )
        store = _store(launch, launch.address, launch.port, limit)
        return cls(store, launch.rank, launch.world, limit, launch.local_rank, None if launch.agent else 0)

    def agree(self, given: Mapping[str, object], refusal: InputError | None, here: str) -> Meeting:
        """Compares this rank's arguments with those of all others; every rank calls it, in the same order.

        Args:
            refusal: why this rank will not start, if it will not. It is raised when the others have been told.
            here: the name of this rank's host.

        Returns:
            this meeting with a store of its own, which holds nothing yet, and with its `node`.

        Raises:
            AgreementError: on every rank, naming the ranks and the values that differ, or the rank that refuses.
            TransportError: a rank did not come.
        """
        said = {name: shown(value) for name, value in given.items()}
        if refusal is not None:
            said = {"refusal": f"{type(refusal).__name__}: {refusal}"}
        own = json.dumps({**said, HOST: here})
        try:
            name, verdict = self._judged(own) if self.rank == 0 else self._heard(own)
        except RuntimeError as error:
            late = f"no other called init as it did, within {self.limit.total_seconds():g} seconds"
            why = late if isinstance(error, dist.DistStoreError) else str(error)
            raise TransportError(f"Rank {self.rank} lost the others as they started: {why}.") from error
        if refusal is not None:
            raise refusal
        if verdict["missing"]:
            raise TransportError(verdict["missing"])
        if verdict["different"]:
            raise AgreementError(verdict["different"])
        return dataclasses.replace(self, store=PrefixStore(name, self.store), node=verdict["node"])

    def news(self) -> News:
        """By which its ranks tell each other of one that is lost."""
        return News(self.store, "news", self.rank, self.world, self.host)

    def _judged(self, said: str) -> tuple[str, dict[str, Any]]:
        """Rank 0's part: what is wrong, told to all."""
        key = f"{NAME}/{uuid.uuid4()}"
        self.store.set(f"{key}/0", said)
        self.store.set(NAME, key)
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        verdict: dict[str, Any] = {"missing": "", "different": "", "node": None}
        absent: list[int] = []
        try:
            self.store.wait(keys, self.limit)
            heard = [json.loads(self.store.get(each)) for each in keys]
            verdict["node"] = sharing([each.pop(HOST) for each in heard])
            verdict["different"] = _difference(heard)
        except dist.DistStoreError:
            absent = [rank for rank, each in enumerate(keys) if not self.store.check([each])]
            names = ", ".join(map(str, absent))
            verdict["missing"] = f"Rank {names} did not start within {self.limit.total_seconds():g} seconds."
        self.store.set(f"{key}/verdict", json.dumps(verdict))
        if verdict["missing"] or verdict["different"]:
            with contextlib.suppress(RuntimeError):
                self.store.wait([f"{key}/read/{rank}" for rank in range(1, self.world) if rank not in absent], FAREWELL)
        return key, verdict

    def _heard(self, said: str) -> tuple[str, dict[str, Any]]:
        """The others' part: what rank 0 found."""
        key = self._joined(said)
        verdict: dict[str, Any] = json.loads(self.store.get(f"{key}/verdict"))
        self.store.set(f"{key}/read/{self.rank}", "")
        return key, verdict

    def _joined(self, said: str) -> str:
        """Says it in the meeting that rank 0 holds; its name, when it has been judged."""
        # Looks, and no waits with a limit of their own: at each of these that passes torch prints warnings.
        deadline, spoken, pause = time.monotonic() + (self.limit + FAREWELL).total_seconds(), "", OFTEN
        self.store.wait([NAME], self.limit)
        while time.monotonic() < deadline:
            key = self.store.get(NAME).decode()
            if spoken and self.store.check([f"{spoken}/verdict"]):
                return spoken  # though rank 0 may hold the next one by now
            if key != spoken and not self.store.check([f"{key}/verdict"]):  # else, without this rank: one that is over
                self.store.set(f"{key}/{self.rank}", said)
                spoken, pause = key, OFTEN
            time.sleep(pause)
            pause = min(2 * pause, SELDOM)
        raise TransportError(f"Rank {self.rank} heard nothing of rank 0 within {self.limit.total_seconds():g} seconds.")


def sharing(hosts: Sequence[str]) -> int | None:
    """How many neighbouring ranks share a host, given each rank's; None where all do, or not as many on each host.

    >>> sharing(["a", "a", "b", "b"]), sharing(["a", "b", "a", "b"]), sharing(["a", "a"])
    (2, None, None)
    """
    runs = [len(list(run)) for _, run in itertools.groupby(hosts)]
    equal = len({*runs}) == 1 and len(runs) == len({*hosts})
    return runs[0] if equal and len(runs) > 1 else None


def agree_over(transport: Transport, given: Mapping[str, object], refusal: InputError | None, here: str) -> int | None:
    """Compares this rank's arguments with those of all others over a transport, where there is no store.

    Returns:
        how many neighbouring ranks share a host: see `sharing`.

    Raises:
        AgreementError: on every rank, naming the ranks and the values that differ, or the rank that refuses.
    """
    said = {name: shortened(shown(value)) for name, value in given.items()}
    if refusal is not None:
        said = {"refusal": shortened(f"{type(refusal).__name__}: {refusal}", BYTES // 2)}
    own = json.dumps({**said, HOST: shortened(here)}).encode().ljust(BYTES)
    heard = [json.loads(text) for text in exchanged(transport, own, "init")]
    node = sharing([each.pop(HOST) for each in heard])
    different = _difference(heard)
    if refusal is not None:
        raise refusal
    if different:
        raise AgreementError(different)
    return node


def _store(launch: Launch, address: str, port: int, limit: datetime.timedelta) -> Store:
    """The store of the launcher's agent, or the one that rank 0 keeps."""
    server = launch.rank == 0 and not launch.agent
    try:  # nobody waits here for all the others: who is missing is told by name
        return TCPStore(address, port, launch.world, server, limit, wait_for_workers=False, multi_tenant=server)
    except RuntimeError as error:  # of torch's stores
        whose = f"{launch.launcher}'s agent" if launch.agent else "rank 0"
        raise TransportError(
            f"The ranks could not meet at {address}:{port}, where {whose} keeps their store: {error}"
        ) from error


def _difference(said: list[dict[str, Any]]) -> str:
    """In which arguments the ranks differ, or which of them refuse, in words; empty where all are alike."""
    refused = [
        f"Rank {rank} refused to start: {each['refusal']}" for rank, each in enumerate(said) if "refusal" in each
    ]
    if refused:
        return " ".join(refused)
    different = differing(said, said[0])
    if not different:
        return ""
    return (
        f"The ranks called init with different arguments: they differ in {different}. "
        f"Call it with the same ones on every rank."
    )
