"""What a rank knows of itself without measuring."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import socket
from typing import Any

import torch

import ringattn
from ringattn.errors import InputError
from ringattn.kernels.machine import processor
from ringattn.rendezvous import Launch
from ringattn.runtime.agreement import exchanged
from ringattn.transports.base import Transport

SPACE = 4096  # bytes that a rank's facts take at most
EXTRAS = ("mpi4py", "deepspeed", "transformers", "triton", "matplotlib", "safetensors")


@dataclasses.dataclass(frozen=True)
class Facts:
    """One rank.

    Attributes:
        host, device, processor: by name.
        launcher, reason: as `Launch` has them.
        threads, cores: of PyTorch in this process, and that it may use.
        versions: of Python, PyTorch, ringattn and what it can use, by name.
        gpu_aware_mpi: None where there is no MPI.
    """

    host: str
    device: str
    processor: str
    launcher: str
    reason: str
    threads: int
    cores: int
    versions: dict[str, str]
    gpu_aware_mpi: bool | None

    @classmethod
    def here(cls, transport: Transport) -> Facts:
        """Those of this process."""
        try:
            launch = Launch.found(os.environ)
        except InputError as error:  # of a default group that the caller has made
            launch = Launch("unclear", str(error))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(
            socket.gethostname(),
            _device(transport.device),
            processor(),
            launch.launcher,
            launch.reason,
            torch.get_num_threads(),
            cores,
            _versions(),
            _gpu_aware() if transport.name == "mpi" else None,
        )


def of_all(transport: Transport, own: Facts) -> list[Facts]:
    """Every rank's, by rank."""
    text = json.dumps(dataclasses.asdict(own)).encode()
    if len(text) > SPACE:  # a reason may be long
        text = json.dumps(dataclasses.asdict(dataclasses.replace(own, reason=own.reason[:500]))).encode()
    return [Facts(**json.loads(each)) for each in exchanged(transport, text.ljust(SPACE), "doctor")]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found["ringattn"] = ringattn.__version__
    for name in EXTRAS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpu_aware() -> bool:
    from ringattn.transports.mpi import gpu_aware

    return gpu_aware()
