"""Layouts by name, and the one that ``auto`` takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ringattn.errors import InputError
from ringattn.layouts.balanced import Balanced
from ringattn.layouts.base import Layout
from ringattn.layouts.simple import Contiguous, Striped, Zigzag
from ringattn.masks import Causal, Mask, checked


def named(layout: Any, mask: Mask | None, length: int) -> Layout:
    """The layout itself, or the one of this name; ``auto`` chooses by the mask (see `chosen`)."""
    if isinstance(layout, Layout):
        return layout
    match layout:
        case "contiguous":
            return Contiguous()
        case "zigzag":
            return Zigzag()
        case "striped":
            return Striped()
        case "balanced" if mask is not None:
            return Balanced(mask)
        case "balanced":
            raise InputError("layout='balanced' needs to know what to balance: give the mask, or Balanced(mask).")
        case "auto":
            return chosen(mask, length)
    raise InputError(
        f"layout must be a Layout or one of 'auto', 'balanced', 'contiguous', 'zigzag', 'striped'; got {layout!r}."
    )


def chosen(mask: Mask | None, length: int) -> Layout:
    """What ``auto`` takes: balanced, and where that comes to the same or moves more than it gains, the simpler one.

    One band over the whole sequence is contiguous when it is full or a window, whose rows weigh alike but for its ends,
    and zigzag when it is causal. Without a mask, contiguous.
    """
    if mask is None:
        return Contiguous()
    regions = checked(mask).regions(length, length)
    if len(regions) > 1 or len(mask.undecided(length, length)):
        return Balanced(mask)
    one_triangle = Causal().regions(length, length)
    return Zigzag() if length and np.array_equal(regions, one_triangle) else Contiguous()
