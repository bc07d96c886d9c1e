"""The states of random number generators, saved of every rank and given back to the ranks that take its place."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.mesh import Mesh
from ringattn.training.storage import Manifest

# Python and NumPy have their states in words of 32 bits and one float: a tensor of float64 holds both exactly.


def tensors(rank: int) -> dict[str, Tensor]:
    """This rank's states, by names of its own."""
    return {f"random/{rank}/{name}": state for name, state in _states().items()}


def digest() -> str:
    """By which ranks tell whether they draw the same numbers."""
    return hashlib.blake2b(_states()["torch"].numpy().tobytes(), digest_size=8).hexdigest()


def outline(mesh: Mesh, said: list[tuple[int, str]]) -> dict[str, Any]:
    """For the manifest: the axes, and whether the ranks of each sequence drew the same numbers.

    Args:
        said: of every rank its replica and its `digest`.
    """
    first: dict[int, str] = {}
    together = all(first.setdefault(replica, text) == text for replica, text in said)
    return {"axes": mesh.axes, "together": together}


def targets(manifest: Manifest, mesh: Mesh) -> dict[str, Tensor]:
    """Where to load the states that this rank takes over: none, where no saved rank was in its place."""
    source = _source(manifest, mesh)
    names = [] if source is None else [f"random/{source}/{name}" for name in _states()]
    found = {name: manifest.tensors[name] for name in names if name in manifest.tensors}
    return {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in found.items()}


def adopt(loaded: Mapping[str, Tensor], manifest: Manifest, mesh: Mesh) -> None:
    """Sets the states; derives new ones from the checkpoint and this rank's place, where there are none."""
    place, places = (_replica(mesh), mesh.data) if _together(manifest) else (mesh.rank, mesh.size)
    text = f"{manifest.checksum} {place} {places}"
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    if not loaded:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (datasets draw from it)
    for name, state in loaded.items():
        _SET[name.rpartition("/")[2]](state)


def _source(manifest: Manifest, mesh: Mesh) -> int | None:
    """The saved rank whose place this one has."""
    axes = manifest.content["random"]["axes"]
    if _together(manifest):  # any rank of a sequence stands for all
        return _replica(mesh) * axes["ring"] * axes["ulysses"] if axes["data"] == mesh.data else None
    return mesh.rank if axes == mesh.axes else None


def _together(manifest: Manifest) -> bool:
    return bool(manifest.content["random"]["together"])


def _replica(mesh: Mesh) -> int:
    return mesh.coordinates["data"]


def _states() -> dict[str, Tensor]:
    found = {"torch": torch.get_rng_state(), "numpy": _numpy(), "python": _python()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _numpy() -> Tensor:
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    return torch.tensor([*state[1], *state[2:]], dtype=torch.float64)


def _set_numpy(state: Tensor) -> None:
    *words, position, has_gauss, gauss = state.tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), int(position), int(has_gauss), gauss))  # noqa: NPY002


def _python() -> Tensor:
    _, words, gauss = random.getstate()
    return torch.tensor([*words, float("nan") if gauss is None else gauss], dtype=torch.float64)


def _set_python(state: Tensor) -> None:
    *words, gauss = state.tolist()
    random.setstate((3, tuple(map(int, words)), None if gauss != gauss else gauss))


_SET: dict[str, Callable[[Tensor], None]] = {
    "torch": torch.set_rng_state,
    "numpy": _set_numpy,
    "python": _set_python,
    "cuda": torch.cuda.set_rng_state,
}
