"""The machine that kernels run on, as far as their speed depends on it."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ringattn.kernels.base import Kernel

_CPUINFO = Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What rates were measured on: with any other of these they are measured again.

    Attributes:
        processor: model and instruction set.
        threads: of PyTorch, in one process.
        torch: its version.
        kernels: ``name version`` of every kernel that was measured.
    """

    processor: str
    threads: int
    torch: str
    kernels: tuple[str, ...]

    @staticmethod
    def here(kernels: Sequence[Kernel]) -> Machine:
        """This machine, for these kernels."""
        versions = tuple(f"{kernel} {kernel.version}" for kernel in kernels)
        return Machine(processor(), torch.get_num_threads(), torch.__version__, versions)

    @property
    def is_here(self) -> bool:
        """Whether this is where we are, with any number of threads and any kernels."""
        return (self.processor, self.torch) == (processor(), torch.__version__)

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} thread{'s' * (self.threads != 1)}, PyTorch {self.torch}"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's model, and the instruction set that PyTorch uses of it.

    Clouds hide the model's name; family, model and stepping tell one generation from another.
    """
    try:
        first, _, _ = cpuinfo.read_text().partition("\n\n")
    except OSError:
        first = ""
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = known.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    numbers = [f"{key} {known[word]}" for key, word in _CPU_FIELDS if known.get(word)]
    return f"{name} ({', '.join([*numbers, torch.backends.cpu.get_cpu_capability()])})"


_CPU_FIELDS = (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))
