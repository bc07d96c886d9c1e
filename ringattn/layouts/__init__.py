"""The layouts: who holds which positions.

`base` is the contract; `simple` and `balanced` have the members; `choice` lists them and takes them by name. To add a
layout, write one class with `Layout.spans` and a text, its line in ``MEMBERS`` and its name here and in
``ringattn/__init__.py``. One from outside the package is given as an instance or as ``module:Name``.
"""

from ringattn.layouts.balanced import Balanced
from ringattn.layouts.base import COUNT, OFFSET, RANK, START, STRIDE, Layout, counts, positions
from ringattn.layouts.choice import MEMBERS, NAMED, chosen, named
from ringattn.layouts.grouped import Grouped
from ringattn.layouts.simple import Contiguous, Explicit, Striped, Zigzag

__all__ = [
    "COUNT",
    "MEMBERS",
    "NAMED",
    "OFFSET",
    "RANK",
    "START",
    "STRIDE",
    "Balanced",
    "Contiguous",
    "Explicit",
    "Grouped",
    "Layout",
    "Striped",
    "Zigzag",
    "chosen",
    "counts",
    "named",
    "positions",
]
