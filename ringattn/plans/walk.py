"""The walk: one rank's exchanges and tiles put in an order in which exchanges travel behind tiles.

Exchanges run in the order of their phases, whatever is computed in between. The keys of an exchange are attended to
while the rank's *next* exchange travels, whichever phase that is of; only what must have been computed before that one
can start, as it carries the gradients, is computed with nothing under way. A rank's own tiles need no exchange: they go
where exchanges would otherwise travel behind nothing, the first of all, those that bring nothing to this rank, and
those by which the last gradients return.
"""

from __future__ import annotations

from collections.abc import Mapping

from ringattn.plans.exchanges import Exchange, Item, Step
from ringattn.plans.tiles import NO_TILES, Tiles

NO_EXCHANGE = Exchange(0)


def walk(exchanges: Mapping[int, Exchange], tiles: Mapping[int, Tiles], lookahead: int) -> tuple[Step, ...]:
    """The steps of one pass.

    Args:
        exchanges: by phase; those by which keys arrive have the phase of the buffer that they fill.
        tiles: by the phase of the buffer that they read; 0 is this rank's own.
        lookahead: 0 if no exchange shall travel behind tiles.
    """
    steps: list[Step] = []
    arrived: int | None = None  # whose keys are there, and not yet attended to
    for phase in sorted(exchanges):
        exchange = exchanges[phase]
        if arrived is not None and (not lookahead or arrived in _returned(exchange)):
            steps.append(Step(NO_EXCHANGE, arrived, tiles[arrived]))
            arrived = None
        steps.append(Step(exchange, arrived or 0, NO_TILES if arrived is None else tiles[arrived]))
        arrived = phase if phase in tiles else None
    if arrived is not None:
        steps.append(Step(NO_EXCHANGE, arrived, tiles[arrived]))
    own = tiles.get(0, NO_TILES)
    if not own:
        return tuple(steps)
    bare = [i for i, step in enumerate(steps) if not step.tiles] if lookahead else []
    if not bare:
        return (Step(NO_EXCHANGE, 0, own), *steps)
    for i, part in zip(bare, own.parts([_weight(steps[i].exchange) for i in bare]), strict=True):
        steps[i] = Step(steps[i].exchange, 0, part)
    return tuple(steps)


def _returned(exchange: Exchange) -> set[int]:
    """The phases whose gradients leave."""
    return {phase for item in exchange.sends if item.gradient for phase in item.phases}


def _weight(exchange: Exchange) -> int:
    """How long an exchange takes, in rows; gradients are twice as wide as most keys."""

    def rows(items: tuple[Item, ...]) -> int:
        return sum(item.rows * (1 + item.gradient) for item in items)

    return max(rows(exchange.sends), rows(exchange.receives))
