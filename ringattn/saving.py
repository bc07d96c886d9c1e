"""Saving masks, layouts, meshes and shardings with `torch.save`, and loading them with ``weights_only=True``."""

from __future__ import annotations

from typing import Any

from ringattn.layouts import Balanced, Contiguous, Explicit, Striped, Zigzag
from ringattn.masks import MEMBERS, And, Not, Or, Predicate
from ringattn.mesh import Mesh
from ringattn.sharding import Sharding


def safe_globals() -> list[Any]:
    """The classes of which masks and shardings are made, for ``torch.serialization.safe_globals``.

    A loaded sharding plans as the saved one did; its mesh has no transport. A `Predicate` holds a function, which no
    safe file may name: it is not among them.

    >>> import io, torch, ringattn
    >>> file = io.BytesIO()
    >>> torch.save({"mask": ringattn.Documents([3, 5]) & ringattn.Causal()}, file)
    >>> with torch.serialization.safe_globals(safe_globals()):
    ...     str(torch.load(io.BytesIO(file.getvalue()), weights_only=True)["mask"])
    'documents:3,5&causal'
    """
    masks = [member for member in MEMBERS if member is not Predicate]
    return [*masks, And, Or, Not, Contiguous, Zigzag, Striped, Balanced, Explicit, Mesh, Sharding]
