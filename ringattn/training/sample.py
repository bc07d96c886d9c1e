"""A sample: full sequences with their documents, before anybody takes a part of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.checking import flag, instance, integer, shown
from ringattn.errors import InputError
from ringattn.masks import Causal, Documents, Mask

IGNORED = -100
"""The label of a token that has nothing to predict, as torch and transformers have it."""

Lengths = Sequence[int] | Sequence[Sequence[int]] | Tensor
"""Of documents: for all rows, or a list for each row."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Full sequences, checked and with their labels shifted. Asks no other rank: a data loader's worker makes it.

    Attributes:
        tokens: ``[B, S]`` int64.
        labels: ``[B, S]`` int64, what is to be predicted at each token, or -100.
        documents: the lengths of the documents, which sum to S; None for one.
        kinds: who attends to whom, of every kind of layer, but for the documents.
    """

    tokens: Tensor
    labels: Tensor
    documents: tuple[int, ...] | None
    kinds: tuple[Mask, ...]

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        *,
        documents: Lengths | None = None,
        labels: Tensor | None = None,
        mask: Mask | Sequence[Mask] | None = None,
        shift: bool = True,
        joined: bool = False,
    ) -> Sample:
        """The sample of these arguments, which are a `Batch`'s.

        Args:
            joined: whether the rows are laid end to end in any case, each a document or several.

        Raises:
            InputError: an argument is wrong.
        """
        flag(shift, "shift")
        flag(joined, "joined")
        tokens = _rows(tokens, "tokens")
        labels = tokens if labels is None else _rows(labels, "labels")
        if labels.shape != tokens.shape:
            raise InputError(f"labels must be shaped as the tokens, {list(tokens.shape)}; got {list(labels.shape)}.")
        kinds = checked_masks(mask)
        lengths, end_to_end = _documents(documents, tokens.shape[0], tokens.shape[1], joined)
        if end_to_end:
            tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
        return cls(tokens, _shifted(labels, lengths) if shift else labels, lengths, kinds)

    @functools.cached_property
    def masks(self) -> tuple[Mask, ...]:
        """Who attends to whom, of every kind of layer."""
        return self.kinds if self.documents is None else within_documents(self.kinds, self.documents)

    @property
    def mask(self) -> Mask:
        """That of the first kind of layer."""
        return self.masks[0]

    @property
    def count(self) -> int:
        """Tokens that have a label."""
        return int((self.labels != IGNORED).sum())

    @property
    def words(self) -> dict[str, str]:
        """What the ranks of a sequence must have alike, in short texts."""
        length = self.tokens.shape[1]
        return {
            "shape": str(list(self.tokens.shape)),
            "tokens": _hash(self.tokens.numpy().tobytes()),
            "labels": _hash(self.labels.numpy().tobytes()),
            "mask": _hash(" ".join(mask.signature(length, length) for mask in self.masks).encode()),
        }


def checked_masks(mask: object) -> tuple[Mask, ...]:
    """The masks of every kind of layer; causal where there is none."""
    given = mask if isinstance(mask, (list, tuple)) and mask else (Causal() if mask is None else mask,)
    return tuple(instance(each, Mask, "mask", "a ringattn mask, such as ringattn.Causal()") for each in given)


def within_documents(masks: tuple[Mask, ...], lengths: tuple[int, ...]) -> tuple[Mask, ...]:
    """The same masks, but that no token sees another document."""
    found = {mask: Documents(lengths) & mask for mask in {*masks}}  # layers of one kind have one mask
    return tuple(found[mask] for mask in masks)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _rows(x: object, name: str) -> Tensor:
    """Integers ``[B, S]`` on the CPU."""
    if not isinstance(x, Tensor) or x.dim() != 2 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else shown(x)
        raise InputError(f"{name} must be integers [batch, tokens], the full sequences; got {what}.")
    return x.detach().to("cpu", torch.int64).contiguous()


def _documents(documents: Lengths | None, rows: int, length: int, joined: bool) -> tuple[tuple[int, ...] | None, bool]:
    """The lengths of the documents, none of them empty, and whether they are those of all rows laid end to end."""
    given: object = documents
    if isinstance(documents, Tensor):
        given = None if documents.is_meta else documents.tolist()
        given = "a tensor without data" if given is None else given
    if given is None:
        return ((length,) * rows if joined and length else () if joined else None), joined
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(f"documents must be lengths, such as [5, 7], or such a list for each row; got {shown(given)}.")
    if not any(isinstance(each, Sequence) for each in given):
        lengths = _checked(given, length, "documents")
        return lengths * rows if joined else lengths, joined
    if len(given) != rows:
        raise InputError(f"documents must be lengths, or a list of them for each of {rows} rows; got {len(given)}.")
    each_row = (_checked(each, length, f"documents of row {row}") for row, each in enumerate(given))
    return tuple(itertools.chain.from_iterable(each_row)), True


def _checked(lengths: object, length: int, name: str) -> tuple[int, ...]:
    listed = lengths if isinstance(lengths, Sequence) else [lengths]
    found = tuple(integer(each, f"A length in {name}") for each in listed)
    if sum(found) != length:
        raise InputError(
            f"{name} must sum to the {length} tokens of a row; got {shown(list(found))}, which is {sum(found)}."
        )
    return tuple(each for each in found if each)


def _shifted(labels: Tensor, documents: tuple[int, ...] | None) -> Tensor:
    """The label of the next token of the same document, or -100."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    if documents:
        shifted[:, torch.tensor(documents).cumsum(0) - 1] = IGNORED
    return shifted
