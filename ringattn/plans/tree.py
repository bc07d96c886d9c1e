"""Trees: how what every rank has is folded into one, in the order of the ranks, and the result told to all.

A binomial tree: rank r takes over the folds of r + 1, r + 2, r + 4, … as long as r is a multiple of twice the distance,
and hands its own to the rank that comes before. So each fold is over a run of ranks, neighbours are folded with
neighbours, and the result, of rank 0, does not depend on who comes first, whatever is folded: it has to be associative,
and not commutative. Up and down again a rank sends and receives ceil(log2 P) messages at most; all ranks together send
2 (P - 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ringattn.errors import PlanError
from ringattn.plans.cost import Traffic


@dataclasses.dataclass(frozen=True)
class Tree:
    """One rank's part.

    Attributes:
        rank, size: this rank, of those that fold.
        children: whose folds it takes over, in that order.
        parent: whom it hands its own; None for rank 0.
    """

    rank: int
    size: int
    children: tuple[int, ...]
    parent: int | None

    @classmethod
    def of(cls, rank: int, size: int) -> Tree:
        """The part of a rank."""
        children, distance = [], 1
        while rank % (2 * distance) == 0 and rank + distance < size:
            children.append(rank + distance)
            distance *= 2
        parent = None if rank == 0 else rank & (rank - 1)  # without its lowest bit
        return cls(rank, size, tuple(children), parent)

    def traffic(self, up: int, down: int, backward: int = 0) -> Traffic:
        """What this rank moves, by the bytes of each fold ``up``, result ``down``, and sum in the backward pass."""
        below, above = len(self.children), int(self.parent is not None)
        return Traffic(
            messages=below + above,
            sent_tokens=0,
            received_tokens=0,
            sent_summaries=above,
            received_summaries=below,
            sent_bytes=above * up + below * down,
            received_bytes=below * up + above * down,
            backward_messages=(below + above) * bool(backward),
            backward_sent_bytes=(below + above) * backward,
            backward_received_bytes=(below + above) * backward,
        )


def verify_trees(trees: Sequence[Tree]) -> None:
    """Checks that the parts of all ranks fold every rank once, in order, and tell all of them.

    Raises:
        PlanError: says which rank's part is wrong.
    """
    size = len(trees)
    if [tree.rank for tree in trees] != list(range(size)) or any(tree.size != size for tree in trees):
        raise PlanError(f"A tree of {size} ranks is made of one part for each of them.")
    covered: dict[int, list[int]] = {}
    for tree in reversed(trees):
        reach = [tree.rank]
        for child in tree.children:
            if not tree.rank < child < size or trees[child].parent != tree.rank:
                raise PlanError(f"Rank {tree.rank} takes over the fold of {child}, which does not send it there.")
            reach += covered.pop(child, [])
        if reach != list(range(tree.rank, tree.rank + len(reach))):
            raise PlanError(f"Rank {tree.rank} folds the ranks {reach}, which are not a run of neighbours in order.")
        covered[tree.rank] = reach
    if covered != ({0: list(range(size))} if size else {}):
        raise PlanError(f"Rank 0 does not hear of all {size} ranks: {covered}.")
