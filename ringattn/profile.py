"""Profile: what `ringattn doctor` measured, in a file that `ringattn.init` gives to ``auto``.

One JSON object; a digest over its content tells a file that was cut short or edited from a whole one. It holds the
links of all ranks, by which ``auto`` chooses the schedule, and the rates of the kernels on rank 0's processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringattn.errors import InputError
from ringattn.kernels.store import Entry
from ringattn.plans.links import Floats, Links
from ringattn.transports.base import Transport

VERSION = 1
NAME = "ringattn profile"
MOST_BYTES = 1 << 28  # of a file
AGAIN = "Write it again with ringattn doctor --profile."


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Measured on one set of ranks.

    Attributes:
        transport: the name of what they talked over.
        latency, bandwidth: of each pair of ranks of the world, seconds and bytes a second, 0 on the diagonal; of no
            ranks where those that use it are others.
        entries: the rates of kernels.
    """

    transport: str
    latency: Floats
    bandwidth: Floats
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Ranks of the world that was measured."""
        return len(self.latency)

    @property
    def without_links(self) -> Profile:
        """The kernels' part."""
        return dataclasses.replace(self, latency=np.zeros((0, 0)), bandwidth=np.zeros((0, 0)))

    def links(self, ranks: range) -> Links | None:
        """Those between some ranks of the world; None where it has none."""
        if len(ranks) < 2 or ranks.stop > self.size:
            return None
        part = np.ix_(ranks, ranks)
        return Links(self.latency[part], self.bandwidth[part])

    def write(self, path: Path) -> None:
        """Replaces the file at once: whoever reads it finds the old one or the new one.

        Raises:
            InputError: it cannot be written.
        """
        try:
            handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=path.name, suffix=".new")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(self._text())
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    Path(name).unlink()
        except OSError as error:
            raise InputError(f"The profile {path} cannot be written: {os.strerror(error.errno or 0)}.") from error

    @classmethod
    def read(cls, path: Path) -> Profile:
        """What `write` wrote.

        Raises:
            InputError: there is no file, it cannot be read, or it is cut short, changed, of another version or kind.
        """
        if "\0" in str(path):
            raise InputError(f"No path holds a NUL character; got {str(path)!r} for the profile.")
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise InputError(f"The profile {path} is no file. {AGAIN}")
            with path.open("rb") as file:
                data = file.read(MOST_BYTES)
        except OSError as error:
            raise InputError(f"The profile {path} cannot be read: {os.strerror(error.errno or 0)}. {AGAIN}") from error
        return cls._parsed(data, f"{path} is no profile of ringattn")

    @classmethod
    def shared(cls, own: Profile | None, everyone: Transport) -> Profile:
        """Rank 0's, on all ranks, which call it together.

        Args:
            own: rank 0's; None on the others.
        """
        data = b"" if own is None else own._text().encode()
        (length,) = everyone.sum_numbers(len(data))
        numbers = torch.zeros(int(length), dtype=torch.int32)
        if own is not None:
            numbers += torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone.control.sum(numbers, label="the profile of rank 0")
        return cls._parsed(bytes(numbers.to(torch.uint8).numpy()), "Rank 0 sent no profile")

    def _text(self) -> str:
        content = {
            "transport": self.transport,
            "latency": self.latency.tolist(),
            "bandwidth": self.bandwidth.tolist(),
            "rates": [dataclasses.asdict(entry) for entry in self.entries],
        }
        return json.dumps({NAME: VERSION, "digest": _digest(content), "content": content}, indent=1)

    @classmethod
    def _parsed(cls, data: bytes, wrong: str) -> Profile:
        try:
            whole = json.loads(data)
            version, content = whole[NAME], whole["content"]
            if version != VERSION:
                raise InputError(f"{wrong} of version {VERSION}, but of {str(version)[:20]}. {AGAIN}")
            if whole["digest"] != _digest(content):
                raise ValueError("its digest is not that of its content")
            latency, bandwidth = _table(content["latency"]), _table(content["bandwidth"])
            if len(latency) != len(bandwidth):
                raise ValueError("its tables are of different ranks")
            return cls(str(content["transport"]), latency, bandwidth, tuple(map(Entry.from_values, content["rates"])))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"{wrong}, or is damaged ({type(error).__name__}: {str(error)[:80]}). {AGAIN}") from error


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _table(rows: Any) -> Floats:
    """A square of numbers, above 0 but for the diagonal."""
    table: Floats = np.array(rows, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise ValueError(f"a table of shape {table.shape}")
    others = table[~np.eye(len(table), dtype=bool)]
    if not all(map(math.isfinite, table.flat)) or (others <= 0).any():
        raise ValueError("a table with numbers that nobody measures")
    return table
