"""Batches from a `torch.utils.data.DataLoader`, the same on all ranks that share a sequence."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from ringattn.checking import choice, flag, instance, integer, shown
from ringattn.errors import InputError
from ringattn.layouts import Layout
from ringattn.masks import Mask
from ringattn.mesh import Mesh
from ringattn.plans.choice import named_schedule
from ringattn.plans.planning import verified_plan
from ringattn.schedules import Scheme
from ringattn.training.batch import Batch, Positions, refuse, sharded
from ringattn.training.sample import Sample, checked_masks
from ringattn.training.sharing import all_have

NAMES = {"tokens": "tokens", "input_ids": "tokens", "labels": "labels", "documents": "documents"}
NAMES |= {"document_lengths": "documents", "mask": "mask"}
"""What a batch of the user's loader may hold, and the argument of `Batch` that it is."""


class Loader:
    """A user's `DataLoader`, dealt to the ranks of a mesh: iterating over it is one epoch of `Batch` objects.

    Ranks that share a sequence get the same samples and replicas different ones (with ``scatter`` every rank its own),
    in an order that only the seed, the epoch and the dataset decide: it is shuffled anew in every epoch where the
    user's loader shuffles, and is the same for any number of ranks and workers. Random numbers that a dataset draws are
    seeded by the sample, never by the rank. Samples are checked, their layouts computed and their attention planned
    where they are loaded: in the workers, if there are any. The last samples that are not enough for all replicas are
    left out.

    `state_dict` is what to save with a checkpoint: a loader that is given it goes on with the next samples, on any
    number of replicas.

    Example:
        >>> import ringattn
        >>> samples = [torch.arange(6) + i for i in range(4)]
        >>> loader = Loader(DataLoader(samples, batch_size=2), ringattn.init())
        >>> [batch.tokens.shape for batch in loader]
        [torch.Size([2, 6]), torch.Size([2, 6])]
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        mesh: Mesh,
        *,
        seed: int = 0,
        prepare: Callable[[Any], Mapping[str, Any]] | None = None,
        mask: Mask | Sequence[Mask] | None = None,
        layout: Layout | str = "auto",
        schedule: Scheme | str = "auto",
        heads: tuple[int, int] | None = None,
        scatter: bool = False,
        positions: Positions = "document",
        shift: bool = True,
    ) -> None:
        """Wraps the loader, of which dataset, batches, collate function and workers are taken.

        Args:
            loader: whose batches are token tensors ``[B, S]``, or dicts with ``tokens`` (or ``input_ids``) and, where
                there are any, ``labels``, ``documents`` (or ``document_lengths``) and ``mask``. Its own shuffling is
                replaced by one that all ranks share. Of an iterable dataset every rank reads the whole stream and
                keeps its part; it is resumed by reading what was read, or by the loader's own ``state_dict``.
            mesh: the ranks.
            seed: of the order and of what datasets draw.
            prepare: makes the arguments of `Batch` from a batch of the loader's, where they have other names.
            schedule: what the attention will be called with: it is planned ahead.
            heads: query and key heads, by which `Ulysses` plans.
            mask, layout, scatter, positions, shift: as for `Batch`.

        Raises:
            InputError: the loader cuts its data by ranks of its own.
        """
        self.mesh = instance(mesh, Mesh, "mesh", "a ringattn.Mesh, as ringattn.init() returns")
        self.seed = integer(seed, "seed")
        self.loader = instance(loader, DataLoader, "loader", "a torch DataLoader")
        flag(scatter, "scatter")
        flag(shift, "shift")
        choice(positions, "positions", ("document", "global"))
        if prepare is not None and not callable(prepare):
            raise InputError(f"prepare must be a function of a batch of the loader, or None; got {shown(prepare)}.")
        sharded(0, mesh, layout, checked_masks(mask))  # which says whether there is such a layout
        named_schedule(schedule, heads)
        self.epoch = 0
        """Which is next, or under way."""
        self.consumed = 0
        """Batches of this epoch that all replicas together have been given."""
        self._options: dict[str, Any] = {"layout": layout, "scatter": scatter, "positions": positions}
        sample: dict[str, Any] = {"mask": mask, "shift": shift, "joined": scatter}
        # Of scattered samples no rank knows the sequence yet.
        plan = None if scatter else (mesh, layout, schedule, heads)
        self._make = _Make(prepare or _arguments, sample, plan)
        self.share = mesh.size if scatter else mesh.data
        """Batches of the user's loader that are dealt at once."""
        self.place = mesh.rank if scatter else mesh.coordinates["data"]
        """Which of them is this rank's."""
        streamed = isinstance(loader.dataset, IterableDataset)
        self._fetch = None if streamed else self._fetcher()

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch; after it the next one begins."""
        items = self._stream() if self._fetch is None else iter(self._fetch)
        while True:
            made = _next(items)
            if self._fetch is None and not all_have(self.mesh, made is not None):
                if isinstance(made, Exception):
                    raise made
                break
            if isinstance(made, Exception):  # the other ranks are about to compare their samples with this one's
                refuse(self.mesh, made)
            if made is None:
                break
            self.consumed += self.share
            sample, prepared = made
            yield Batch(sample, self.mesh, prepared=prepared, **self._options)
        self.epoch, self.consumed = self.epoch + 1, 0

    def __len__(self) -> int:
        """Batches of an epoch.

        Raises:
            TypeError: the dataset is a stream.
        """
        if self._fetch is None:
            raise TypeError("A stream has no length.")
        return len(self.loader) // self.share

    def state_dict(self) -> dict[str, int]:
        """Where the loader is: numbers that can be written as JSON."""
        return {"seed": self.seed, "epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where the loader was that had this state.

        Raises:
            InputError: it is no state of a loader.
        """
        if not isinstance(state, Mapping) or {*state} != {"seed", "epoch", "consumed"}:
            raise InputError(f"A loader's state has seed, epoch and consumed; got {shown(state)}.")
        self.seed, self.epoch, self.consumed = (
            integer(state[name], f"{name} of a loader's state") for name in ("seed", "epoch", "consumed")
        )

    def _fetcher(self) -> DataLoader[Any]:
        """The user's loader over keys, of which each is a whole batch."""
        given = self.loader
        samplers = (given.sampler, getattr(given.batch_sampler, "sampler", None))
        if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            raise InputError(
                "The loader's DistributedSampler cuts the data by torch's ranks, of which some share a sequence. Leave "
                "it out: this loader deals the samples to the mesh."
            )
        workers = given.num_workers
        more: dict[str, Any] = {
            "prefetch_factor": given.prefetch_factor,
            "persistent_workers": given.persistent_workers,
        }
        return DataLoader(
            _Batches(given.dataset, given.collate_fn, self._make),
            batch_size=None,
            sampler=_Keys(self),
            num_workers=workers,
            collate_fn=_itself,
            generator=torch.Generator(),  # of its own: beginning an epoch draws nothing from the caller's
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            **(more if workers else {}),
        )

    def _stream(self) -> Iterator[Any]:
        """This rank's part of what the user's loader gives of an iterable dataset."""
        begun = self.consumed
        with _drawing(self.seed, self.epoch):  # the seed that the loader draws for its workers
            items = iter(self.loader)
        for number, item in enumerate(items):
            if number >= begun and number % self.share == self.place:
                yield self._make(item)


