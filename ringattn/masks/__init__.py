"""The masks: which (query, key) pairs are allowed, in global positions.

`base` is the contract and how masks combine; `banded` has the masks made of bands, `blockwise` those made of blocks;
`spelling` lists them and reads them from text. To add a mask, write one class with `Mask.regions`, `Mask.allows` and
how it is spelled, and its name in `MEMBERS`, here and in ``ringattn/__init__.py``. A class outside the package needs
no more than the class: ``module:Name`` is its text.
"""

from ringattn.masks.banded import Causal, Documents, Full, Prefix, SinkTokens, Window
from ringattn.masks.base import And, Mask, Not, Or, Positions, Transposed, checked
from ringattn.masks.blockwise import Blocks, Predicate
from ringattn.masks.spelling import MEMBERS, parse, spellings

__all__ = [
    "MEMBERS",
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
    "Transposed",
    "Window",
    "checked",
    "parse",
    "spellings",
]
