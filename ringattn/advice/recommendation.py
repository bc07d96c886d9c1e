"""Which layout with which schedule to take, and why, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ringattn.advice.comparison import Combination
from ringattn.readable import readable_bytes


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One step of the choice: a combination that costs more than ``1 + tolerance`` times the least is dropped."""

    cost: Callable[[Combination], float]
    tolerance: float


BUSIEST = Criterion(lambda x: x.area_max, 0.05)
MOST_RECEIVED = Criterion(lambda x: x.received_bytes_max, 0.02)
MEAN_RECEIVED = Criterion(lambda x: x.received_bytes_mean, 0.02)
MESSAGES = Criterion(lambda x: x.messages, 0.0)

RULE = (
    "fewest pairs of the busiest rank (to 5 %); of those, fewest bytes that any rank receives (to 2 %), then that the "
    "mean rank receives (to 2 %), then fewest messages, then the simplest"
)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The combination to take, and why, one sentence per line."""

    taken: Combination
    why: list[str]


def recommend(combinations: Sequence[Combination]) -> Recommendation:
    """The combination to take: balance first, then traffic.

    A call takes as long as its busiest rank computes, and what moves hides behind that for as long as it is shorter.
    So, in this order, each leaving to the next what comes as near to its best as its tolerance says:

    1. allowed pairs of the busiest rank, to 5 %: so much longer a rank may compute if less moves for it;
    2. bytes received by the rank that receives most, forward, to 2 %;
    3. bytes received by the mean rank, forward, to 2 %;
    4. messages of all ranks together, forward;
    5. the place in the table: simpler layouts first, and the ring, whose messages go to neighbours only.
    """
    left, dropped = list(combinations), []
    for criterion in (BUSIEST, MOST_RECEIVED, MEAN_RECEIVED, MESSAGES):
        limit = min(criterion.cost(x) for x in left) * (1 + criterion.tolerance)
        dropped.append([x for x in left if criterion.cost(x) > limit])
        left = [x for x in left if criterion.cost(x) <= limit]
    return Recommendation(left[0], _why(left[0], dropped, left[1:]))


def _why(taken: Combination, dropped: Sequence[Sequence[Combination]], equals: Sequence[Combination]) -> list[str]:
    """A sentence for balance, one for each criterion that dropped something, and what the choice costs."""
    slower, more_at_most, more_on_average, chattier = dropped
    others = _listed(slower, lambda x: f"{{}} {x.area:.2f}")
    lines = [f"its busiest rank computes {taken.area:.2f} times the mean" + (f"; {others}" if others else "")]
    lines += _least("no rank receives more than", "received_bytes_max", taken, more_at_most)
    lines += _least("the mean rank receives", "received_bytes_mean", taken, more_on_average)
    others = _listed(chattier, lambda x: f"{{}} {x.messages}")
    lines += [f"its ranks send {taken.messages} messages; {others}"] if others else []
    others = _listed(equals, lambda _: "{}")
    lines += [f"by these measures as good, and not simpler: {others}"] if others else []
    return lines + _price(taken, slower)


def _price(taken: Combination, slower: Sequence[Combination]) -> list[str]:
    """What balance costs: the least that another layout would receive."""
    least = min(slower, key=lambda x: x.received_bytes_max, default=taken)
    if least.received_bytes_max >= taken.received_bytes_max:
        return []
    less = 1 - least.received_bytes_max / taken.received_bytes_max
    return [
        f"its price: with {least.name} no rank would receive more than "
        f"{readable_bytes(least.received_bytes_max)}, {less:.0%} less, but the busiest would compute "
        f"{least.area_max / taken.area_max:.2f} times as long"
    ]


def _least(label: str, field: str, taken: Combination, more: Sequence[Combination]) -> list[str]:
    """That less moves than in the next best combination and in the worst; nothing where none moves more."""
    if not more:
        return []
    own, theirs = getattr(taken, field), sorted({getattr(x, field) for x in more})
    others = [
        f"{1 - own / size:.0%} less than {_listed([x for x in more if getattr(x, field) == size], lambda _: '{}')} "
        f"({readable_bytes(size)})"
        for size in dict.fromkeys((theirs[0], theirs[-1]))
    ]
    return [f"{label} {readable_bytes(own)} forward, {', and '.join(others)}"]


def _listed(of: Sequence[Combination], words: Callable[[Combination], str]) -> str:
    """What is said of each, with its name in place of ``{}``; a layout alone where it holds for several schedules."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for x in of:
        grouped.setdefault((x.layout, words(x)), []).append(x.schedule)
    return ", ".join(
        text.format(layout if len(schedules) > 1 else f"{layout} with {schedules[0]}")
        for (layout, text), schedules in grouped.items()
    )