@dataclasses.dataclass(frozen=True)
class _Make:
    """Makes the sample of a batch of the user's loader and, where its sequence is known already, its plan."""

    arguments: Callable[[Any], Mapping[str, Any]]
    options: Mapping[str, Any]
    plan: tuple[Mesh, Layout | str, Scheme | str, tuple[int, int] | None] | None

    def __call__(self, item: Any) -> tuple[Sample, Any]:
        found = self.arguments(item)
        sample = Sample.of(**{**self.options, **found})
        if self.plan is None:
            return sample, None
        mesh, layout, schedule, heads = self.plan
        sharding = sharded(sample.tokens.shape[1], mesh, layout, sample.masks)
        for mask in {*sample.masks}:
            verified_plan(mask, sharding, schedule, heads=heads)
        return sample, sharding.prepared


@dataclasses.dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """The batches of the user's loader by what `_Keys` gives, made where they are asked for."""

    dataset: Any
    collate: Callable[[Any], Any]
    make: _Make

    def __getitem__(self, key: tuple[tuple[int, ...], Any]) -> tuple[Sample, Any]:
        draw, chosen = key
        with _drawing(*draw):
            if not isinstance(chosen, list):
                items = self.dataset[chosen]
            elif hasattr(self.dataset, "__getitems__"):
                items = self.dataset.__getitems__(chosen)
            else:
                items = [self.dataset[i] for i in chosen]
            return self.make(self.collate(items))


