"""Text as bytes, packed: whole files side by side in one long sample, and where each of them ends.

    S   tokens of a pack, the context length (one token is one byte)

A pack is a pure function of (files, seed, index). No rank draws its own: every rank builds the same pack and
takes its part of it, so a run does not depend on how many ranks it had, and any step can be repeated by its
number.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ringattn.errors import InputError
from ringattn.training import Sample

HELD_OUT = 0.05  # share of the files kept for evaluation
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Files to draw packs from."""

    documents: tuple[bytes, ...]
    seed: int

    def pack(self, index: int, length: int) -> Sample:
        """Pack number `index`: files drawn at random until `length` tokens are full.

        A file that does not fit in what is left gives a random stretch of itself, so that every part of a
        file longer than the context is seen in time.
        """
        draw = np.random.default_rng([self.seed, index])
        pieces: list[bytes] = []
        room = length
        while room:
            document = self.documents[int(draw.integers(len(self.documents)))]
            size = min(len(document), room)
            start = int(draw.integers(len(document) - size + 1))
            pieces.append(document[start : start + size])
            room -= size
        return join_documents(pieces)


def join_documents(documents: Sequence[bytes]) -> Sample:
    """The documents side by side: each token sees those before it in its own document."""
    tokens = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).to(torch.int64)
    return Sample.of(tokens[None], documents=[len(document) for document in documents])


def read_corpus(path: Path | None) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The files to train on and the held-out ones, the same on every machine that has the same files.

    path: a text file, a folder (its text files, hidden ones apart), or None for Python's standard library.
    """
    if path is not None and not path.exists():
        raise InputError(f"There is no file or folder {path}; --data wants a text file or a folder of them.")
    try:
        if path is None:
            files = _library()
        elif path.is_file():
            files = {path.name: path.read_bytes()}
        else:
            files = _text_files(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if len(files) == 1:
        [(name, text)] = files.items()
        return _cut_in_two(text, name)
    if not files:
        raise InputError(f"{path} holds no text to train on; --data wants a text file or a folder of them.")
    # By the hash of a name, not by a random draw: a file stays on its side whatever the seed.
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = max(1, round(HELD_OUT * len(order)))
    return tuple(files[name] for name in order[held:]), tuple(files[name] for name in order[:held])


def _cut_in_two(text: bytes, name: str) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """A single file: its end is held out."""
    cut = len(text) - max(2, round(HELD_OUT * len(text)))
    if not _is_text(text):
        raise InputError(f"{name} is not text: it has a zero byte. --data wants a text file or a folder of them.")
    if cut < 2:
        raise InputError(f"{name} has {len(text)} bytes; training and held-out text need at least 4.")
    return (text[:cut],), (text[cut:],)


def _library() -> dict[str, bytes]:
    """The source of Python's standard library, without its tests and without what was installed beside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (file.relative_to(root) for file in root.rglob("*.py"))
    return _read(root, [name for name in names if not NOT_LIBRARY & set(name.parts)])


def _text_files(root: Path) -> dict[str, bytes]:
    names = [file.relative_to(root) for file in root.rglob("*") if file.is_file()]
    return _read(root, [name for name in names if not any(part.startswith(".") for part in name.parts)])


def _read(root: Path, names: Sequence[Path]) -> dict[str, bytes]:
    """Name -> bytes of the text files that are not empty, in the order of their names."""
    texts = {name.as_posix(): (root / name).read_bytes() for name in sorted(names)}
    return {name: text for name, text in texts.items() if text and _is_text(text)}


def _is_text(text: bytes) -> bool:
    return b"\0" not in text[:8192]  # the test that git and grep use
