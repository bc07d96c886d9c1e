"""Ulysses: heads for sequence before, and back after (DeepSpeed-Ulysses, arXiv 2309.14509; with a ring, 2405.07719).

The ranks along the ulysses axis are a group. In one all-to-all each gives the others its tokens of their heads, and so
has all tokens of the group, of some heads; it attends to these as one rank of a ring of groups, by whatever schedule;
and a second all-to-all brings the outputs home. In a group every rank sends what it holds once, however many it has,
where a ring moves it on from rank to rank; but there can be no more ranks in it than query heads, and key heads that
are fewer go to several of them.
"""

from __future__ import annotations

import dataclasses

from ringattn.checking import flag, integer
from ringattn.errors import InputError
from ringattn.plans.shape import GradientWire
from ringattn.schedules.base import Scheme, check_wire


@dataclasses.dataclass(frozen=True)
class Ulysses(Scheme):
    """Exchange heads for sequence around a schedule along the ring.

    Attributes:
        inner: the schedule along the ring axis, its name, or ``auto``.
        slices: into how many slices the heads of a rank are cut, at most as many as it has key heads: the exchange of
            one goes on while the one before is computed.
        keep: whether what the first all-to-all brought is kept for the backward pass, as much memory again as q, k, v
            and the output take. Otherwise all of it is exchanged again.
        gradient_wire: the dtype in which gradients travel of key heads that several ranks have read, and which are
            added up at home: ``float32`` (float64 for float64 inputs), or ``input`` for the inputs' own.
    """

    inner: Scheme | str = "auto"
    slices: int = 1
    keep: bool = True
    gradient_wire: GradientWire = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", integer(self.slices, "Ulysses's slices", least=1, needed="a number"))
        flag(self.keep, "Ulysses's keep")
        check_wire(self.gradient_wire)
        if isinstance(self.inner, Ulysses) or (isinstance(self.inner, str) and self.inner == "ulysses"):
            raise InputError("Ulysses exchanges heads once; its inner schedule is one along the ring, such as 'route'.")

    @property
    def asks_for_nodes(self) -> bool:
        return isinstance(self.inner, Scheme) and self.inner.asks_for_nodes

    def __str__(self) -> str:
        return f"ulysses({self.inner})"
