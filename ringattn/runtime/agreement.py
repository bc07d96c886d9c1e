"""Agreement: the ranks of a call make sure that it is the same call on all of them before any payload moves.

Ranks that were called with different arguments would hang, or silently read each other's bytes as something else
(Gloo fills a longer receive partly, and reinterprets another dtype). So each reduces its call to one word of eight
bytes, and all learn the smallest and the largest word of any rank: ceil(log2 P) messages of 16 bytes a rank, in the
pattern of the dissemination barrier (Hensgen, Finkel and Manber 1988), which is exact for any P because a minimum may
be taken of the same word twice. Only where the two differ do the ranks exchange what the words stand for, and all raise
the same error.

A transport whose payload waits for a GPU (NCCL) compares over another one, when the pass has been started and while the
GPU works: ranks that differ raise before the call returns.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from ringattn.checking import shown
from ringattn.errors import AgreementError, InputError, TransportError
from ringattn.readable import differing, dtype_name, shortened
from ringattn.runtime.transforms import outside_transforms, refuse_transforms
from ringattn.transports.base import Transport

T = TypeVar("T")

FIELDS = ("call", "shapes", "dtype", "mask", "layout", "schedule", "kernel", "mechanism", "gradients", "seed")
"""What is compared."""
ADVICE = "Call with the same arguments on every rank."

_REFUSED = "refused"
_TEXT_BYTES = 4096
_VALUE_LENGTH = 160
_REFUSAL_LENGTH = 900


@functools.lru_cache(maxsize=1024)  # most of a call's fields are those of the call before
def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def digest(fields: Mapping[str, str]) -> bytes:
    """A hash of each field of a call. Fields that a call does not have are empty."""
    unknown = set(fields) - {*FIELDS, _REFUSED}
    if unknown:
        raise KeyError(f"no such field of a call: {unknown}")
    return b"".join(map(_hash, map(fields.get, (*FIELDS, _REFUSED), itertools.repeat(""))))


def begin(transport: Transport, fields: Mapping[str, str]) -> Callable[[], None]:
    """Checks now where payload and words travel together; else returns what checks when the payload is under way."""
    if transport.control is not transport:
        return functools.partial(check, transport, fields)
    check(transport, fields)
    return nothing


def nothing() -> None:
    """What is left to compare where all has been."""


def about(transport: Transport, call: str, x: torch.Tensor, **fields: str) -> Callable[[], None]:
    """`begin` for a call with one tensor, which is alike on all ranks but for its content."""
    if not transport.agrees:
        return nothing
    return begin(transport, {"call": call, "shapes": str(list(x.shape)), "dtype": dtype_name(x.dtype), **fields})


@contextlib.contextmanager
def telling(transport: Transport, what: str, *tensors: torch.Tensor) -> Iterator[None]:
    """Arguments are checked within: the other ranks, which wait for this one, hear of what it raises."""
    try:
        for x in tensors:
            if not isinstance(x, torch.Tensor):
                raise InputError(f"{what} takes tensors; got {shown(x)}.")
        refuse_transforms(what, *tensors)
        yield
    except Exception as error:
        refuse(transport, error)
        raise


def check(transport: Transport, fields: Mapping[str, str], advice: str = ADVICE) -> None:
    """Compares this rank's fields with every other's. ``advice`` is what to do where they differ.

    Raises:
        AgreementError: on every rank alike, naming the ranks and the fields that differ, with their values.
    """
    if not transport.agrees:
        return
    texts = _difference(transport, fields, f"the agreement before {fields.get('call', 'call')}")
    if texts is None:
        return
    refused = [
        f"Rank {rank} refused this call: {text[_REFUSED]}" for rank, text in enumerate(texts) if _REFUSED in text
    ]
    if refused:
        raise AgreementError(" ".join(refused))
    names: tuple[str, ...] = FIELDS
    if any(text.keys() != texts[0].keys() for text in texts):  # calls of other kinds: the rest follows from it
        names, advice = FIELDS[:1], ADVICE
    raise AgreementError(
        f"The ranks of one call were called with different arguments: they differ in {differing(texts, names)}. "
        f"{advice}"
    )


def decide(transport: Transport, fields: Mapping[str, str], subject: str, choose: Callable[[], int]) -> int:
    """The same number, below 2^63, on all ranks: what rank 0 chooses the first time they decide on this subject.

    Every rank calls it for the same subjects in the same order, with the fields of the call it is for. A rank that
    refuses the call is heard here.

    Raises:
        AgreementError: on every rank alike, where they do not prepare the same call.
    """
    if subject not in transport.decisions:
        own = choose() if transport.rank == 0 else 0
        if transport.size > 1:
            check(transport, {**fields, "call": "choice"})
            own = int.from_bytes(_spread(transport, own.to_bytes(8, "little"), subject)[0], "little")
        transport.decisions[subject] = own
    return transport.decisions[subject]


def decided(transport: Transport | None, subject: str, choose: Callable[[], int]) -> int:
    """What the ranks have decided or, where they have not yet, what this one chooses. Sends nothing."""
    own = choose()
    return own if transport is None else transport.decisions.get(subject, own)


def refuse(transport: Transport, error: Exception) -> None:
    """Tells every other rank, which is about to compare digests, that this one will not take part in the call.

    Where they cannot be told, the error that made this rank refuse is still the one to raise.
    """
    if transport.agrees:
        refused = {_REFUSED: f"{type(error).__name__}: {error}"}
        with contextlib.suppress(TransportError), outside_transforms():
            _difference(transport, refused, "the agreement before a refused call")


def _difference(transport: Transport, fields: Mapping[str, str], label: str) -> list[dict[str, str]] | None:
    """Every rank's fields as they are shown, where not all of them are equal."""
    if alike(transport, digest(fields), label):
        return None
    transport.forget_calls()
    shown = json.dumps({name: _shown(name, text) for name, text in fields.items()}, ensure_ascii=False).encode()
    texts = _spread(transport, shown.ljust(_TEXT_BYTES), label)
    return [json.loads(text) for text in texts]


