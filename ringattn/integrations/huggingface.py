"""Hugging Face models over sharded sequences: five lines, and the model stays theirs.

    from ringattn.integrations.huggingface import attach

    mesh = ringattn.init()
    attached = attach(model, mesh)
    loss = model(**attached.batch(input_ids=ids, labels=ids)).loss      # this rank's share of the mean over all labels
    loss.backward()                                                     # gradients are added up over the ranks

Everything else is as before: without such a batch, in evaluation and `generate`, the model's own attention runs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ringattn.checking import instance, integer, listed, shown
from ringattn.errors import InputError, MissingDependencyError, RingAttentionError, UnsupportedError
from ringattn.functional import explain
from ringattn.integrations.architectures import SHIFTED, Reach, balance, check_router, reaches
from ringattn.integrations.members import check_members
from ringattn.kernels import Kernel
from ringattn.layouts import Layout
from ringattn.mechanisms.softmax import Softmax
from ringattn.mesh import Mesh
from ringattn.schedules.base import Scheme
from ringattn.sharding import Sharding
from ringattn.training import IGNORED, Batch
from ringattn.training.batch import refuse

try:
    from transformers import PreTrainedModel

    from ringattn.integrations import hooks
except ImportError as error:
    raise MissingDependencyError(
        f"ringattn.integrations.huggingface needs transformers ({error}): pip install 'ringattn[transformers]'."
    ) from error


COLUMNS = ("attention_mask", "input_ids", "labels")
"""Of samples, as long as their tokens."""


class Attached:
    """A model whose attention looks over all ranks wherever it is given a batch made here; see `attach`.

    Attributes:
        model: the model that was attached to.
        mesh: the ranks.
        reaches: whom the tokens of each layer attend to.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mesh: Mesh,
        *,
        layout: Layout | str = "auto",
        schedule: Scheme | str = "auto",
        kernel: Kernel | str = "auto",
    ) -> None:
        """Use `attach`."""
        self.model = _inside(model)
        self.mesh = instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns")
        self.reaches = reaches(self.model.config)
        check_router(self.model.config)
        self._shifted = _loss(self.model)
        check_members(layout, schedule, kernel)
        self._layout, self._schedule, self._kernel = layout, schedule, kernel
        self._random = torch.Generator().manual_seed(torch.initial_seed())
        self._original = str(self.model.config._attn_implementation)
        if self._original.startswith(hooks.PREFIX):
            raise InputError(
                "ringattn is already attached to this model, or to one that shares its config: detach it first, or "
                "give each model a config of its own (copy.deepcopy(config))."
            )
        self._name = hooks.installed(self._original)
        self.model.config._attn_implementation = self._name

    def detach(self) -> None:
        """Gives the model its own attention back. Batches made here are then refused by it."""
        if self.model.config._attn_implementation == self._name:
            self.model.config._attn_implementation = self._original

    def batch(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        document_lengths: Sequence[int] | Sequence[Sequence[int]] | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        scatter: bool = False,
    ) -> dict[str, Any]:
        """The arguments of the model's forward for this rank's part of full sequences. Every rank calls it alike.

        With labels the output's ``loss`` is this rank's share of the mean over all labels of the batch, on all ranks:
        the loss is the sum of the shares, and its gradient that of the ranks' gradients (`ringattn.training`). Of
        several batches whose gradients are accumulated, give each the sum of their ``num_items_in_batch``.

        Args:
            input_ids: ``[B, S]``, the full sequences, the same on all ranks of a sequence.
            labels: ``[B, S]``, as transformers takes them: each at its token's own place, -100 for none.
            document_lengths: of the documents that each row is packed of; a list for each row, and the rows are laid
                end to end.
            position_ids: ``[B, S]`` or ``[1, S]``, of the full sequences: where they begin again at 0, a document
                begins. Instead of ``document_lengths``.
            attention_mask: ``[B, S]``, all ones: samples are packed, not padded.
            scatter: every rank of a sequence passes rows of its own, of any number and length: together they are one
                long sequence in which each row is a document, or several.

        Raises:
            InputError: an argument is wrong.
            UnsupportedError: padding, or a mask that is none of the model's own.
            AgreementError: the ranks of one sequence have different samples.
        """
        try:
            self._check(labels is not None, attention_mask)
            if position_ids is not None:
                document_lengths = _documents_of(input_ids, document_lengths, position_ids)
        except RingAttentionError as error:
            refuse(self.mesh, error)
        return self._arguments(self._batch(input_ids, labels, document_lengths, scatter), labels is not None)

    def explain(self, batch: Mapping[str, Any]) -> str:
        """What each kind of layer will do with a batch, in words: this rank's plan, its layout and kernel, and why.

        Sends nothing. Heads and soft cap are the config's; sinks are left out.
        """
        config, sharding = self.model.config, sharding_of(batch)
        heads = (config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
        rows, device = batch["input_ids"].shape[0], batch["input_ids"].device
        q, k = (torch.empty(rows, n, sharding.count, dim, dtype=self.model.dtype, device=device) for n in heads)
        how: dict[str, Any] = {
            "sharding": sharding,
            "mechanism": Softmax(softcap=getattr(config, "attn_logit_softcapping", None)),
        }
        texts = [
            f"{self.reaches.count(layer.reach)} layers, {layer.reach}:\n"
            + explain(q, k, k, layer.mask, schedule=layer.schedule, kernel=layer.kernel, **how)
            for layer in _layers_of(batch)
        ]
        return "\n".join(texts)

    def collate(self, features: Sequence[Mapping[str, Any]], *, scatter: bool = True) -> dict[str, Any]:
        """A ``data_collator`` for transformers' Trainer and for loaders that Accelerate prepares.

        Those give every rank samples of its own. Here the samples of all ranks of a sequence become the documents of
        one long sequence, of which each rank gets its part: nothing is padded, and no document sees another. Samples
        that are long enough for all ranks come from `Repeated`, with ``scatter=False``. The Trainer counts labels over
        all ranks and averages gradients as it should (``average_tokens_across_devices``, its default), also with
        FSDP2 and DeepSpeed; its ``label_smoothing_factor`` shifts labels within shards, and fails. An IterableDataset
        needs ``accelerator_config={"dispatch_batches": False}``: one process would make the batches of all others.
        With Accelerate alone, ``accelerator.backward(loss * accelerator.num_processes)``.

        Args:
            features: samples with ``input_ids`` and, for a loss, ``labels``, lists or tensors of any length; a sample
                that is packed itself has ``document_lengths``.
            scatter: False where the ranks of a sequence have the same samples.

        Raises:
            InputError: a column is not known, or samples do not have the same; or a loader's worker calls it, where no
                other rank can be reached: use num_workers=0.
        """
        if torch.utils.data.get_worker_info() is not None:
            raise InputError(
                "The ranks of a sequence meet where batches are made, which a loader's worker cannot: use "
                "num_workers=0, the dataloader_num_workers of TrainingArguments."
            )
        try:
            columns = _end_to_end(features)
        except RingAttentionError as error:
            refuse(self.mesh, error)
        return self.batch(**columns, scatter=scatter)

    def _by_type(self) -> dict[str, Reach]:
        """Of every type of layer that the config lists."""
        return dict(zip(self.model.config.layer_types, self.reaches, strict=True))

    def _check(self, labelled: bool, attention_mask: Tensor | None) -> None:
        """What can be wrong before there is a batch."""
        if self.model.config._attn_implementation != self._name:
            raise InputError("ringattn is not attached to this model any more: attach(model, mesh) again.")
        check_router(self.model.config)
        if labelled and self._shifted is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} has no loss that is a sum over tokens. Leave labels out."
            )
        _check_padding(attention_mask)

    def _batch(self, input_ids: Tensor, labels: Tensor | None, documents: Any, scatter: bool) -> Batch:
        """The shards, balanced over the masks of all layers, none of them empty."""
        batch = Batch(
            input_ids,
            self.mesh,
            documents=documents,
            labels=labels,
            mask=[reach.weight for reach in balance(self.reaches)],
            layout=self._layout,
            scatter=scatter,
            shift=bool(self._shifted),
        )
        if min(batch.sharding.counts) == 0:
            raise UnsupportedError(
                f"{batch.sharding.length} tokens on {self.mesh.sequence_size} ranks leave some without any, which "
                f"transformers' layers cannot take: pack more, or use fewer ranks."
            )
        return batch

    def _arguments(self, batch: Batch, labelled: bool) -> dict[str, Any]:
        """What the model's forward is given."""
        seed = int(torch.randint(1 << 61, (), generator=self._random)) ^ self.mesh.coordinates["data"]
        kinds = dict.fromkeys(self.reaches)
        masks = {kind: kind.mask(batch.sharding.length, batch.documents) for kind in kinds}
        layers = {
            kind: hooks.LayerMask(kind, mask, batch.sharding, self._schedule, self._kernel, seed)
            for kind, mask in masks.items()
        }
        given: dict[str, Any] = {
            "input_ids": batch.tokens,
            "position_ids": batch.positions[None].expand(batch.tokens.shape[0], -1),
            "attention_mask": hooks.ShardedMask(layers, (batch.tokens.shape[0], batch.tokens.shape[1])),
        }
        if self.model.config.model_type == "llama4_text":  # whose masks are made from a padding mask's values
            given["attention_mask"] = {name: layers[kind] for name, kind in self._by_type().items()}
        if self.reaches[0].causal:
            given["use_cache"] = False
        if labelled:
            # Whoever shifts labels again, as the Trainer's label smoothing, gets the right ones, but one more than it
            # has logits, and fails; transformers' losses take shift_labels.
            given["labels"] = functional.pad(batch.labels, (1, 0), value=IGNORED) if self._shifted else batch.labels
            given["num_items_in_batch"] = torch.tensor(max(batch.count, 1), device=batch.labels.device)
            if self._shifted:
                given["shift_labels"] = batch.labels
        return given


