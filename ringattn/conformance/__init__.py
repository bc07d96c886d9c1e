"""The conformance harness: any schedule, layout, mask, mechanism or kernel through the same cases.

It is what the package's own tests, ``scripts/bench conformance`` and ``ringattn verify`` use. A member of your own goes
in as an instance or as ``module:Name``; what you leave out is drawn at random, in as many cases as you ask for:

>>> import ringattn
>>> class Neighbourly(ringattn.Ring):
...     "A schedule of your own."
...     def __str__(self) -> str:
...         return "neighbourly"
>>> report = ringattn.conformance.check(schedule=Neighbourly(), count=6)
>>> report.passed
True
>>> print(report)  # doctest: +ELLIPSIS
1... cases computed, 0 of them wrong; ... refused
computed: ...
...
largest error over its limit: ...

In a test: ``assert report.passed, report``. A single call, such as one that failed: ``print(examine(case))``.

`case` says what a call is, `running` runs it on ranks, `judging` has the oracle and the limits, `leaks` the leak probe,
`drawing` the random cases, `battery` puts them together.
"""

from ringattn.conformance.battery import Finding, Report, check, examine
from ringattn.conformance.case import FEATURES, Case
from ringattn.conformance.drawing import draw, draw_cross
from ringattn.conformance.judging import errors, limits, oracle
from ringattn.conformance.leaks import Leaks, leaks
from ringattn.conformance.running import Part, Results, attend, joined, simulated

__all__ = [
    "FEATURES",
    "Case",
    "Finding",
    "Leaks",
    "Part",
    "Report",
    "Results",
    "attend",
    "check",
    "draw",
    "draw_cross",
    "errors",
    "examine",
    "joined",
    "leaks",
    "limits",
    "oracle",
    "simulated",
]
