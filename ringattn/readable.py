"""Values as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shortened(text: str, most: int = 80) -> str:
    """The text, or its beginning and its length where it is long, as that of many documents is."""
    return text if len(text) <= most else f"{text[: most - 20]}… ({len(text)} characters)"


def differing(said: Sequence[Mapping[str, str]], names: Iterable[str]) -> str:
    """What ranks say differently under these names, and who says what; empty where all are alike.

    >>> differing([{"mask": "full"}, {"mask": "causal"}, {"mask": "full"}], ["mask"])
    'mask (rank 0, 2: full; rank 1: causal)'
    """
    found = []
    for name in names:
        values: dict[str, list[int]] = {}
        for rank, each in enumerate(said):
            values.setdefault(each.get(name, "nothing"), []).append(rank)
        if len(values) > 1:
            words = "; ".join(f"rank {', '.join(map(str, ranks))}: {value}" for value, ranks in values.items())
            found.append(f"{name} ({words})")
    return " and ".join(found)


def readable_bytes(count: float) -> str:
    """Bytes with a unit.

    >>> readable_bytes(999), readable_bytes(1_150_000)
    ('999 B', '1.15 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def readable_count(count: float) -> str:
    """A number in short.

    >>> readable_count(562125), readable_count(12)
    ('562k', '12')
    """
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def readable_seconds(seconds: float) -> str:
    """Seconds with a unit.

    >>> readable_seconds(7e-6), readable_seconds(0.02), readable_seconds(75)
    ('7 us', '20 ms', '75 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
