"""The loader: one order for any number of ranks and workers, resumed anywhere, and what is wrong is heard by all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import ringattn
from ringattn.errors import AgreementError, InputError
from ringattn.training import Batch, Loader
from tests.workers import Workers

LENGTH = 8


class Numbered(Dataset[Tensor]):
    """Sample i begins with i; the rest is drawn from all three sources of random numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        drawn = [int(torch.randint(99, ())), int(np.random.randint(99)), random.randrange(99)]  # noqa: NPY002
        return torch.tensor([index, *drawn] + [0] * (LENGTH - 4))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for index in range(7):
            yield torch.full((LENGTH,), index)


class Broken(Numbered):
    def __getitem__(self, index: int) -> Tensor:
        raise OSError("the disk is gone")


def one() -> ringattn.Mesh:
    return ringattn.init()


def seen(loader: Loader) -> list[list[list[int]]]:
    """The tokens of every batch of an epoch, of one rank."""
    return [batch.tokens.tolist() for batch in loader]


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_has_its_own_order_and_every_sample(shuffle: bool) -> None:
    loader = Loader(DataLoader(Numbered(9), batch_size=2, shuffle=shuffle), one(), seed=3)
    epochs = [[row[0] for batch in seen(loader) for row in batch] for _ in range(3)]
    assert all(sorted(order) == list(range(9)) for order in epochs)
    assert (epochs[0] != epochs[1] != epochs[2]) == shuffle
    assert loader.epoch == 3 and len(loader) == 5


def test_the_order_and_what_is_drawn_do_not_depend_on_workers_or_on_the_state_of_the_process() -> None:
    torch.manual_seed(1)
    plain = seen(Loader(DataLoader(Numbered(6), batch_size=2, shuffle=True), one()))
    before = torch.get_rng_state()
    again = seen(Loader(DataLoader(Numbered(6), batch_size=2, shuffle=True), one()))
    assert torch.equal(before, torch.get_rng_state()) and again == plain
    parallel = Loader(
        DataLoader(Numbered(6), batch_size=2, shuffle=True, num_workers=2, persistent_workers=True), one()
    )
    assert seen(parallel) == plain
    assert seen(parallel) != plain
    drawn = [row[1:4] for batch in plain for row in batch]
    assert len({tuple(row) for row in drawn}) == 6


def test_a_loader_goes_on_where_another_was() -> None:
    def fresh() -> Loader:
        return Loader(DataLoader(Numbered(12), batch_size=2, shuffle=True), one(), seed=5)

    whole = fresh()
    expected = seen(whole) + seen(whole)
    first = fresh()
    batches = iter(first)
    found = [next(batches).tokens.tolist() for _ in range(4)]
    second = fresh()
    second.load_state_dict(first.state_dict())
    assert found + seen(second) + seen(second) == expected
    with pytest.raises(InputError, match="seed, epoch and consumed"):
        second.load_state_dict({"epoch": 1})


def test_workers_plan_what_the_ranks_attend_to() -> None:
    samples: Any = [torch.arange(LENGTH)]
    (batch,) = Loader(DataLoader(samples, batch_size=1, num_workers=1), one())
    kept = plans_of(batch)
    x = torch.zeros(1, 1, LENGTH, 4)
    batch.attend(x, x, x)
    assert len(kept) == 1 and plans_of(batch) == kept


def plans_of(batch: Batch) -> list[int]:
    """The plans that its sharding keeps, beside choices of schedules."""
    return [id(each) for each in dict(batch.sharding.plans).values() if isinstance(each, ringattn.Plan)]


def test_ulysses_is_planned_ahead_for_the_heads_that_it_deals() -> None:
    def planned(mesh: ringattn.Mesh) -> bool:
        samples: Any = [torch.arange(24)[None]]
        (batch,) = Loader(DataLoader(samples, batch_size=None), mesh, schedule="ulysses", heads=(4, 2))
        kept = plans_of(batch)
        q = torch.randn(1, 4, batch.tokens.shape[1], 8)
        batch.attend(q, q[:, :2], q[:, 2:], schedule="ulysses")
        return len(kept) == 1 and plans_of(batch) == kept

    assert ringattn.simulate(planned, ring=2, ulysses=2).results == [True] * 4


def test_ranks_of_a_sequence_share_samples_and_scattering_ranks_do_not() -> None:
    def loaded(mesh: ringattn.Mesh, scatter: bool) -> list[tuple[tuple[int, ...], int]]:
        loader = Loader(DataLoader(Numbered(7), batch_size=1, shuffle=True), mesh, scatter=scatter)
        return [(batch.documents or (), batch.count) for batch in loader]

    for alike in ringattn.simulate(loaded, False, ring=3).results:
        assert alike == [((), LENGTH - 1)] * 7
    for scattered in ringattn.simulate(loaded, True, ring=3).results:
        assert scattered == [((LENGTH,) * 3, 3 * (LENGTH - 1))] * 2


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": row["text"], "documents": row["where"]}


def test_packed_samples_and_other_names() -> None:
    rows: Any = [{"input_ids": torch.arange(4)[None], "document_lengths": [1, 3]}]
    (batch,) = Loader(DataLoader(rows, batch_size=None), one())
    assert batch.documents == (1, 3)
    ours: Any = [{"text": torch.arange(4)[None], "where": [2, 2]}]
    (batch,) = Loader(DataLoader(ours, batch_size=None), one(), prepare=_named)
    assert batch.documents == (2, 2)
    mixed: Any = [{**ours[0], **rows[0]}]
    with pytest.raises(InputError, match="has text, where"):
        list(Loader(DataLoader(mixed, batch_size=None), one()))
    with pytest.raises(InputError, match="must be tokens"):
        list(Loader(DataLoader(ours, batch_size=None), one()))


