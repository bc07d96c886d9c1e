"""Layouts by name, and the one that ``auto`` takes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ringattn import naming
from ringattn.layouts.balanced import Balanced, fitting
from ringattn.layouts.base import Layout
from ringattn.layouts.simple import Contiguous, Explicit, Striped, Zigzag
from ringattn.masks import Causal, Mask
from ringattn.naming import by_name

MEMBERS: tuple[type[Layout], ...] = (Contiguous, Zigzag, Striped, Balanced, Explicit)
"""Every layout, simpler ones first."""

NAMED: dict[str, type[Layout]] = by_name(member for member in MEMBERS if member is not Explicit)
"""Those that a name says all about."""


def named(layout: Any, mask: Mask | None, length: int) -> tuple[Layout, str]:
    """The layout itself, the one of this name or of ``module:Name``, and why; ``auto`` chooses by the mask."""
    if isinstance(layout, str) and layout == "auto":
        return chosen(mask, length)
    known = {name: functools.partial(member.from_mask, mask) for name, member in NAMED.items()}
    return naming.named("layout", layout, Layout, known, also=("auto",)), "as asked"


def chosen(mask: Mask | None, length: int) -> tuple[Layout, str]:
    """What ``auto`` takes, and why: balanced, or what comes to the same, or moves less, and is simpler.

    One band over the whole sequence is contiguous when it is full or a window, whose rows weigh alike but for its ends,
    and zigzag when it is causal. Without a mask, contiguous.
    """
    if mask is None:
        return Contiguous(), "auto took contiguous: no mask says that some tokens weigh more"
    regions, partial = fitting(mask, length)
    if len(regions) > 1 or len(partial):
        return Balanced(mask), "auto took balanced: the mask has several parts, which weigh differently"
    if length and np.array_equal(regions, Causal().regions(length, length)):
        return Zigzag(), "auto took zigzag: one causal sequence, which it balances"
    return Contiguous(), "auto took contiguous: one full or windowed band, whose rows weigh alike but for its ends"
