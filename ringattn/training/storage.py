"""Where a checkpoint's tensors are: their numbers, as they are in memory, in one file per rank, and a manifest in JSON.

Storage for torch.distributed.checkpoint, beside its own, whose index is a pickle. Here reading is parsing: whatever a
file holds, nothing of it is run.

    step-00000020/manifest.json     two lines: what this is and a checksum of the second; everything but the numbers
    step-00000020/0.bin             the numbers that rank 0 wrote

A checkpoint is written to `.step-00000020.new` and takes its name when all of it is on the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ringattn.checking import shown
from ringattn.errors import CheckpointError
from ringattn.readable import dtype_name

MANIFEST = "manifest.json"
FORMAT, VERSION = "ringattn checkpoint", 1
DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}
CONTENT = {"step", "data", "optimizer", "random"}
PARSING = (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What looking for something in a text that may say anything can raise."""
_HEAD_BYTES = 4096
_STEP = re.compile(r"step-(\d{8,})")
_RETIRED = re.compile(r"\.step-(\d{8,})\.old")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor, and where its numbers are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    crc: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def parsed(cls, said: Mapping[str, Any], files: Mapping[str, int]) -> Stored:
        """From the manifest, which may say anything; raises ValueError, TypeError or KeyError."""
        pieces = tuple(
            Piece(tuple(map(int, offsets)), tuple(map(int, sizes)), str(file), int(start), int(length), int(crc))
            for offsets, sizes, file, start, length, crc in said["pieces"]
        )
        stored = cls(DTYPES[said["dtype"]], tuple(map(int, said["shape"])), pieces)
        if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(stored.shape):
            raise ValueError("its pieces are not the whole tensor")
        for piece in pieces:
            ends = zip(piece.offsets, piece.sizes, stored.shape, strict=True)
            if any(offset < 0 or size < 0 or offset + size > most for offset, size, most in ends):
                raise ValueError("a piece lies outside its tensor")
            if piece.length != math.prod(piece.sizes) * stored.dtype.itemsize:
                raise ValueError("a piece has another size than its numbers")
            if not 0 <= piece.start <= files[piece.file] - piece.length:
                raise ValueError("a piece lies outside its file")
        return stored


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        content: everything but tensors, as it was handed in.
        checksum: of the manifest.
    """

    path: Path
    content: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    checksum: str

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads the manifest of one checkpoint, and compares the sizes of its files.

        Raises:
            CheckpointError: it is no checkpoint, one of a later version, or damaged.
        """
        try:
            if not (path / MANIFEST).is_file():  # a pipe would be waited for
                raise FileNotFoundError
            head, _, body = (path / MANIFEST).read_bytes().partition(b"\n")
            said = json.loads(head)
            if said["format"] != FORMAT:
                raise ValueError
        except PARSING as error:
            raise CheckpointError(
                f"{path} is no checkpoint of ringattn: it has no {MANIFEST} that says so. Pass a folder that "
                f"ringattn.training.checkpoint.save has written."
            ) from error
        if said.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has version {shown(said.get('version'))} of the format; this ringattn reads version {VERSION}."
            )
        if said.get("checksum") != _checksum(body):
            raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum is another. Load an earlier step.")
        try:
            content = json.loads(body)
            files = {str(name): int(size) for name, size in content["files"].items()}
            _check_files(path, files)
            tensors = {str(name): Stored.parsed(each, files) for name, each in content["tensors"].items()}
            if {*content["content"]} != CONTENT:
                raise ValueError(f"its content is not {', '.join(sorted(CONTENT))}")
            return cls(path, content["content"], tensors, said["checksum"])
        except PARSING as error:
            raise CheckpointError(f"{path} is damaged: {error}. Load an earlier step.") from error


def _check_files(path: Path, files: Mapping[str, int]) -> None:
    for name, size in files.items():
        if not re.fullmatch(r"\d+\.bin", name):
            raise ValueError(f"{shown(name)} is no name of a file of a checkpoint")
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes and should have {size}")


