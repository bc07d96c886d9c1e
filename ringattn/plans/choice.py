"""Choice of a schedule: one that is asked for is checked, and ``auto`` takes the right one and says why.

It is the same on every rank, as it goes by what all ranks receive and by rates that all of them hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringattn.errors import InputError, UnsupportedError
from ringattn.mechanisms.base import Mechanism, Summarising
from ringattn.mechanisms.softmax import Softmax
from ringattn.mesh import Mesh
from ringattn.naming import named
from ringattn.plans.candidates import Candidate, Estimates, rates_of
from ringattn.plans.clock import Rates
from ringattn.plans.deal import deal
from ringattn.plans.demand import Demand
from ringattn.plans.links import MOST, ROW_BYTES, Links
from ringattn.plans.shape import Shape
from ringattn.plans.shaping import checked_heads
from ringattn.plans.tiles import K_RANK
from ringattn.readable import readable_seconds
from ringattn.schedules import MEMBERS, PassQ, Ring, Route, Scan, Schedule, Scheme, Ulysses
from ringattn.schedules.wave import Wave

CLOSE = 0.02  # of two schedules' seconds, which differ by less for no reason


def named_schedule(schedule: Any, heads: tuple[int, int] | None = None) -> Scheme | None:
    """The schedule itself or the one of this name; None for ``auto``, which `plan` resolves by the demand.

    Args:
        heads: query and key heads, where they are known, for which it is made.
    """
    if isinstance(schedule, Wave) or (isinstance(schedule, str) and schedule == "wave"):
        raise UnsupportedError(
            "wave hands blocks of queries from rank to rank, for mechanisms that walk the keys in order, such as "
            "Monotonic. Use ring, route or auto."
        )
    if isinstance(schedule, str) and schedule == "auto":
        return None
    found = named("schedule", schedule, Scheme, MEMBERS, also=("auto",))
    return found.for_heads(checked_heads(heads)[1]) if heads is not None and isinstance(found, Schedule) else found


def along_ring(schedule: Ulysses, mesh: Mesh, heads: tuple[int, int] | None) -> Scheme | None:
    """The schedule along the ring, for as few key heads as some part of them has; None for ``auto``."""
    dealt = deal(*dealt_heads(heads), mesh.ulysses, schedule.slices)
    fewest = min(part.kv_heads for own in dealt for parts in own for part in parts)
    return named_schedule(schedule.inner, (fewest, fewest))


def dealt_heads(heads: tuple[int, int] | None) -> tuple[int, int]:
    """Query and key heads, which a schedule that deals them needs to know; else an InputError."""
    if heads is None:
        raise InputError("Ulysses deals heads to ranks; give heads=(query heads, key heads) when planning.")
    return checked_heads(heads)


def serving(schedule: Scheme, mechanism: Mechanism | None) -> Schedule:
    """The schedule, as one along one axis, or an error where it cannot serve the mechanism."""
    if not isinstance(schedule, Schedule):
        raise InputError(f"{schedule} is no schedule along one axis; use ring, route or auto.")
    wrong = None if mechanism is None else schedule.payload.refusal(mechanism)
    if wrong is not None:
        raise UnsupportedError(
            f"{schedule} exchanges {schedule.payload.unit}, and {wrong}. Use ring, route or auto, or a mechanism "
            f"whose keys can be summed up, such as Linear."
        )
    return schedule


def chosen_schedule(
    schedule: Scheme | None, demand: Demand, mechanism: Mechanism | None, links: Links | None
) -> tuple[Schedule, str]:
    """The schedule, and why: on every rank the same, as it is chosen by what all ranks together receive.

    Args:
        links: where they were measured.
    """
    if schedule is not None:
        schedule = serving(schedule, mechanism)
        refusal = schedule.refusal(demand)
        if refusal is not None:
            raise UnsupportedError(f"{refusal}.")
        return schedule, ""
    why = ""
    if isinstance(mechanism, Summarising):
        refusal = Scan().refusal(demand)
        if refusal is None:
            return Scan(), "auto took scan: sums over keys travel, and keys and values stay where they are"
        why = f"; not scan: {refusal}"
    taken, reason = _ring_or_route(demand) if links is None or links.size > MOST else _by_links(demand, links)
    return taken, reason + why


def best_schedule(
    demand: Demand, grouped: Demand | None, shape: Shape, mechanism: Mechanism | None, mesh: Mesh
) -> tuple[Scheme | None, str]:
    """The quickest of all that could serve, by `candidates`, and why; None where nothing could be estimated.

    Args:
        grouped: what the groups along the ulysses axis need of each other; None where there are none.
    """
    if isinstance(mechanism, Summarising) and Scan().refusal(demand) is None:
        return None, ""  # sums over keys are the least there is
    rates = Rates() if mesh.links is None else rates_of(mesh.links.latency, mesh.links.bandwidth)
    estimates = Estimates(demand, shape, mechanism, rates)
    flat: list[Schedule] = [Route()]
    if mesh.crosses_nodes:
        flat.append(Route(node_aware=True))
    if not np.array_equal(demand.q_spans, demand.k_spans) and PassQ.serves(mechanism or Softmax()):
        flat.append(PassQ())
    found = list(estimates.along_one_axis(flat))
    if grouped is not None and shape.heads >= mesh.ulysses:
        taken, route = Ulysses(), Route()
        wire = shape.wire(route.payload, route.gradient_wire)
        dealt = deal(shape.heads, shape.kv_heads, mesh.ulysses, taken.slices)
        found += filter(None, [estimates.in_groups(taken, grouped, dealt, wire)])
    if not found:
        return None, ""
    shortest = min(x.seconds for x in found)
    quick = [x for x in found if x.seconds <= shortest * (1 + CLOSE)]
    best = min(quick, key=lambda x: (x.between, x.inside))  # of equals the first, which is the simplest
    if best.schedule == Route():
        return None, f"auto took keys that travel along one axis; {_compared(found)}"
    return best.schedule, f"auto took {best.schedule}; {_compared(found)}"


def _compared(found: Sequence[Candidate]) -> str:
    return f"estimated, forward and backward: {'; '.join(map(str, found))}"


def _by_links(demand: Demand, links: Links) -> tuple[Schedule, str]:
    """That by which the busiest rank waits less, on these links; `_ring_or_route` where it does not matter."""
    every, ring, route = demand.for_all_ranks(), Ring(), Route()
    by_ring, by_route = (links.longest(x.moves(every, rank) for rank in range(demand.size)) for x in (ring, route))
    if math.isclose(by_ring, by_route, rel_tol=CLOSE):
        taken, reason = _ring_or_route(demand)
        return taken, f"{reason} (as long either way on the profile's links)"
    times = [readable_seconds(seconds) for seconds in sorted((by_ring, by_route))]
    taken, other = (ring, route) if by_ring < by_route else (route, ring)
    return taken, (
        f"auto took {taken}: on the profile's links the busiest rank receives for {times[0]} of {ROW_BYTES} bytes a "
        f"position, {times[1]} by {other}"
    )


def _ring_or_route(demand: Demand) -> tuple[Schedule, str]:
    """Route, unless all ranks together receive no more by ring, of any rank's keys, than the route that none betters.

    So the first keys of which they do decide, and no more of the mask than that is cut.
    """
    ring, route = Ring(), Route()
    same = "key positions either way, from neighbours only"
    by_ring = by_route = 0
    for requested in demand.keys_requested_from_all():
        by_ring += ring.received_tokens(requested, demand.size)
        by_route += route.received_tokens(requested, demand.size)
        if by_route < by_ring:
            last = int(requested[:, K_RANK].max())
            owners = "rank 0" if last == 0 else f"ranks 0 to {last}"
            return route, (
                f"auto took route: all ranks together receive {by_route} key positions of {owners}, {by_ring} by ring"
            )
        exact = ring.exact_tokens(demand)
        if exact is not None:
            return ring, f"auto took ring: all ranks together receive {exact} {same}"
    return ring, f"auto took ring: all ranks together receive {by_ring} {same}"
