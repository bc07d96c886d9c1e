"""A batch: full samples, or packed documents, and this rank's part of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from ringattn.checking import choice, flag, instance, listed, shown
from ringattn.errors import InputError, RingAttentionError
from ringattn.functional import attention
from ringattn.layouts import Balanced, Layout
from ringattn.masks import Mask
from ringattn.mesh import Mesh
from ringattn.sharding import Sharding
from ringattn.training.sample import Lengths, Sample, within_documents
from ringattn.training.sharing import Outline, compared, counted, dealt, outlined

Positions = Literal["document", "global"]


class Batch:
    """This rank's part of full sequences, and what training on it asks for.

    Attributes:
        tokens: ``[B, S_local]`` int64, the tokens that this rank holds, on the device of its transport.
        labels: ``[B, S_local]`` int64, what is to be predicted at each of them, or -100. They were shifted in the full
            sequence, where the label of a shard's last token is still known, and never across documents.
        positions: ``[S_local]`` int64, the place of each in its document, or in the sequence: for RoPE.
        masks: who attends to whom, of every kind of layer.
        sharding: who holds which tokens.
        documents: the lengths of the documents, or None.
        count: labels of the batch on all ranks, replicas included: what `token_loss` divides by. `accumulate` makes it
            that of all batches of an optimizer step.
        mesh: the ranks.
    """

    def __init__(
        self,
        tokens: Tensor | Sample,
        mesh: Mesh,
        *,
        documents: Lengths | None = None,
        labels: Tensor | None = None,
        mask: Mask | Sequence[Mask] | None = None,
        layout: Layout | str = "auto",
        scatter: bool = False,
        positions: Positions = "document",
        shift: bool = True,
        prepared: Any = None,
    ) -> None:
        """Every rank makes it, in the same order.

        Args:
            tokens: ``[B, S]`` integers, the full sequences; or a `Sample` of them, which has all but the layout.
            mesh: the ranks. Those of one sequence pass the same tokens, replicas each their own.
            documents: the lengths of the documents that each row is packed of; they sum to S. Or a list of lengths for
                each row: the rows are then laid end to end, as one long sequence.
            labels: ``[B, S]``, each at its token's own place (they are shifted here), -100 where there is none; None
                for the tokens themselves.
            mask: who attends to whom; None for causal. Documents are added to it. Of models whose layers differ, a list
                of their masks: all of them run on the one sharding, which balances their sum.
            layout: who holds what: a layout, its name, or ``auto``, which balances by the mask.
            scatter: every rank of a sequence passes rows of its own, of any number and length. Together they are one
                long sequence in which each row is a document, or several; each rank is sent what it holds of it, and
                nothing is read on one rank to be thrown away. ``layout`` and ``mask`` are those of the long sequence.
            positions: ``document``, which begin again in every document, or ``global``, in the whole sequence.
            shift: False where a label is what stands at its own place, as in masked language models.
            prepared: what an equal sharding has worked out (`Sharding.prepared`), as in a data loader's worker.

        Raises:
            InputError: an argument is wrong. The other ranks of the batch raise an AgreementError.
            AgreementError: the ranks of one sequence have different samples; says which.

        >>> import ringattn
        >>> batch = Batch(torch.arange(12)[None], ringattn.init(), documents=[5, 7])
        >>> batch.labels[0].tolist(), batch.count
        ([1, 2, 3, 4, -100, 6, 7, 8, 9, 10, 11, -100], 10)
        """
        self.mesh = instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns")

        def made() -> Sample:
            flag(scatter, "scatter")
            choice(positions, "positions", ("document", "global"))
            if isinstance(tokens, Sample):
                return tokens
            return Sample.of(tokens, documents=documents, labels=labels, mask=mask, shift=shift, joined=scatter)

        sample, error = _tried(made)
        deal = self._scattered if sample is not None and scatter else self._replicated  # which hear an error alike
        local = deal(sample, error, layout)
        if prepared is not None:
            self.sharding.adopt(prepared)
        device = mesh.connected().device
        self.tokens, self.labels = (x.to(device) for x in local)
        local_positions = self.sharding.positions
        if positions == "document":
            local_positions = self.mask.local_positions(local_positions)
        self.positions = local_positions.to(device)

    def _replicated(
        self, sample: Sample | None, error: Exception | None, layout: Layout | str
    ) -> tuple[Tensor, Tensor]:
        """Every rank of the sequence has the whole sample, and takes its part."""
        error = compared(self.mesh, sample, shown(layout), error)
        self.count = counted(self.mesh, sample.count if sample else 0, error)
        assert sample is not None  # or there was an error
        self.documents, self.masks = sample.documents, sample.masks
        self.sharding = sharded(sample.tokens.shape[1], self.mesh, layout, self.masks)
        return self.sharding.split(sample.tokens, 1), self.sharding.split(sample.labels, 1)

    def _scattered(self, sample: Sample | None, error: Exception | None, layout: Layout | str) -> tuple[Tensor, Tensor]:
        """Each rank of the sequence has a sample of its own; the ranks send each other their parts."""
        outline = outlined(self.mesh, sample, shown(layout), error)
        failure = None if isinstance(outline, Outline) else outline
        self.count = counted(self.mesh, outline.count if isinstance(outline, Outline) else 0, failure)
        assert isinstance(outline, Outline) and sample is not None  # or there was an error
        self.documents = tuple(itertools.chain.from_iterable(outline.documents))
        self.masks = within_documents(sample.kinds, self.documents)
        self.sharding = sharded(sum(self.documents), self.mesh, layout, self.masks)
        tokens, labels = dealt(self.sharding, outline, sample)
        return tokens[None], labels[None]

    @property
    def mask(self) -> Mask:
        """Who attends to whom, over the whole sequence."""
        return self.masks[0]

    @functools.cached_property
    def attend(self) -> Callable[..., Any]:
        """`ringattn.attention` with this mask and sharding: ``attend(q, k, v, **options)``."""
        return functools.partial(attention, mask=self.mask, sharding=self.sharding)

    def to(self, device: torch.device | str) -> Batch:
        """Itself, its tensors moved to the device."""
        self.tokens, self.labels, self.positions = (x.to(device) for x in (self.tokens, self.labels, self.positions))
        return self


def sharded(length: int, mesh: Mesh, layout: Layout | str, masks: tuple[Mask, ...]) -> Sharding:
    """The sharding of a batch: ``auto`` balances the sum of all layers' masks."""
    several = isinstance(layout, str) and layout == "auto" and len({*masks}) > 1
    return Sharding(length, mesh, Balanced(masks) if several else layout, masks[0])


def accumulate(batches: Iterable[Batch]) -> list[Batch]:
    """The batches whose gradients are accumulated to one optimizer step, each with the count of all of them.

    The losses of all are then shares of one mean over tokens, however unevenly labels are spread over the batches.

    >>> import ringattn
    >>> mesh = ringattn.init()
    >>> [batch.count for batch in accumulate(Batch(torch.arange(n)[None], mesh) for n in (3, 9))]
    [10, 10]
    """
    together = listed(batches)
    if not together or not all(isinstance(batch, Batch) for batch in together):
        raise InputError(f"accumulate takes the batches of a step, at least one; got {shown(batches)}.")
    total = sum(batch.count for batch in together)
    for batch in together:
        batch.count = total
    return together


def refuse(mesh: Mesh, error: Exception) -> NoReturn:
    """Raises the error when the other ranks have been told, which are about to make a batch, of whatever kind."""
    counted(mesh, 0, compared(mesh, None, "", error) or error)
    raise error


def _tried(make: Callable[[], Sample]) -> tuple[Sample | None, Exception | None]:
    """What it makes, or the error that it raised: the other ranks must hear of it before it is raised again."""
    try:
        return make(), None
    except RingAttentionError as error:
        return None, error
