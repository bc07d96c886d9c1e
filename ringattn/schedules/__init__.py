"""What moves when: `base` is the contract, one file per member.

To add a schedule, write one file, its line in ``MEMBERS`` and its name in ``ringattn/__init__.py``: names, help, error
texts, comparisons and conformance follow. One from outside the package is given as an instance or as ``module:Name``.
"""

from ringattn.schedules.all_gather import AllGather
from ringattn.schedules.base import Schedule, Scheme
from ringattn.schedules.pass_q import PassQ
from ringattn.schedules.ring import Ring
from ringattn.schedules.route import Route
from ringattn.schedules.scan import Scan
from ringattn.schedules.ulysses import Ulysses

MEMBERS: tuple[type[Scheme], ...] = (Ring, Route, AllGather, PassQ, Scan, Ulysses)
"""Every schedule, simpler ones first."""

FLAT: tuple[type[Schedule], ...] = tuple(member for member in MEMBERS if issubclass(member, Schedule))
"""Those along one axis of ranks."""

__all__ = ["FLAT", "MEMBERS", "AllGather", "PassQ", "Ring", "Route", "Scan", "Schedule", "Scheme", "Ulysses"]