class Repeated(torch.utils.data.Dataset[Any]):
    """A dataset from which the Trainer's ranks of one sequence get the same samples, replicas different ones.

    The Trainer deals batches out to ranks in turn; here each comes up once for every rank of a sequence:

        args = TrainingArguments(..., train_sampling_strategy="sequential")
        collator = functools.partial(attached.collate, scatter=False)
        Trainer(model, args, train_dataset=Repeated(dataset, mesh), data_collator=collator)
    """

    def __init__(self, dataset: Any, mesh: Mesh, *, batch_size: int = 1, seed: int | None = 0) -> None:
        """Repeats the samples of a dataset.

        Args:
            dataset: anything with a length and an index.
            mesh: the ranks.
            batch_size: samples of a rank's batch, ``per_device_train_batch_size``; what is left over is left out.
            seed: of the order, another in each epoch; None for the dataset's own.
        """
        try:
            len(dataset), dataset.__getitem__
        except (AttributeError, TypeError) as error:
            raise InputError(f"dataset must have a length and an index; got {shown(dataset)}.") from error
        instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns")
        self._dataset, self._size, self._ranks = dataset, integer(batch_size, "batch_size", least=1), mesh.sequence_size
        self._seed = None if seed is None else integer(seed, "seed, which None leaves out,")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the order of an epoch; the Trainer calls it."""
        self._order = list(range(len(self._dataset)))
        if self._seed is not None:
            random.Random(f"{self._seed} {epoch}").shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order) // self._size * self._size * self._ranks

    def __getitem__(self, index: int) -> Any:
        batch, nth = divmod(index, self._size)
        return self._dataset[self._order[batch // self._ranks * self._size + nth]]


def attach(
    model: torch.nn.Module,
    mesh: Mesh,
    *,
    layout: Layout | str = "auto",
    schedule: Scheme | str = "auto",
    kernel: Kernel | str = "auto",
) -> Attached:
    """Lets a model of transformers attend over all ranks of a mesh, for batches of `Attached.batch`.

    Only the model's config changes, in the name of the attention implementation, which is not saved with it. A model
    with attention dropout takes its seeds from torch's: the ranks of a sequence call this with one `torch.manual_seed`.

    Args:
        model: a model of a known architecture, or a wrapper around one (peft, DDP, FSDP2).
        mesh: from `ringattn.init` or ``Mesh.from_device_mesh``.
        layout: who holds which tokens; ``auto`` balances over the masks of all layers.
        schedule, kernel: as in `ringattn.attention`.

    Raises:
        UnsupportedError: the architecture is not known, or its config asks for what cannot be sharded; says why.
        InputError: an argument is wrong, or the model is attached already.
    """
    return Attached(model, mesh, layout=layout, schedule=schedule, kernel=kernel)


def sharding_of(batch: Mapping[str, Any]) -> Sharding:
    """Who holds which tokens of a batch of `Attached.batch`: ``sharding_of(batch).join(logits, 1)`` are those of all.

    Raises:
        InputError: the batch is another.
    """
    return _layers_of(batch)[0].sharding


def _layers_of(batch: Mapping[str, Any]) -> list[hooks.LayerMask]:
    """The masks of a batch of `Attached.batch`, one for each kind of layer."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else batch
    layers = mask.layers if isinstance(mask, hooks.ShardedMask) else mask
    found = list(layers.values()) if isinstance(layers, Mapping) else []
    if not found or not all(isinstance(each, hooks.LayerMask) for each in found):
        raise InputError(f"A batch must be what Attached.batch returns; got attention_mask={shown(mask)}.")
    return found


