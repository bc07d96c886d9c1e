"""The store of rates: one JSON file in the user's cache directory, shared by all processes of a machine.

Whatever goes wrong with it, a directory that cannot be written, a file that cannot be read, costs a measurement and
nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ringattn.kernels.machine import Machine
from ringattn.kernels.rates import Rates, Workload

LOCK_SECONDS = 30.0
"""Seconds a process waits at most while another one of the machine measures."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured, and where."""

    machine: Machine
    rates: Rates

    @property
    def subject(self) -> tuple[Machine, Workload]:
        """What the rates are of, whichever versions of kernels they compare."""
        return dataclasses.replace(self.machine, kernels=()), self.rates.workload

    @staticmethod
    def from_values(values: Any) -> Entry:
        """An entry as ``dataclasses.asdict`` and JSON leave it.

        Raises:
            KeyError, TypeError, ValueError or OverflowError: it is none.
        """
        machine, rates = values["machine"], values["rates"]
        workload = Workload(**rates["workload"])
        seconds = tuple((str(name), float(each)) for name, each in rates["seconds"])
        names = {kernel.rpartition(" ")[0] for kernel in machine["kernels"]}
        if (
            not seconds
            or {name for name, _ in seconds} != names
            or not all(math.isfinite(each) and each > 0 for _, each in seconds)
        ):
            raise ValueError(f"no rates: {seconds}")
        return Entry(Machine(**{**machine, "kernels": tuple(machine["kernels"])}), Rates(workload, seconds))


@dataclasses.dataclass(frozen=True)
class Store:
    """The file of rates.

    Attributes:
        path: the file, which need not exist; None where the user has no directory for it: nothing is kept then.
        wait: seconds to wait at most while another process measures.
    """

    path: Path | None
    wait: float = LOCK_SECONDS

    @staticmethod
    def of_user() -> Store:
        """In the user's cache directory, ``$XDG_CACHE_HOME`` or ``~/.cache``."""
        configured = os.environ.get("XDG_CACHE_HOME", "")
        try:
            folder = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return Store(None)
        return Store(folder / "ringattn" / "kernels.json")

    def entries(self) -> list[Entry]:
        """All that is kept; nothing where the file is missing or is not what `keep` writes."""
        try:
            if self.path is None or not self.path.is_file():  # a pipe would be waited for
                return []
            return [Entry.from_values(x) for x in json.loads(self.path.read_text())["rates"]]
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return []

    def find(self, machine: Machine, workload: Workload) -> Rates | None:
        """The rates of this class of problems on this machine."""
        found = (x.rates for x in self.entries() if x.machine == machine and x.rates.workload == workload)
        return next(found, None)

    def keep(self, entry: Entry) -> None:
        """Adds an entry, in place of one on the same subject. An interrupted write leaves the old file."""
        others = [x for x in self.entries() if x.subject != entry.subject]
        kept = [dataclasses.asdict(x) for x in (*others, entry)]
        with contextlib.suppress(OSError):
            self._write(json.dumps({"rates": kept}, indent=1))

    def clear(self) -> int:
        """Forgets everything. Returns how many entries there were.

        Raises:
            OSError: the file cannot be removed.
        """
        count = len(self.entries())
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        return count

    def found_or_measured(self, machine: Machine, workload: Workload, measure: Callable[[], Rates]) -> Rates:
        """The rates that are kept or, where there are none, those of a measurement, which are kept from now on.

        One process of a machine measures at a time; those that waited find what it has kept.
        """
        found = self.find(machine, workload)
        if found is not None:
            return found
        with self._alone():
            found = self.find(machine, workload)
            if found is None:
                found = measure()
                self.keep(Entry(machine, found))
        return found

    def _write(self, text: str) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".new")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            Path(name).replace(self.path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock of the file's folder, where it can be had; not for longer than `wait` is it waited for."""
        from filelock import FileLock

        with contextlib.ExitStack() as stack:
            if self.path is not None:
                # Timeout is an OSError; NotImplementedError is a file system without locks
                with contextlib.suppress(OSError, NotImplementedError):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(f"{self.path}.lock", timeout=self.wait))
            yield
