"""Batches: labels and positions of the full sequence on every shard, and samples that are not what they should be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ringattn
from ringattn.errors import AgreementError, InputError
from ringattn.training import IGNORED, Batch, Sample
from tests.workers import Workers


def next_in_document(tokens: Tensor, documents: list[int]) -> Tensor:
    """Token by token: the next one, if it is of the same document."""
    ends = set(itertools.accumulate(documents))
    rows = [[IGNORED if i + 1 in ends else row[i + 1] for i in range(len(row))] for row in tokens.tolist()]
    return torch.tensor(rows, dtype=torch.int64).view(tokens.shape)


def joined(parts: list[Batch], name: str) -> Tensor:
    """A tensor of every rank's batch, in the order of the sequence."""
    order = torch.cat([batch.sharding.positions for batch in parts]).argsort()
    return torch.cat([getattr(batch, name) for batch in parts], dim=-1)[..., order]


ROW = torch.zeros(1, 4, dtype=torch.int64)
documents_of = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(documents_of, st.integers(1, 3), st.integers(1, 6), st.sampled_from(["auto", "zigzag", "striped", "contiguous"]))
def test_every_rank_has_its_part_of_tokens_labels_and_positions(
    documents: list[int], rows: int, ring: int, layout: str
) -> None:
    length = sum(documents)
    tokens = torch.arange(rows * length).view(rows, length)
    parts = ringattn.simulate(lambda mesh: Batch(tokens, mesh, documents=documents, layout=layout), ring=ring).results
    assert torch.equal(joined(parts, "tokens"), tokens)
    assert torch.equal(joined(parts, "labels"), next_in_document(tokens, documents))
    assert joined(parts, "positions").tolist() == [i for n in documents for i in range(n)]
    assert {batch.count for batch in parts} == {rows * (length - len(documents))}
    assert str(parts[0].mask) == str(ringattn.Documents(documents) & ringattn.Causal())


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 99))
def test_scattered_samples_are_the_documents_of_one_sequence(by_rank: list[list[int]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    samples = [torch.randint(0, 999, (1, sum(documents)), generator=draw) for documents in by_rank]

    def scattered(mesh: ringattn.Mesh) -> Batch:
        return Batch(samples[mesh.rank], mesh, documents=by_rank[mesh.rank], scatter=True)

    parts = ringattn.simulate(scattered, ring=len(by_rank)).results
    documents = [n for each in by_rank for n in each]
    tokens = torch.cat(samples, 1)
    assert parts[0].documents == tuple(documents)
    assert torch.equal(joined(parts, "tokens"), tokens)
    assert torch.equal(joined(parts, "labels"), next_in_document(tokens, documents))
    assert {batch.count for batch in parts} == {sum(documents) - len(documents)}


def test_rows_with_documents_of_their_own_are_laid_end_to_end() -> None:
    batch = Batch(torch.arange(8).view(2, 4), ringattn.init(), documents=[[1, 3], [4]])
    assert batch.tokens.shape == (1, 8) and batch.documents == (1, 3, 4)
    assert batch.labels.tolist() == [[IGNORED, 2, 3, IGNORED, 5, 6, 7, IGNORED]]
    scattered = Batch(torch.arange(8).view(2, 4), ringattn.init(), scatter=True)
    assert scattered.documents == (4, 4) and scattered.positions.tolist() == [0, 1, 2, 3] * 2


def test_options_of_a_batch() -> None:
    mesh, tokens = ringattn.init(), torch.arange(6)[None]
    labels = torch.tensor([[IGNORED, IGNORED, 2, 3, 4, 5]])
    assert Batch(tokens, mesh, labels=labels).labels.tolist() == [[IGNORED, 2, 3, 4, 5, IGNORED]]
    assert Batch(tokens, mesh, labels=labels, shift=False).count == 4
    assert Batch(tokens, mesh, documents=[2, 4], positions="global").positions.tolist() == [0, 1, 2, 3, 4, 5]
    window = ringattn.Window(2) & ringattn.Causal()
    assert str(Batch(tokens, mesh, mask=window, documents=[2, 4]).mask) == str(ringattn.Documents([2, 4]) & window)
    sample = Sample.of(tokens, documents=torch.tensor([2, 4]))
    assert torch.equal(Batch(sample, mesh).labels, Batch(tokens, mesh, documents=[2, 4]).labels)
    assert Batch(torch.zeros(1, 0, dtype=torch.int32), mesh).count == 0


@pytest.mark.parametrize("scatter", [False, True])
def test_layers_of_several_kinds_share_a_sharding_that_balances_their_sum(scatter: bool) -> None:
    kinds = [ringattn.Causal(), ringattn.Window(3), ringattn.Window(3)]

    def made(mesh: ringattn.Mesh) -> Batch:
        return Batch(torch.arange(40)[None], mesh, mask=kinds, documents=[15, 25], scatter=scatter)

    for batch in ringattn.simulate(made, ring=2).results:
        documents = ringattn.Documents([15, 25] * (2 if scatter else 1))
        assert [str(mask) for mask in batch.masks] == [str(documents & kind) for kind in kinds]
        assert batch.mask is batch.masks[0] and batch.masks[1] is batch.masks[2]
        assert str(batch.sharding.layout) == str(ringattn.Balanced(batch.masks))


def test_attend_is_attention_over_the_batch() -> None:
    q = torch.randn(1, 2, 9, 4)

    def attended(mesh: ringattn.Mesh) -> tuple[Tensor, Tensor]:
        batch = Batch(torch.arange(9)[None], mesh, documents=[4, 5])
        local = batch.sharding.split(q, 2)
        return batch.attend(local, local, local), ringattn.attention(
            local, local, local, batch.mask, sharding=batch.sharding
        )

    for ours, right in ringattn.simulate(attended, ring=2).results:
        assert torch.equal(ours, right)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokens": torch.arange(1, 13)[None]}, "tokens"),
        ({"labels": torch.full((1, 12), IGNORED)}, "labels"),
        ({"documents": [6, 6]}, "mask"),
        ({"tokens": torch.arange(13)[None], "documents": [5, 8]}, "shape"),
        ({"layout": "zigzag"}, "layout"),
    ],
)
def test_another_sample_on_one_rank_is_named_on_all(changed: dict[str, Any], named: str) -> None:
    def told(mesh: ringattn.Mesh) -> str:
        arguments: dict[str, Any] = {"tokens": torch.arange(12)[None], "documents": [5, 7]} | (
            changed if mesh.rank == 2 else {}
        )
        with pytest.raises(AgreementError, match=rf"differ in.* {named} \(rank 0, 1: .*; rank 2: ") as caught:
            Batch(arguments.pop("tokens"), mesh, **arguments)
        return str(caught.value)

    assert len(set(ringattn.simulate(told, ring=3).results)) == 1