def test_a_sampler_of_the_users_own_is_followed() -> None:
    loader = Loader(DataLoader(Numbered(6), batch_sampler=[[5, 0], [3, 1]]), one())
    assert [[row[0] for row in batch] for batch in seen(loader)] == [[5, 0], [3, 1]]
    distributed: Any = DistributedSampler(Numbered(6), num_replicas=2, rank=0)
    with pytest.raises(InputError, match="DistributedSampler"):
        Loader(DataLoader(Numbered(6), sampler=distributed), one())


class Pairs(BatchSampler):
    """Batches of its own kind, over a shuffled order."""

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.sampler:
            yield [index, index]


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"sampler": SubsetRandomSampler(range(6)), "batch_size": 1},
        lambda: {"sampler": SubsetRandomSampler(range(6), torch.Generator().manual_seed(1)), "batch_size": 1},
        lambda: {"sampler": WeightedRandomSampler([1.0] * 6, 6, replacement=False), "batch_size": 1},
        lambda: {"batch_sampler": Pairs(RandomSampler(range(6)), 2, False)},
    ],
)
def test_samplers_that_draw_give_every_rank_one_order_and_are_gone_on_with(options: Any) -> None:
    def loader() -> Loader:
        return Loader(DataLoader(Numbered(6), **options()), one())

    torch.manual_seed(1)
    whole = loader()
    first, second = seen(whole), seen(whole)
    assert {batch[0][0] for batch in first} == {*range(6)} and first != second
    torch.manual_seed(2)
    broken_off = loader()
    begun = [batch.tokens.tolist() for _, batch in zip(range(2), broken_off, strict=False)]
    assert begun + seen(broken_off) == first
    assert seen(broken_off) == second


def test_a_stream_is_read_to_its_end_and_gone_on_with() -> None:
    loader = Loader(DataLoader(Stream(), batch_size=2), one())
    whole = [[row[0] for row in batch] for batch in seen(loader)]
    assert whole == [[0, 1], [2, 3], [4, 5], [6]]
    loader.load_state_dict({"seed": 0, "epoch": 1, "consumed": 3})
    assert [[row[0] for row in batch] for batch in seen(loader)] == [[6]]
    with pytest.raises(TypeError, match="no length"):
        len(loader)


def test_a_dataset_that_fails_on_one_rank_is_heard_by_the_others() -> None:
    def told(mesh: ringattn.Mesh) -> str:
        loader = Loader(DataLoader((Broken if mesh.rank == 1 else Numbered)(4), batch_size=1), mesh)
        with pytest.raises((OSError, AgreementError)) as caught:
            list(loader)
        return str(caught.value)

    first, second, third = ringattn.simulate(told, ring=3).results
    assert second == "the disk is gone"
    assert first == third == "Rank 1 refused its sample: OSError: the disk is gone"


class BrokenStream(Stream):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.full((LENGTH,), 0)
        raise OSError("the disk is gone")


@pytest.mark.parametrize("scatter", [False, True])
def test_a_stream_that_fails_on_one_rank_is_heard_by_the_others(scatter: bool) -> None:
    def told(mesh: ringattn.Mesh) -> str:
        loader = Loader(DataLoader((BrokenStream if mesh.rank == 1 else Stream)()), mesh, scatter=scatter)
        with pytest.raises((OSError, AgreementError)) as caught:
            list(loader)
        return str(caught.value)

    first, second = ringattn.simulate(told, ring=2).results
    assert second == "the disk is gone"
    assert first == "Rank 1 refused its sample: OSError: the disk is gone"


def _replicas(mesh: ringattn.Mesh) -> Any:
    """Two replicas of two ranks: what each is given; a stream of seven; an epoch gone on with on four replicas."""
    from torch.distributed.device_mesh import init_device_mesh

    def of(shape: tuple[int, int]) -> ringattn.Mesh:
        return ringattn.Mesh.from_device_mesh(
            init_device_mesh("cpu", shape, mesh_dim_names=("dp", "cp")), "cp", data="dp"
        )

    def joined(loader: Loader, most: int = 99) -> list[int]:
        taken = []
        for batch, _ in zip(loader, range(most), strict=False):
            taken.append(int(batch.sharding.join(batch.tokens, 1)[0, 0]))
            assert batch.count == batch.mesh.data * (LENGTH - 1)
        return taken

    two, four = of((2, 2)), of((4, 1))
    begun = Loader(DataLoader(Numbered(11), shuffle=True), two)
    first = joined(begun, 2)
    state = {**begun.state_dict(), "consumed": 4}
    rest = Loader(DataLoader(Numbered(11), shuffle=True), four)
    rest.load_state_dict(state)
    return first, joined(rest), joined(Loader(DataLoader(Stream()), two))


def test_replicas_get_different_samples_and_any_number_of_them_goes_on(gloo: Workers) -> None:
    order = [batch[0][0] for batch in seen(Loader(DataLoader(Numbered(11), shuffle=True), one()))]
    for rank, (first, rest, stream) in enumerate(gloo.run(4, _replicas)):
        replica = rank // 2
        assert first == order[replica:4:2]
        assert rest == [order[4 + rank]]
        assert stream == [0 + replica, 2 + replica, 4 + replica]