def _checksum(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def complete(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder, by their step: those that have been written to the end."""
    if not folder.is_dir():
        return {}
    names = [path for path in folder.iterdir() if _is_ours(path)]
    found = {int(match[1]): path for path in names if (match := _RETIRED.fullmatch(path.name))}
    return found | {int(match[1]): path for path in names if (match := _STEP.fullmatch(path.name))}


def _is_ours(path: Path) -> bool:
    try:
        if not (path / MANIFEST).is_file():
            return False
        with (path / MANIFEST).open("rb") as file:
            return bool(json.loads(file.readline(_HEAD_BYTES))["format"] == FORMAT)
    except PARSING:
        return False


class Writer(StorageWriter):
    """Writes one checkpoint, on every rank; it is there when the first rank's `finish` has returned.

    Args:
        folder: of all checkpoints.
        content: what goes into the manifest.
        keep: how many checkpoints are left in the folder; None for all.
    """

    def __init__(self, folder: Path, step: int, content: Mapping[str, Any], keep: int | None) -> None:
        super().__init__()
        self.folder, self.content, self.keep = folder, content, keep
        self.path = folder / f"step-{step:08}"
        self._new = folder / f".step-{step:08}.new"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            if self.path.exists() and not _is_ours(self.path):
                raise CheckpointError(
                    f"{self.path} is there, and is no checkpoint of ringattn. Save to another folder."
                )
            shutil.rmtree(self._new, ignore_errors=True)  # of a save that was killed
            self._new.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"{rank}.bin") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with (self._new / plan.storage_data).open("wb") as file:
            for item in plan.items:
                numbers = planner.resolve_data(item)
                assert isinstance(numbers, Tensor)  # nothing else was handed in
                raw = _bytes(numbers.detach().cpu())
                where = (plan.storage_data, file.tell(), len(raw), zlib.crc32(raw))
                results.append(WriteResult(item.index, len(raw), where))
                file.write(raw)
            _to_disk(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {result.index: result.storage_data for result in itertools.chain.from_iterable(results)}
        files = {f"{rank}.bin": sum(each.size_in_bytes for each in written) for rank, written in enumerate(results)}
        tensors = {name: _described(name, stored, where) for name, stored in metadata.state_dict_metadata.items()}
        try:
            _check_files(self._new, files)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"Not all ranks write to the same folder {self.folder}: {error}. It must be one that they share."
            ) from error
        self._write_manifest({"content": self.content, "files": files, "tensors": tensors})
        self._take_place()
        self._remove_old()

    def _write_manifest(self, content: Mapping[str, Any]) -> None:
        body = json.dumps(content).encode()
        head = {"format": FORMAT, "version": VERSION, "checksum": _checksum(body)}
        with (self._new / MANIFEST).open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + body)
            _to_disk(file.fileno())
        _folder_to_disk(self._new)

    def _take_place(self) -> None:
        """Renames it. One of the same step goes aside before, under a name by which it is still found."""
        old = self.folder / f".{self.path.name}.old"
        if self.path.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
        self._new.rename(self.path)
        _folder_to_disk(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _remove_old(self) -> None:
        there = complete(self.folder)
        for step in sorted(there)[: -self.keep] if self.keep else ():
            if there[step] != self.path:
                shutil.rmtree(there[step], ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, (str, os.PathLike))


def _described(name: str, stored: Any, where: Mapping[MetadataIndex, Any]) -> dict[str, Any]:
    """A tensor, as the manifest has it."""
    dtype = dtype_name(stored.properties.dtype)
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is of {dtype}, which a checkpoint cannot hold; it holds {', '.join(DTYPES)}.")
    pieces = [
        (list(chunk.offsets), list(chunk.sizes), *where[MetadataIndex(name, chunk.offsets)]) for chunk in stored.chunks
    ]
    return {"dtype": dtype, "shape": list(stored.size), "pieces": pieces}


class Reader(StorageReader):
    """Reads what a plan asks for of one checkpoint."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self._path, self._tensors = manifest.path, manifest.tensors

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=stored.dtype),
                    torch.Size(stored.shape),
                    [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in stored.pieces],
                )
                for name, stored in self._tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All that is needed was read before."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[Piece, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(self._piece(item.storage_index), []).append(item)
        for piece, numbers in self._read(wanted):
            for item in wanted[piece]:
                part = numbers
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _piece(self, index: MetadataIndex) -> Piece:
        offsets = tuple(index.offset or ())
        return next(piece for piece in self._tensors[index.fqn].pieces if piece.offsets == offsets)

    def _read(self, wanted: Mapping[Piece, list[Any]]) -> Iterator[tuple[Piece, Tensor]]:
        """The pieces with their numbers, in the order in which they lie on the disk."""
        for name, pieces in itertools.groupby(sorted(wanted, key=lambda p: (p.file, p.start)), lambda p: p.file):
            with (self._path / name).open("rb") as file:
                for piece in pieces:
                    file.seek(piece.start)
                    raw = bytearray(file.read(piece.length))
                    fqn = wanted[piece][0].storage_index.fqn
                    if len(raw) != piece.length or zlib.crc32(raw) != piece.crc:
                        raise CheckpointError(
                            f"{self._path / name} is damaged: the checksum of {fqn} is another. Load an earlier step."
                        )
                    dtype = self._tensors[fqn].dtype
                    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                    yield piece, flat.view(piece.sizes)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, (str, os.PathLike))


def _bytes(numbers: Tensor) -> memoryview:
    flat: Any = numbers.contiguous().view(-1).view(torch.uint8).numpy()  # typed as no buffer, which it is
    return memoryview(flat)


def _to_disk(descriptor: int) -> None:
    """Only now may the name be given: else a computer that loses power could keep the name and not the numbers."""
    os.fsync(descriptor)


def _folder_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