@pytest.mark.parametrize("scatter", [False, True])
def test_a_rank_that_refuses_its_sample_is_heard_by_the_others(scatter: bool) -> None:
    def told(mesh: ringattn.Mesh) -> str:
        with pytest.raises((InputError, AgreementError)) as caught:
            Batch(torch.arange(12)[None], mesh, documents=[5, 7 + (mesh.rank == 1)], scatter=scatter)
        assert (caught.type is InputError) == (mesh.rank == 1)
        return str(caught.value)

    first, second, third = ringattn.simulate(told, ring=3).results
    assert first == third == f"Rank 1 refused its sample: InputError: {second}" and "which is 13" in second


def test_another_mask_on_one_rank_of_scattered_samples() -> None:
    def told(mesh: ringattn.Mesh) -> None:
        mask = ringattn.Full() if mesh.rank else ringattn.Causal()
        with pytest.raises(AgreementError, match=r"differ in mask \(rank 0: causal; rank 1: full\)"):
            Batch(torch.arange(12)[None], mesh, mask=mask, scatter=True)

    ringattn.simulate(told, ring=2)


@pytest.mark.parametrize(
    ("tokens", "options", "said"),
    [
        (torch.zeros(1, 4), {}, r"integers \[batch, tokens\].*float32 \[1, 4\]"),
        ([1, 2], {}, r"integers \[batch, tokens\]"),
        (torch.zeros(4, dtype=torch.int64), {}, r"integers \[batch, tokens\].*\[4\]"),
        (ROW, {"labels": torch.zeros(1, 3, dtype=torch.int64)}, "labels must be shaped"),
        (ROW, {"documents": [2, 3]}, "sum to the 4 tokens"),
        (ROW, {"documents": [[2, 2], [4]]}, "each of 1 rows; got 2"),
        (ROW, {"documents": [-1, 5]}, "length in documents"),
        (ROW, {"documents": "4"}, "documents must be lengths"),
        (ROW, {"mask": "causal"}, "mask must be"),
        (ROW, {"positions": "local"}, "positions must be one of"),
        (ROW, {"layout": "round"}, "layout"),
    ],
)
def test_wrong_arguments_are_refused(tokens: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Batch(tokens, ringattn.init(), **options)


def _replicas(mesh: ringattn.Mesh) -> tuple[int, int, str]:
    """Two replicas of two ranks, of other lengths; then one of them refuses its sample."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = ringattn.Mesh.from_device_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")), "cp", data="dp")
    replica = mesh.coordinates["data"]
    replicated = Batch(torch.arange(5 + replica)[None], mesh).count
    scattered = Batch(torch.arange(5 + mesh.rank)[None], mesh, scatter=True).count
    try:
        Batch(torch.arange(5)[None], mesh, documents=[4 + (replica == 0)])
    except (InputError, AgreementError) as error:
        return replicated, scattered, str(error)
    return replicated, scattered, ""


def test_labels_are_counted_over_replicas_and_refusals_heard_there(gloo: Workers) -> None:
    found = gloo.run(4, _replicas)
    assert [each[:2] for each in found] == [(4 + 5, 4 + 5 + 6 + 7)] * 4
    assert "A replica of this rank refused its batch" in found[0][2] == found[1][2]
    assert all("sum to the 5 tokens" in text for *_, text in found[2:])
