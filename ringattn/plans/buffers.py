"""Which buffer each phase's rows lie in: one that nobody needs any more from the first step on in which they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ringattn.plans.exchanges import Step

Lives = Mapping[int, tuple[int, int]]
"""By phase: the first and the last step in which its rows must lie in their buffer."""


def rows_live(steps: Sequence[Step]) -> Lives:
    """From the exchange by which rows arrive, to their tiles, or the exchange that relays them if it is later."""
    lives: dict[int, tuple[int, int]] = {}
    for at, step in enumerate(steps):
        sides = step.exchange.receives, step.exchange.sends
        arriving, relayed = ({x for item in side if not item.gradient for x in item.phases} for side in sides)
        _use(lives, {*arriving, *relayed, step.phase if step.tiles else 0}, at)
    return lives


def gradients_live(steps: Sequence[Step]) -> Lives:
    """From the tiles, to the exchange by which their gradients return; others' are added in between."""
    lives: dict[int, tuple[int, int]] = {}
    for at, step in enumerate(steps):
        sides = step.exchange.receives, step.exchange.sends
        moved = {x for side in sides for item in side if item.gradient for x in item.phases}
        _use(lives, {*moved, step.phase if step.tiles else 0}, at)
    return lives


def _use(lives: dict[int, tuple[int, int]], phases: set[int], at: int) -> None:
    for phase in phases - {0}:
        lives[phase] = (lives.get(phase, (at, at))[0], at)


def shared(rows: Mapping[int, int], *passes: Lives) -> dict[int, int]:
    """The buffer of each phase, the same in all passes: of those that are free, the one that must grow least.

    Args:
        rows: how many each phase has.
    """
    out: dict[int, int] = {}
    sizes: list[int] = []
    ends: list[list[int]] = []  # of each buffer, the last step of each pass in which it is needed
    for phase in sorted(rows, key=lambda phase: (min(lives.get(phase, (0, 0))[0] for lives in passes), phase)):
        spans = [lives.get(phase, (0, -1)) for lives in passes]
        free = [
            (max(rows[phase] - size, 0), size, which)
            for which, size in enumerate(sizes)
            if all(end < first for end, (first, _) in zip(ends[which], spans, strict=True))
        ]
        which = min(free)[2] if free else len(sizes)
        if not free:
            sizes.append(0)
            ends.append([-1] * len(passes))
        out[phase], sizes[which] = which, max(sizes[which], rows[phase])
        ends[which] = [max(end, last) for end, (_, last) in zip(ends[which], spans, strict=True)]
    return out
