"""Agreement: every rank of a call compares a digest of it with every other before any payload moves.

Ranks that were called with different arguments would hang, or silently read each other's bytes as something else
(Gloo fills a longer receive partly, and reinterprets another dtype). A digest of 72 bytes, eight a field, always has
the same size and so can always be exchanged; each rank sees all of them and raises the same error.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping

import torch

from ringattn.errors import AgreementError, TransportError
from ringattn.transports.base import Transport

FIELDS = ("call", "shapes", "dtype", "mask", "layout", "schedule", "mechanism", "gradients", "seed")
"""What is compared, eight bytes each: short text as it is, longer text as a hash."""

_REFUSED = "refused"


def _word(text: str) -> bytes:
    raw = text.encode()
    return raw.ljust(8, b"\0") if len(raw) <= 8 else hashlib.blake2b(raw, digest_size=8).digest()


def _shown(word: bytes) -> str:
    text = word.rstrip(b"\0")
    return text.decode() if text.isascii() and text.decode().isprintable() else f"#{word.hex()}"


def digest(fields: Mapping[str, str]) -> bytes:
    """The 72 bytes of a call. Fields that a call does not have are empty."""
    unknown = set(fields) - set(FIELDS)
    if unknown:
        raise KeyError(f"no such field of a digest: {unknown}")
    return b"".join(_word(fields.get(name, "")) for name in FIELDS)


def check(transport: Transport, fields: Mapping[str, str], device: torch.device) -> None:
    """Compares this rank's fields with every other's.

    Raises:
        AgreementError: on every rank alike, naming the ranks and the fields that differ.
    """
    if not transport.agreement or transport.size == 1:
        return
    words = _exchanged(transport, digest(fields), device, fields.get("call", "call"))
    if len(set(words)) > 1:
        transport.forget_calls()
    refused = [rank for rank, word in enumerate(words) if _shown(word[:8]) == _REFUSED]
    if refused:
        who = ", ".join(map(str, refused))
        raise AgreementError(f"Rank {who} refused this call; the error raised there says why.")
    problems = []
    for place, name in enumerate(FIELDS):
        values: dict[bytes, list[int]] = {}
        for rank, word in enumerate(words):
            values.setdefault(word[8 * place : 8 * place + 8], []).append(rank)
        if len(values) > 1:
            said = "; ".join(f"rank {', '.join(map(str, ranks))}: {_shown(v)}" for v, ranks in values.items())
            problems.append(f"{name} ({said})")
    if problems:
        own = ", ".join(f"{name} {value}" for name, value in fields.items() if len(value) < 200)
        raise AgreementError(
            f"The ranks of one call were called with different arguments: they differ in {' and '.join(problems)}. "
            f"Rank {transport.rank} has {own}. Call with the same arguments on every rank."
        )


def refuse(transport: Transport, device: torch.device) -> None:
    """Tells every other rank, which is about to compare digests, that this one will not take part in the call.

    Where they cannot be told, the error that made this rank refuse is still the one to raise.
    """
    if transport.agreement and transport.size > 1:
        with contextlib.suppress(TransportError):
            _exchanged(transport, digest({"call": _REFUSED}), device, _REFUSED)
            transport.forget_calls()


def _exchanged(transport: Transport, own: bytes, device: torch.device, call: str) -> list[bytes]:
    """Every rank's digest, by rank."""
    peers = [rank for rank in range(transport.size) if rank != transport.rank]
    mine = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    theirs = transport.buffers.take("digests", (transport.size, len(own)), torch.uint8, device)
    label = f"the agreement before {call}"
    sends, receives = [(peer, mine) for peer in peers], [(peer, theirs[peer]) for peer in peers]
    transport.exchange(sends, receives, label=label, control=True).wait()
    theirs[transport.rank].copy_(mine)
    return [bytes(row) for row in theirs.cpu().numpy()]
