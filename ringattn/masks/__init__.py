"""The masks: which (query, key) pairs are allowed, in global positions.

`base` is the contract and how masks combine; `banded` has the masks made of bands, `blockwise` those made of blocks;
`spelling` reads them from text. To add a mask, write one class with `Mask.regions`, `Mask.allows` and a text, and its
line here and in ``ringattn/__init__.py``.
"""

from ringattn.masks.banded import Causal, Documents, Full, Prefix, SinkTokens, Window
from ringattn.masks.base import And, Mask, Not, Or, Positions, checked, shortened
from ringattn.masks.blockwise import Blocks, Predicate
from ringattn.masks.spelling import parse

__all__ = [
    "And",
    "Blocks",
    "Causal",
    "Documents",
    "Full",
    "Mask",
    "Not",
    "Or",
    "Positions",
    "Predicate",
    "Prefix",
    "SinkTokens",
    "Window",
    "checked",
    "parse",
    "shortened",
]
