"""What one block contributes and how contributions merge: `base` is the contract, one file a member.

To add a mechanism, write one class and its line in ``MEMBERS`` and in ``ringattn/__init__.py``.
"""

from ringattn.mechanisms.base import Mechanism, Problem
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.entmax import Entmax
from ringattn.mechanisms.gated import Gated
from ringattn.mechanisms.hard import Hard
from ringattn.mechanisms.linear import Linear
from ringattn.mechanisms.mocha import MoChA
from ringattn.mechanisms.monotonic import Monotonic
from ringattn.mechanisms.sampled import Sampled
from ringattn.mechanisms.softmax import Softmax

MEMBERS: tuple[type[Mechanism], ...] = (Softmax, Hard, Linear, Entmax, Sampled, Gated, Monotonic, MoChA)
"""Every mechanism, the common one first."""

__all__ = [
    "MEMBERS",
    "Block",
    "Entmax",
    "Gated",
    "Hard",
    "Linear",
    "Mechanism",
    "MoChA",
    "Monotonic",
    "Problem",
    "Sampled",
    "Softmax",
]
