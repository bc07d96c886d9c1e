"""Advice before anything runs: layouts times schedules for one mask, which one to take and why, and pictures.

What `ringattn plan` prints, for a notebook:

>>> import ringattn
>>> from ringattn.advice import Request, compare, recommend
>>> request = Request(ringattn.Documents([1500, 1, 2595]) & ringattn.Causal(), length=4096, ring=4)
>>> choice = recommend(compare(request).combinations)
>>> choice.taken.name, choice.why[0].split(";")[0]
('balanced with route', 'its busiest rank computes 1.00 times the mean')

``request.plans("balanced", "route")`` are the plans, `draw_plans` draws them into a file, and `draw_received` and
`draw_balance` draw a comparison into axes of your own (matplotlib, extra ``plot``).

`comparison` plans and measures, `recommendation` chooses, `figures` and `charts` draw.
"""

from ringattn.advice.charts import draw_balance, draw_received
from ringattn.advice.comparison import Combination, Comparison, Request, check, compare, schedules_for
from ringattn.advice.figures import draw_plans
from ringattn.advice.recommendation import RULE, Recommendation, recommend

__all__ = [
    "RULE",
    "Combination",
    "Comparison",
    "Recommendation",
    "Request",
    "check",
    "compare",
    "draw_balance",
    "draw_plans",
    "draw_received",
    "recommend",
    "schedules_for",
]
