"""Laws of the packed data: what a rank sees, it sees whatever the other ranks are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.errors import InputError
from ringattn.trainer.data import Corpus, join_documents, read_corpus

documents = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=8)


@given(documents)
def test_files_are_the_documents_of_a_pack(pieces: list[bytes]) -> None:
    pack = join_documents(pieces)
    assert pack.tokens.tolist() == [list(b"".join(pieces))]
    assert pack.count == sum(len(piece) - 1 for piece in pieces)


@given(documents, st.integers(1, 100), st.integers(0, 5))
def test_a_pack_is_full_and_made_of_stretches_of_files(pieces: list[bytes], length: int, index: int) -> None:
    pack = Corpus(tuple(pieces), seed=3).pack(index, length)
    assert pack.documents is not None and sum(pack.documents) == pack.tokens.shape[1] == length
    for stretch in pack.tokens[0].split(pack.documents):
        assert any(bytes(stretch.tolist()) in piece for piece in pieces)


@given(documents, st.integers(2, 60))
def test_a_token_sees_its_own_document_only(pieces: list[bytes], length: int) -> None:
    pack = Corpus(tuple(pieces), seed=0).pack(0, length)
    positions, lengths = torch.arange(length), pack.documents or ()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = (owner[:, None] == owner) & (positions[:, None] >= positions)
    assert torch.equal(pack.mask.dense(positions, positions), expected)
    starts = torch.tensor([0, *lengths]).cumsum(0)[owner]
    assert torch.equal(pack.mask.local_positions(positions), positions - starts)


def test_packs_repeat_by_number_and_differ_from_step_to_step(texts: Path) -> None:
    files, _ = read_corpus(texts)
    first, again = Corpus(files, seed=1), Corpus(files, seed=1)
    packs = [first.pack(i, 64) for i in range(20)]
    for i in reversed(range(20)):
        assert torch.equal(again.pack(i, 64).tokens, packs[i].tokens)
    assert len({bytes(pack.tokens[0].tolist()) for pack in packs}) == 20
    assert any(not torch.equal(Corpus(files, seed=2).pack(i, 64).tokens, packs[i].tokens) for i in range(20))


def test_held_out_files_are_held_out_whatever_the_order(texts: Path) -> None:
    train, held_out = read_corpus(texts)
    assert len(train) == 11 and len(held_out) == 1  # empty, hidden and binary files are passed over
    assert not set(train) & set(held_out)
    (texts / "long.txt").touch()
    assert read_corpus(texts) == (train, held_out)


def test_the_end_of_a_single_file_is_held_out(texts: Path) -> None:
    text = (texts / "long.txt").read_bytes()
    (train,), (held_out,) = read_corpus(texts / "long.txt")
    assert train + held_out == text and len(held_out) == round(0.05 * len(text))


def test_the_standard_library_is_there() -> None:
    train, held_out = read_corpus(None)
    assert len(train) > 300 and len(held_out) > 15
    assert not set(train) & set(held_out) - {b"\n"}


@pytest.mark.parametrize(
    ("name", "says"),
    [("missing", "no file or folder"), ("empty.txt", "0 bytes"), ("picture.bin", "not text"), ("void", "no text")],
)
def test_data_that_cannot_be_used(texts: Path, name: str, says: str) -> None:
    (texts / "void").mkdir()
    with pytest.raises(InputError, match=says):
        read_corpus(texts / name)