@dataclasses.dataclass(frozen=True)
class _Keys:
    """This rank's batches of the rest of an epoch: what seeds them, and the indices of their samples."""

    owner: Loader

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Any]]:
        owner = self.owner
        batches = itertools.islice(enumerate(self._of_everyone()), owner.consumed, None)
        while len(dealt := list(itertools.islice(batches, owner.share))) == owner.share:
            number, chosen = dealt[owner.place]
            yield (owner.seed, owner.epoch, number), chosen

    def _of_everyone(self) -> Iterable[Any]:
        """The indices of every batch of the epoch: a list, or one where the user's loader does not collate."""
        loader = self.owner.loader
        batches: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        inner: Any = getattr(batches, "sampler", batches)
        for sampler in (batches, inner):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.owner.epoch)
        if type(inner) is not RandomSampler or type(batches) not in (RandomSampler, BatchSampler):
            found = {getattr(sampler, "generator", None) for sampler in (batches, inner)}
            own = [generator for generator in found if isinstance(generator, torch.Generator)]
            return _drawn(batches, own, self.owner.seed, self.owner.epoch)
        order: Any = self._shuffled(inner)
        return BatchSampler(order, batches.batch_size, batches.drop_last) if type(batches) is BatchSampler else order

    def _shuffled(self, sampler: RandomSampler) -> list[int]:
        """The order of a RandomSampler, drawn from the seed and the epoch."""
        size = len(sampler.data_source)
        draw = torch.Generator().manual_seed(_seeds(self.owner.seed, self.owner.epoch)[0])
        if sampler.replacement:
            return torch.randint(size, (sampler.num_samples,), generator=draw).tolist()
        return torch.randperm(size, generator=draw)[: sampler.num_samples].tolist()


def _arguments(item: Any) -> Mapping[str, Any]:
    """The arguments of `Batch` in a batch of the user's loader."""
    if isinstance(item, Tensor):
        return {"tokens": item}
    if not isinstance(item, Mapping) or not {*item} & {"tokens", "input_ids"}:
        raise InputError(
            f"A batch of the loader must be tokens [B, S], or a dict with tokens or input_ids; got {shown(item)}. Or "
            f"pass prepare=, which makes the arguments of Batch from it."
        )
    unknown = {*item} - {*NAMES}
    if unknown:
        raise InputError(
            f"A batch of the loader has {', '.join(sorted(map(str, unknown)))}, which nothing here reads; it may have "
            f"{', '.join(NAMES)}. Leave them out, or pass prepare=, which makes the arguments of Batch from it."
        )
    return {NAMES[name]: value for name, value in item.items()}


def _itself(item: Any) -> Any:
    return item


def _seeds(*numbers: int) -> list[int]:
    return [int(word) for word in np.random.SeedSequence(numbers).generate_state(3)]


def _next(items: Iterator[Any]) -> Any:
    """The next item, None at the end; an error is returned, which the other ranks must hear of before it is raised."""
    try:
        return next(items, None)
    except Exception as error:
        return error


def _drawn(items: Iterable[Any], own: Sequence[torch.Generator], *numbers: int) -> Iterator[Any]:
    """What a sampler of the user's gives, whatever it draws from: the same on every rank, and when it is gone on with.

    Args:
        own: the generators that it draws from.
        numbers: of the seed.
    """
    iterator: Iterator[Any] | None = None
    for number in itertools.count():
        with _drawing(*numbers, number, 1, own=own):  # not the seed of what datasets draw for this batch
            iterator = iter(items) if iterator is None else iterator
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextmanager
def _drawing(*numbers: int, own: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python from a seed made of these numbers; as they were before, afterwards.

    Args:
        own: generators of the user's, beside torch's default one.
    """
    generators = [torch.default_generator, *own]
    states = [g.get_state() for g in generators], np.random.get_state(), random.getstate()  # noqa: NPY002
    first, second, third = _seeds(*numbers)
    for generator in generators:
        generator.manual_seed(first)
    np.random.seed(second)  # noqa: NPY002 (datasets draw from it)
    random.seed(third)
    try:
        yield
    finally:
        for generator, state in zip(generators, states[0], strict=True):
            generator.set_state(state)
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