def _inside(model: object) -> PreTrainedModel:
    """The model of transformers, itself or within a wrapper."""
    module = instance(model, torch.nn.Module, "model", "a model of transformers")
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            return part
    raise InputError(f"attach takes a model of transformers; got {shown(type(model).__name__)}.")


def _loss(model: PreTrainedModel) -> bool | None:
    """Whether the model's labels are those of the next token; None where it has no loss.

    Raises:
        UnsupportedError: its head looks at whole sequences, or its loss is no sum over tokens.
    """
    kind = getattr(model, "loss_type", None)
    if kind is None:
        return None
    if kind not in SHIFTED:
        raise UnsupportedError(
            f"The head of {type(model).__name__} looks at whole sequences, or its loss is a mean over a shard. Attach "
            f"to a model {' or '.join(SHIFTED)}, or to one without a head."
        )
    return None if hasattr(model, "_loss_function") else SHIFTED[kind]  # of one's own, it may be anything


def _end_to_end(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples as one row, of which each is a document, or those that it has."""
    given = listed(features)
    if not given or not all(isinstance(feature, Mapping) for feature in given):
        raise InputError(f"features must be samples, dictionaries with input_ids, in a list; got {shown(features)}.")
    features = given
    names = sorted({str(name) for feature in features for name in feature})
    unknown = [name for name in names if name not in (*COLUMNS, "document_lengths")]
    if unknown or not all(name in feature for feature in features for name in names if name in COLUMNS):
        raise InputError(
            f"Samples have {', '.join(COLUMNS)} or document_lengths, all of them the same; got {', '.join(names)}. "
            f"Remove what the model does not need (remove_unused_columns of TrainingArguments)."
        )
    try:
        columns: dict[str, Any] = {
            name: torch.cat([torch.as_tensor(feature[name]).flatten() for feature in features])[None]
            for name in names
            if name in COLUMNS
        }
        own = [feature.get("document_lengths", [len(feature["input_ids"])]) for feature in features]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"Samples need input_ids, lists or tensors of integers: {error}.") from error
    return {**columns, "document_lengths": [int(length) for lengths in own for length in lengths]}


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        what = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else shown(attention_mask)
        raise UnsupportedError(
            f"Masks are made by the model's layers and by document_lengths; got attention_mask={what}. Leave it out."
        )
    if not bool(attention_mask.all()):
        raise UnsupportedError(
            "The batch is padded: padding would be sharded like tokens. Lay the samples end to end without it, and "
            "pass their lengths as document_lengths."
        )


def _documents_of(input_ids: Tensor, document_lengths: object, position_ids: Tensor) -> list[int]:
    """The lengths of the documents of full position ids, which begin again at 0 in each."""
    if document_lengths is not None:
        raise InputError("Documents are told by document_lengths or by position_ids; got both.")
    tokens = input_ids.shape[-1] if isinstance(input_ids, Tensor) and input_ids.dim() == 2 else 0
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        raise InputError(f"position_ids must be those of the full sequences, [1, {tokens}]; got {shown(position_ids)}.")
    row = position_ids[0].cpu()
    starts = torch.nonzero(row == 0).flatten()
    lengths = torch.diff(starts, append=torch.tensor([len(row)]))
    counted = torch.arange(len(row)) - torch.repeat_interleave(starts, lengths) if len(starts) and starts[0] == 0 else 0
    if bool((position_ids.cpu() != row).any()) or not torch.equal(row, torch.as_tensor(counted).to(row).expand_as(row)):
        raise InputError(
            "position_ids must count 0, 1, 2, … in every document, alike in all rows. For rows that are packed "
            "otherwise pass document_lengths, a list for each row."
        )
    return [int(length) for length in lengths]
