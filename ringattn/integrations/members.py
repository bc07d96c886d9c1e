"""What an integration is told once and uses in every call: checked when it is told."""

from __future__ import annotations

from ringattn.kernels import MEMBERS, Kernel
from ringattn.layouts import Layout
from ringattn.masks import Causal
from ringattn.mesh import Mesh
from ringattn.naming import named
from ringattn.plans.choice import named_schedule
from ringattn.schedules.base import Scheme
from ringattn.sharding import Sharding


def check_members(layout: Layout | str, schedule: Scheme | str, kernel: Kernel | str) -> None:
    """Raises InputError where one is no member, nor the name of one.

    A layout that is given for one length, as Explicit, is not asked for another.
    """
    if not isinstance(layout, Layout):
        Sharding(0, Mesh.virtual(1), layout, Causal())
    named_schedule(schedule)
    if not (isinstance(kernel, str) and kernel == "auto"):
        named("kernel", kernel, Kernel, MEMBERS, also=("auto",))
