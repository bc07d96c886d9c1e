"""How tiles are computed on a device: `base` is the contract, one file a member; `choice` picks one by measurement.

To add a kernel, write one class and its line in ``MEMBERS``: names, error texts and the choice follow from it.
"""

from ringattn.kernels.base import Kernel
from ringattn.kernels.chunked import Chunked
from ringattn.kernels.onednn import OneDNN
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa

MEMBERS: tuple[type[Kernel], ...] = (Sdpa, OneDNN, Chunked, Reference)
"""What ``auto`` chooses from. Where nothing is measured, as for small calls, it takes the first that can: `Sdpa` takes
the least to start. The last can do everything."""

__all__ = ["MEMBERS", "Chunked", "Kernel", "OneDNN", "Reference", "Sdpa"]
