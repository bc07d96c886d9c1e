"""How the ranks of a batch meet: they compare their samples, or exchange them, and count their labels."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import torch
from torch import Tensor

from ringattn.errors import AgreementError
from ringattn.mesh import Mesh
from ringattn.readable import differing, shortened
from ringattn.runtime.agreement import alike, exchanged
from ringattn.sharding import Sharding
from ringattn.training.sample import Sample

_BYTES = 1024  # of what a rank says of its sample
_REFUSAL = 400  # characters


@dataclasses.dataclass(frozen=True)
class Outline:
    """What the ranks of a sequence know of each other's samples, when each has one of its own.

    Attributes:
        documents: of each rank, the lengths of its documents.
        count: tokens of all of them that have a label.
    """

    documents: list[list[int]]
    count: int

    @property
    def bounds(self) -> list[int]:
        """Where each rank's tokens begin in the long sequence, and where the last one's end."""
        return list(itertools.accumulate(map(sum, self.documents), initial=0))


def compared(mesh: Mesh, sample: Sample | None, layout: str, error: Exception | None) -> Exception | None:
    """What is wrong with the samples of a sequence: this rank's own error, or how they differ."""
    said = _said(mesh, {**sample.words, "layout": shortened(layout)} if sample else {}, error)
    if isinstance(said, Exception):
        return said
    different = differing(said, ("shape", "tokens", "labels", "mask", "layout"))
    if not different:
        return None
    return AgreementError(
        f"The ranks that share a sequence have different samples: they differ in {different}. Give all of them the "
        f"same (shuffle and seed workers by mesh.coordinates['data']), or pass scatter=True where each loads its own."
    )


def outlined(mesh: Mesh, sample: Sample | None, layout: str, error: Exception | None) -> Outline | Exception:
    """The samples of all ranks of the sequence in outline, or what is wrong with them."""
    documents = list(sample.documents or ()) if sample else []
    count = sample.count if sample else 0
    mask = ", ".join(map(str, dict.fromkeys(sample.kinds))) if sample else ""
    said = _said(
        mesh, {"mask": mask, "layout": shortened(layout), "documents": str(len(documents)), "count": str(count)}, error
    )
    if isinstance(said, Exception):
        return said
    if different := differing(said, ("mask", "layout")):
        return AgreementError(f"The ranks that share a sequence differ in {different}. Pass the same on all of them.")
    most = max(int(words["documents"]) for words in said)
    own = np.zeros(max(most, 1), np.int64)
    own[: len(documents)] = documents
    lengths = [np.frombuffer(row, np.int64).tolist() for row in exchanged(mesh.connected(), own.tobytes(), "documents")]
    return Outline(
        [row[: int(words["documents"])] for row, words in zip(lengths, said, strict=True)],
        sum(int(words["count"]) for words in said),
    )


def counted(mesh: Mesh, count: int, error: Exception | None) -> int:
    """The sum over the replicas. Raises this rank's error when they have been told that there is one."""
    count, refusals = map(int, mesh.replicas.sum_numbers(count, error is not None))
    if error is not None:
        raise error
    if refusals:
        raise AgreementError("A replica of this rank refused its batch: its own error says why.")
    return count


def all_have(mesh: Mesh, has: bool) -> bool:
    """Whether every rank of the mesh has one more sample."""
    (having,) = mesh.everyone.sum_numbers(has)
    return having == mesh.size


def dealt(sharding: Sharding, outline: Outline, sample: Sample) -> Tensor:
    """``[2, S_local]``: tokens and labels of this rank's part, sent by the ranks that have read them."""
    transport = sharding.mesh.connected()
    me, bounds = transport.rank, outline.bounds
    full = torch.cat([sample.tokens, sample.labels]).to(transport.device)
    mine = sharding.positions.numpy()
    part = full.new_empty(2, len(mine))
    sends, receives = [], []
    for peer in range(transport.size):
        theirs = sharding.positions_of(peer).numpy()
        wanted = theirs[slice(*np.searchsorted(theirs, bounds[me : me + 2]))] - bounds[me]
        columns = slice(*np.searchsorted(mine, bounds[peer : peer + 2]))
        rows = full[:, torch.from_numpy(wanted).to(full.device)]
        if peer == me:
            part[:, columns] = rows
            continue
        sends.append((peer, rows.contiguous()))
        receives.append((peer, columns, full.new_empty(2, columns.stop - columns.start)))
    transport.exchange(sends, [(peer, x) for peer, _, x in receives], label="samples", control=True).wait()
    for _, columns, x in receives:
        part[:, columns] = x
    return part


def _said(mesh: Mesh, words: dict[str, str], error: Exception | None) -> list[dict[str, str]] | Exception:
    """What every rank of the sequence says; this rank's error, or an error that tells of another's."""
    if error is not None:
        words = {"refused": shortened(f"{type(error).__name__}: {error}", _REFUSAL)}
    own = json.dumps(words).encode().ljust(_BYTES)
    transport = mesh.connected()
    if alike(transport, own, "samples") and error is None:
        return [words] * transport.size
    said = [json.loads(text) for text in exchanged(transport, own, "samples")]
    refused = [
        f"Rank {rank} refused its sample: {each['refused']}" for rank, each in enumerate(said) if "refused" in each
    ]
    return error or (AgreementError(" ".join(refused)) if refused else said)
