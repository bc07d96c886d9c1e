"""Layouts by name, and the one that ``auto`` takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ringattn.errors import InputError
from ringattn.layouts.balanced import Balanced, fitting
from ringattn.layouts.base import Layout
from ringattn.layouts.simple import Contiguous, Striped, Zigzag
from ringattn.masks import Causal, Mask


def named(layout: Any, mask: Mask | None, length: int) -> tuple[Layout, str]:
    """The layout itself, or the one of this name, and why; ``auto`` chooses by the mask (see `chosen`)."""
    if isinstance(layout, Layout):
        return layout, "as asked"
    match layout:
        case "contiguous":
            return Contiguous(), "as asked"
        case "zigzag":
            return Zigzag(), "as asked"
        case "striped":
            return Striped(), "as asked"
        case "balanced" if mask is not None:
            return Balanced(mask), "as asked"
        case "balanced":
            raise InputError("layout='balanced' needs to know what to balance: give the mask, or Balanced(mask).")
        case "auto":
            return chosen(mask, length)
    raise InputError(
        f"layout must be a Layout or one of 'auto', 'balanced', 'contiguous', 'zigzag', 'striped'; got {layout!r}."
    )


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