def _shown(name: str, text: str) -> str:
    """The text; of a long one the beginning, and a hash that tells it from others which begin alike."""
    if name == _REFUSED:
        return shortened(text, _REFUSAL_LENGTH)
    short = shortened(text, _VALUE_LENGTH)
    return short if short == text else f"{short} #{_hash(text).hex()}"


def alike(transport: Transport, own: bytes, label: str) -> bool:
    """Whether every rank says the same, as far as a hash of 64 bits tells."""
    control, me, size = transport.control, transport.rank, transport.size
    least = most = int.from_bytes(hashlib.blake2b(own, digest_size=8).digest(), "little", signed=True)
    distance = 1
    while distance < size:  # by now this rank knows the extremes of as many ranks before it
        mine, theirs = torch.tensor((least, most), device="cpu"), torch.empty(2, dtype=torch.int64, device="cpu")
        there, here = (me + distance) % size, (me - distance) % size
        control.exchange([(there, mine)], [(here, theirs)], label=label, control=True).wait()
        low, high = theirs.tolist()
        least, most, distance = min(least, low), max(most, high), 2 * distance
    return least == most


def exchanged(transport: Transport, own: bytes, label: str) -> list[bytes]:
    """What every rank has to say, by rank, all of one size; a few bytes of bookkeeping before a payload moves.

    ceil(log2 P) messages a rank, and as many by which they make sure that all of them are here: what one rank sent for
    something else would be taken for it, or end the process where it is longer.

    Raises:
        AgreementError: on every rank, where one of them is somewhere else.
    """
    check(transport, {"call": label})
    return _spread(transport, own, label)


def _spread(transport: Transport, own: bytes, label: str) -> list[bytes]:
    """Each hands on all that it has heard (Bruck et al. 1997, section 3)."""
    control, me, size = transport.control, transport.rank, transport.size
    heard = torch.empty((size, len(own)), dtype=torch.uint8, device="cpu")  # of this rank, the next one, and so on
    heard[0] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    have = 1
    while have < size:
        more = min(have, size - have)
        there, here = (me - have) % size, (me + have) % size
        sends, receives = [(there, heard[:more])], [(here, heard[have : have + more])]
        control.exchange(sends, receives, label=label, control=True).wait()
        have += more
    return list(map(bytes, heard.roll(me, 0).numpy()))


def gathered(transport: Transport, value: T, label: str) -> list[T]:
    """Every rank's value, by rank: anything that pickles, of any size."""
    raw = pickle.dumps(value)
    sizes = [int.from_bytes(each, "little") for each in exchanged(transport, len(raw).to_bytes(8, "little"), label)]
    every = _spread(transport, raw.ljust(max(sizes)), label)
    return [pickle.loads(each[:size]) for each, size in zip(every, sizes, strict=True)]
