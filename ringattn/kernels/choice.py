"""Which kernel computes a problem, and why: as asked for by name, or as measured on this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from ringattn.errors import UnsupportedError
from ringattn.kernels import MEMBERS
from ringattn.kernels.base import Kernel
from ringattn.kernels.machine import Machine, threads
from ringattn.kernels.rates import Rates, Work, Workload
from ringattn.kernels.store import Entry, Store
from ringattn.kernels.trial import measure
from ringattn.mechanisms import MEMBERS as MECHANISMS
from ringattn.mechanisms.base import Mechanism, Problem
from ringattn.naming import by_name, named

Measure = Callable[[Sequence[Kernel], Mechanism, Workload], Rates]
Decide = Callable[[str, Callable[[], int]], int]
"""Takes a subject and what chooses a number; returns the number that all ranks take."""


def stored(kernels: Sequence[Kernel], mechanism: Mechanism, workload: Workload) -> Rates:
    """The rates in the user's cache directory, measured where there are none."""
    machine = Machine.here(kernels)
    return Store.of_user().found_or_measured(machine, workload, lambda: measure(kernels, mechanism, workload))


@dataclasses.dataclass(frozen=True)
class Profiled:
    """The rates of a profile: of this machine, and of the class whose tiles are nearest in size.

    Where a profile has none of the kind, they are `stored`.
    """

    entries: tuple[Entry, ...]

    def __call__(self, kernels: Sequence[Kernel], mechanism: Mechanism, workload: Workload) -> Rates:
        """As `Measure`."""
        here = Machine.here(kernels)
        alike = [x.rates for x in self.entries if x.machine == here and x.rates.workload.is_like(workload)]
        if not alike:
            return stored(kernels, mechanism, workload)
        return min(alike, key=lambda x: abs(math.log2(x.workload.side / workload.side)))


def chosen_kernel(
    kernel: Any,
    problem: Problem,
    work: Work | None = None,
    *,
    decide: Decide = lambda _, choose: choose(),
    rates: Measure = stored,
) -> tuple[Kernel, str]:
    """The kernel and the reason. A kernel asked for by name is taken or refused, never replaced.

    ``auto`` measures where two fast kernels or more support the mechanism and the work is large enough; otherwise, and
    where the fastest refuses the problem, it goes by the order of ``MEMBERS``.

    Args:
        kernel: a kernel, its name, or ``auto``.
        work: what the call's tiles are like; None where that is not known, and nothing is measured.
        decide: how the ranks of a call take the same kernel; called on all of them, or on none. One rank decides alone.
        rates: measures kernels, or knows what was measured.

    Raises:
        UnsupportedError: the kernel asked for cannot do the problem; says what of it.
    """
    if kernel == "auto":
        return _measured_choice(problem, work, decide, rates)
    requested = named("kernel", kernel, Kernel, MEMBERS, also=("auto",))
    refusal = requested.refusal(problem)
    if refusal is not None:
        raise UnsupportedError(f"{refusal}. Use kernel='reference', or 'auto', which takes what can do it.")
    return requested, "as asked"


def renewed(entry: Entry) -> Entry | None:
    """The same class of problems measured again here, with as many threads, by the kernels that were.

    None where one of them, or the mechanism, is not of this package any more.
    """
    kernels, mechanisms = by_name(MEMBERS), {member.__name__: member for member in MECHANISMS}
    workload = entry.rates.workload
    if workload.mechanism not in mechanisms or not kernels.keys() >= set(entry.rates.names):
        return None
    able = [kernels[name]() for name in entry.rates.names]
    with threads(entry.machine.threads):
        return Entry(Machine.here(able), measure(able, mechanisms[workload.mechanism](), workload))


def contenders(problem: Problem) -> list[Kernel]:
    """The kernels written for this mechanism and device that do not refuse it; not the last, which does everything."""
    fast = (member() for member in MEMBERS[:-1])
    return [kernel for kernel in fast if kernel.supports(problem) and kernel.refusal(problem) is None]


def _measured_choice(problem: Problem, work: Work | None, decide: Decide, rates: Measure) -> tuple[Kernel, str]:
    order = [member() for member in MEMBERS]
    reason = "auto took the fastest kernel for this mechanism"
    # What decides whether to measure is the same on every rank. Whether a tile asks a predicate is not.
    workload = None if work is None else Workload.from_problem(problem, work)
    if work is not None and workload is not None and sum(kernel.supports(problem) for kernel in order[:-1]) > 1:
        known: list[Rates] = []

        def choose() -> int:
            able = contenders(problem.without_partial)
            if len(able) > 1:
                known.append(rates(able, problem.mechanism, workload))
            best = known[0].best if known else str(able[0] if able else order[-1])
            return [str(kernel) for kernel in order].index(best)

        first = order.pop(decide(f"kernel for {Workload.subject(problem, work)}", choose))
        order.insert(0, first)
        reason = _reason(
            str(first), known[0] if known else None, "by the profile" if isinstance(rates, Profiled) else "here"
        )
    return _first(order, problem, reason)


def _reason(name: str, rates: Rates | None, where: str) -> str:
    if rates is None:
        return f"auto took {name}, as rank 0 did"
    if rates.best != name:
        return f"auto took {name}, as rank 0 did; measured {where}: {rates}"
    return f"auto took the fastest, as measured {where}: {rates}"


def _first(order: Sequence[Kernel], problem: Problem, reason: str) -> tuple[Kernel, str]:
    """The first that does not refuse the problem."""
    refusals: list[str] = []
    for kernel in order:
        refusal = kernel.refusal(problem)
        if refusal is None:
            return kernel, f"auto fell to it: {'; '.join(refusals)}" if refusals else reason
        if kernel.supports(problem):
            refusals.append(refusal)
    raise UnsupportedError("; ".join(refusals))
