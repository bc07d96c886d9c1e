"""How the ranks of a run find each other, and learn whether they were started alike, before any group is made.

Groups are made of what `ringattn.init` was asked for: ranks that ask for other ones would wait for each other, or end
in an error of the store that names neither. So every rank puts its arguments into the store, rank 0 compares them, and
all read what it found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from ringattn.checking import shown
from ringattn.errors import AgreementError, InputError, TransportError
from ringattn.readable import differing

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FAREWELL = datetime.timedelta(seconds=10)  # for which a failing rank 0 keeps the store open


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """Where this rank meets the others.

    Attributes:
        limit: after which a wait for another rank is an error.
    """

    store: Store
    rank: int
    world: int
    limit: datetime.timedelta

    @classmethod
    def found(cls, transport: str, limit: datetime.timedelta) -> Rendezvous:
        """That of the default process group, or of the launcher's environment.

        Raises:
            InputError: there is neither.
            TransportError: the store cannot be reached.
        """
        if dist.is_initialized():
            return cls(_get_default_store(), dist.get_rank(), dist.get_world_size(), limit)
        _check_environment(transport)
        try:
            store, rank, world = next(iter(rendezvous("env://", timeout=limit)))
        except RuntimeError as error:  # of torch's stores
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise TransportError(f"The ranks could not meet at {where}: {error}") from error
        return cls(store, rank, world, limit)

    def agree(self, given: Mapping[str, object], refusal: InputError | None) -> None:
        """Compares this rank's arguments with those of all others; every rank calls it, in the same order.

        Args:
            refusal: why this rank will not start, if it will not. It is raised when the others have been told.

        Raises:
            AgreementError: on every rank, naming the ranks and the values that differ, or the rank that refuses.
            TransportError: a rank did not come.
        """
        key = f"ringattn/init/{self.store.add(f'ringattn/init/{self.rank}', 1)}"
        said = {name: shown(value) for name, value in given.items()}
        if refusal is not None:
            said = {"refusal": f"{type(refusal).__name__}: {refusal}"}
        try:
            self.store.set(f"{key}/{self.rank}", json.dumps(said))
            verdict = self._judged(key) if self.rank == 0 else self._read(key)
        except RuntimeError as error:
            raise TransportError(f"Rank {self.rank} lost the others as they started: {error}") from error
        if refusal is not None:
            raise refusal
        if verdict["missing"]:
            raise TransportError(verdict["missing"])
        if verdict["different"]:
            raise AgreementError(verdict["different"])

    def _judged(self, key: str) -> dict[str, str]:
        """Rank 0's part: what is wrong, told to all."""
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        verdict = {"missing": "", "different": ""}
        try:
            self.store.wait(keys, self.limit)
            verdict["different"] = _difference([json.loads(self.store.get(each)) for each in keys])
        except dist.DistStoreError:
            absent = ", ".join(str(rank) for rank, each in enumerate(keys) if not self.store.check([each]))
            verdict["missing"] = f"Rank {absent} did not start within {self.limit.total_seconds():g} seconds."
        self.store.set(f"{key}/verdict", json.dumps(verdict))
        if any(verdict.values()):
            with contextlib.suppress(RuntimeError):
                self.store.wait([f"{key}/read/{rank}" for rank in range(1, self.world)], FAREWELL)
        return verdict

    def _read(self, key: str) -> dict[str, str]:
        self.store.wait([f"{key}/verdict"], self.limit + FAREWELL)
        verdict: dict[str, str] = json.loads(self.store.get(f"{key}/verdict"))
        self.store.set(f"{key}/read/{self.rank}", "")
        return verdict


def _check_environment(transport: str) -> None:
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise InputError(
            f"transport={transport!r} needs a launcher's environment; {', '.join(missing)} is not set. "
            f"Start with torchrun --nproc-per-node N, or use transport='local'."
        )
    limits = {"WORLD_SIZE": (1, 1 << 31), "RANK": (0, 1 << 31), "MASTER_PORT": (0, 1 << 16)}
    values = {}
    for name, (least, below) in limits.items():
        text = os.environ[name]
        values[name] = int(text) if text.isdecimal() else -1
        if not least <= values[name] < below:
            raise InputError(f"{name} in the environment is a number from {least} to below {below}; got {text!r}.")
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise InputError(
            f"RANK in the environment is below WORLD_SIZE, which is {values['WORLD_SIZE']}; got {values['RANK']}."
        )


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
