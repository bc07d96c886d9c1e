"""The layouts: who holds which positions.

`base` is the contract; `simple` and `balanced` have the members; `choice` knows them by name. To add a layout, write
one class with `Layout.spans` and a text, and its line here and in ``ringattn/__init__.py``.
"""

from ringattn.layouts.balanced import Balanced
from ringattn.layouts.base import COUNT, OFFSET, RANK, START, STRIDE, Layout, counts, positions
from ringattn.layouts.choice import chosen, named
from ringattn.layouts.simple import Contiguous, Explicit, Striped, Zigzag

__all__ = [
    "COUNT",
    "OFFSET",
    "RANK",
    "START",
    "STRIDE",
    "Balanced",
    "Contiguous",
    "Explicit",
    "Layout",
    "Striped",
    "Zigzag",
    "chosen",
    "counts",
    "named",
    "positions",
]
