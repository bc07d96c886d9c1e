"""Random bits as a hash of a seed and of global indices: splitmix64's finaliser, applied to one index after the other.

(Steele, Lea and Flood, OOPSLA 2014, figure 16.)
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Hashes: TypeAlias = NDArray[np.uint64]


def hashed(seed: int, *indices: ArrayLike) -> Hashes:
    """64 bits for each combination of the indices, a dim for each list of them."""
    bits: Hashes = np.full((1,) * len(indices), seed, dtype=np.uint64)
    for dim, index in enumerate(indices):
        shape = tuple(-1 if d == dim else 1 for d in range(len(indices)))
        step = np.asarray(index).astype(np.uint64).reshape(shape) + np.uint64(1)
        bits = _mixed(bits + step * np.uint64(0x9E3779B97F4A7C15))
    return bits


def _mixed(x: Hashes) -> Hashes:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
