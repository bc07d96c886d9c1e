"""A request: the arguments of one attention call, checked, and made into a `Call` that is kept for the next time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ringattn.checking import flag, shown
from ringattn.errors import AgreementError, InputError, UnsupportedError
from ringattn.kernels.base import Kernel
from ringattn.kernels.choice import Measure, Profiled, chosen_kernel, stored
from ringattn.kernels.rates import Work
from ringattn.kernels.reference import Reference
from ringattn.masks import Mask, Transposed, checked
from ringattn.mechanisms.base import Mechanism, Problem
from ringattn.mechanisms.ordered import Ordered
from ringattn.payloads.outputs import OutputSide
from ringattn.plans.choice import named_schedule
from ringattn.plans.passing import PassPlan
from ringattn.plans.plan import Plan
from ringattn.plans.planning import swap_of, verified_plan
from ringattn.plans.swap import Swap
from ringattn.plans.ulysses import UlyssesPlan
from ringattn.plans.wave import WavePlan, plan_wave
from ringattn.readable import dtype_name
from ringattn.runtime import agreement
from ringattn.runtime.arguments import check_extras, check_part, check_tensors, is_dense
from ringattn.runtime.call import Asked, Call, PassCall, TileCall, UlyssesCall, WaveCall
from ringattn.runtime.dealing import dealt, part_of_first
from ringattn.runtime.gathering import Gathering, to_keys, to_queries
from ringattn.runtime.spelling import spelled
from ringattn.schedules.base import Scheme
from ringattn.schedules.ulysses import Ulysses
from ringattn.schedules.wave import Wave
from ringattn.sharding import Sharding
from ringattn.transports.base import Transport

_SHAPE = operator.attrgetter("shape", "dtype", "device")


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What `attention` was asked for, but for the tensors.

    Attributes:
        kv_sharding: None where the keys are sharded as the queries are.
        deterministic: whether the bits must not depend on the ranks.
        return_lse, extras: which results are returned beside the output.
        traced: whether a compiled graph calls, which knows what comes out of a call by the shapes of what goes in.
        planned: the plan, where it is known.
    """

    mask: Mask
    sharding: Sharding
    kv_sharding: Sharding | None
    mechanism: Mechanism
    schedule: Scheme | str
    kernel: Kernel | str
    deterministic: bool = False
    return_lse: bool = False
    extras: Sequence[str] = ()
    traced: bool = False
    planned: Plan | None = None

    @property
    def returned(self) -> tuple[str, ...]:
        """The mechanism's extras that come out of the call: of a graph, which may drop some, all."""
        return self.mechanism.extras if self.traced else self.results

    @property
    def results(self) -> tuple[str, ...]:
        """The mechanism's extras that are returned."""
        return (*(("lse",) if self.return_lse else ()), *self.extras)

    @property
    def kv(self) -> Sharding:
        """Who holds the keys."""
        return self.sharding if self.kv_sharding is None else self.kv_sharding

    def check_kinds(self, q: object, k: object, v: object) -> None:
        """Raises InputError where an argument is not even of the kind that is needed."""
        fine = (
            isinstance(self.mask, Mask)
            and isinstance(self.sharding, Sharding)
            and (self.kv_sharding is None or isinstance(self.kv_sharding, Sharding))
            and isinstance(self.mechanism, Mechanism)
            and isinstance(self.schedule, (str, Scheme))
            and isinstance(self.kernel, (str, Kernel))
            and isinstance(self.deterministic, bool)
            and is_dense(q)
            and is_dense(k)
            and is_dense(v)
        )
        if not fine or self.return_lse is not False or self.extras != ():
            self._check_each({"q": q, "k": k, "v": v})

    def check_one_sharding(self) -> None:
        """Raises UnsupportedError where queries and keys are not tokens of one sequence, sharded alike."""
        if self.kv_sharding is not None and self.kv_sharding != self.sharding:
            raise UnsupportedError(f"{self.mechanism} attends within one sequence; leave kv_sharding out.")

    def _check_each(self, tensors: Mapping[str, object]) -> None:
        if not isinstance(self.sharding, Sharding):
            raise InputError(f"attention needs a ringattn.Sharding; got {shown(self.sharding)}.")
        for name, x in tensors.items():
            if not isinstance(x, torch.Tensor):
                raise InputError(f"{name} must be a tensor; got {type(x).__name__}.")
            if not is_dense(x):
                kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
                raise InputError(f"{name} must be a dense tensor; got a {kind} one. Pad it, or call .to_dense() first.")
        checked(self.mask)
        if not isinstance(self.kv, Sharding):
            raise InputError(f"kv_sharding must be a ringattn.Sharding; got {shown(self.kv)}.")
        if not isinstance(self.mechanism, Mechanism):
            raise InputError(
                f"mechanism must be a ringattn mechanism, such as ringattn.Softmax(); got {shown(self.mechanism)}."
            )
        if not isinstance(self.schedule, (str, Scheme)):
            raise InputError(f"schedule must be a Schedule or its name, such as 'auto'; got {shown(self.schedule)}.")
        if not isinstance(self.kernel, (str, Kernel)):
            raise InputError(f"kernel must be a Kernel or its name, such as 'auto'; got {shown(self.kernel)}.")
        flag(self.deterministic, "deterministic")
        flag(self.return_lse, "return_lse")
        check_extras(self.mechanism, self.extras)
        check_extras(self.mechanism, ("lse",) if self.return_lse else ())

    def call(self, tensors: Sequence[torch.Tensor], wanted: tuple[bool, ...]) -> Call:
        """The call, planned, verified and kept by the sharding until 64 others have been used since.

        Args:
            tensors: q, k, v and the params.
            wanted: of each, whether a gradient is.
        """
        kv = self.kv_sharding and (self.kv_sharding.length, self.kv_sharding.layout, self.kv_sharding.mesh)
        shapes = tuple(map(_SHAPE, tensors))
        asked = self.schedule, self.kernel, self.deterministic, self.traced, self.results
        key = (self.mask, kv, self.mechanism.text, *asked, wanted, shapes)
        calls = self.sharding.calls
        call: Call | None = calls.get(key)
        if call is None:
            q, k, v = tensors[:3]
            call = self.prepared(self._problem(q, k, v), wanted)
            calls.keep(key, call)
        else:
            calls.move_to_end(key)
        return call

    def refuse(self, error: Exception) -> None:
        """Tells the other ranks of the call, where they can be told, that this one will not take part."""
        if isinstance(error, AgreementError):
            return  # every rank has seen it
        for sharding in (self.sharding, self.kv_sharding):
            if isinstance(sharding, Sharding) and sharding.mesh.transport is not None:
                agreement.refuse(sharding.mesh.transport, error)
                return

    def explain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
        """What the call would do, in words."""
        problem = self._problem(q, k, v)
        if isinstance(problem.mechanism, Ordered):
            swap = self._swap(problem)
            if swap is not None:
                along = self._along_ring._wave(problem).explain()
                return f"{swap.described}, along the ring:\n{along}\n  layout: {self.sharding.reason}"
            return f"{self._wave(problem).explain()}\n  layout: {self.sharding.reason}"
        planned = self._planned(problem)
        problem = _completed(problem, planned, wanted_gradients(q, k, v, *self.mechanism.params.values()))
        decide = functools.partial(agreement.decided, self.sharding.mesh.transport)
        said = f"{planned.explain()}\n  layout: {self.sharding.reason}"
        if problem.mechanism.preparation is not None:
            first, later = (x.traffic().received_bytes for x in (planned.over_keys, planned.over_keys_again))
            each = f"{first} bytes received in each" if first == later else f"{first} bytes received, then {later} each"
            said += f"\n  before it, passes over keys alone, as many as a rank needs: {each}"
        if self.deterministic:
            return "\n".join([said, *(x.explain() for x in self._gatherings(problem, planned) if x is not None)])
        work = Work.from_plan(planned)
        taken, reason = chosen_kernel(self.kernel, problem, work, decide=decide, rates=self._rates)
        return f"{said}\n  kernel {taken}: {reason}"

    def prepared(self, problem: Problem, wanted: tuple[bool, ...]) -> Call:
        """Planned, verified, and everything else that can be known before the tensors."""
        transport = self.sharding.mesh.connected()
        refusal = transport.refusal(problem.device)
        if refusal is not None:
            raise UnsupportedError(refusal)
        fields = self._fields(problem, wanted)
        swap = self._swap(problem)
        if isinstance(problem.mechanism, Ordered):
            constants = constants_of(problem.mechanism, wanted)
            problem = dataclasses.replace(problem, constants=constants)
            if swap is not None:
                asked = Call(problem, transport, fields, wanted, self.spelling())
                return self._dealt(asked, swap, self.kernel, None)
            return WaveCall(problem, transport, fields, wanted, self.spelling(), self._wave(problem))
        own = self._planned(problem)
        problem = _completed(problem, own, wanted)
        known = problem, transport, fields, wanted, self.spelling()
        if self.deterministic:
            return TileCall(*known, own, Reference(), None, *self._gatherings(problem, own))
        decide = functools.partial(agreement.decide, transport, fields)
        if isinstance(own, UlyssesPlan):
            first = part_of_first(problem, own.swap)
            kernel, _ = chosen_kernel(self.kernel, first, Work.from_plan(own.inner), decide=decide, rates=self._rates)
            return self._dealt(Call(*known), own.swap, kernel, own.inner)
        kernel, _ = chosen_kernel(self.kernel, problem, Work.from_plan(own), decide=decide, rates=self._rates)
        if isinstance(own, PassPlan):
            alike = Asked(problem, transport, fields).returning(self.returned)
            extras = tuple(map(problem.mechanism.extras.index, self.returned))
            return PassCall(problem, transport, alike, wanted, self.spelling(), own, kernel, extras)
        before = self._before(problem, own, transport, fields)
        return TileCall(*known, own, kernel, before)

    def _dealt(self, asked: Call, swap: Swap, kernel: Kernel | str, planned: Plan | None) -> UlyssesCall:
        """The call of heads that are dealt, whose parts go along the ring by this plan."""
        along = dataclasses.replace(self._along_ring, kernel=kernel, planned=planned)

        def prepare(part: Problem) -> Call:
            return along.prepared(part, asked.wanted)

        return dealt(asked, swap, self.sharding.count, self.returned, prepare)

    @property
    def _along_ring(self) -> Request:
        """The same of what each group holds, along the ring."""
        inner = self.schedule.inner if isinstance(self.schedule, Ulysses) else "auto"
        kv = None if self.kv_sharding is None else self.kv_sharding.grouped
        return dataclasses.replace(self, sharding=self.sharding.grouped, kv_sharding=kv, schedule=inner)

    def _before(self, problem: Problem, plan: Plan, transport: Transport, fields: Mapping[str, str]) -> TileCall | None:
        """The passes over keys alone, where the mechanism has any: by the same plan."""
        mechanism = problem.mechanism.preparation
        if mechanism is None:
            return None
        asked = problem.over_keys(mechanism)
        return TileCall(asked, transport, fields, (False,) * 3, ([], ""), plan.over_keys, Reference())

    @property
    def _rates(self) -> Measure:
        """Where rates of kernels are looked for."""
        profile = self.sharding.mesh.profile
        return stored if profile is None else Profiled(profile.entries)

    def spelling(self) -> tuple[list[float], str]:
        """The mechanism as the ops take it, for their fakes; empty where it has no text."""
        numbers: list[float] = []
        try:
            return numbers, spelled(self.mechanism, numbers)
        except InputError:
            return [], ""

    def _planned(self, problem: Problem) -> Plan:
        if self.planned is not None:
            return self.planned
        made = verified_plan(
            self.mask,
            self.sharding,
            self.schedule,
            self.kv,
            heads=(problem.heads, problem.kv_heads),
            head_dims=(problem.dim, problem.value_dim),
            dtype=problem.dtype,
            batch=problem.batch,
            mechanism=None if self.deterministic else problem.mechanism,
            deterministic=self.deterministic,
        )
        if self.traced and isinstance(made, UlyssesPlan):  # a graph could not know the size of what is kept
            return dataclasses.replace(made, swap=dataclasses.replace(made.swap, keep=False))
        return made

    def _swap(self, problem: Problem) -> Swap | None:
        """How heads are exchanged around a wave, where that was asked for."""
        schedule = named_schedule(self.schedule) if self.schedule == "ulysses" else self.schedule
        if not isinstance(schedule, Ulysses) or not isinstance(problem.mechanism, Ordered):
            return None
        return swap_of(schedule, self.sharding, self.kv, (problem.heads, problem.kv_heads))

    def _wave(self, problem: Problem) -> WavePlan:
        """The plan of a mechanism that walks the keys in order.

        Raises:
            UnsupportedError: something else was asked for.
        """
        mechanism, schedule, wrong = problem.mechanism, self.schedule, None
        if isinstance(schedule, str) and schedule in ("auto", "wave"):
            schedule = Wave()
        if not isinstance(schedule, Wave):
            wrong = f"{schedule} meets keys in any order. Use schedule='auto', which takes the wave"
        elif self.deterministic:
            wrong = "deterministic=True computes tiles in an order of its own. Leave it out"
        elif self.kernel != "auto":
            wrong = f"kernel={self.kernel} computes tiles in any order. Leave kernel out"
        if wrong is not None or not isinstance(schedule, Wave) or not isinstance(mechanism, Ordered):
            raise UnsupportedError(f"{type(mechanism).__name__} walks the keys in order, and {wrong}.")
        made = plan_wave(
            self.sharding,
            self.kv,
            mechanism=mechanism,
            schedule=schedule,
            mask=self.mask,
            heads=(problem.heads, problem.kv_heads),
            head_dims=(problem.dim, problem.value_dim),
            dtype=problem.dtype,
            batch=problem.batch,
        )
        made.verify()
        return made

    def _gatherings(self, problem: Problem, plan: Plan) -> tuple[Gathering, Gathering | None]:
        """How keys come to the queries and, where their gradients are wanted, queries to the keys.

        Raises:
            UnsupportedError: the bits would depend on the ranks; says what is in the way.
        """
        mechanism = problem.mechanism
        parts = [name for name in mechanism.params if problem.wants(name) or name in mechanism.sharded]
        kernel, _ = chosen_kernel("reference" if self.kernel == "auto" else self.kernel, problem)
        wrong = None
        if isinstance(plan, UlyssesPlan):
            wrong = "ulysses computes some heads at once, and which depends on them. Use ring, route or auto"
        elif plan.queries_travel or not plan.payload.per_key:
            what = "merges the states of queries" if plan.queries_travel else f"exchanges {plan.payload.unit}"
            wrong = f"{self.schedule} {what}, cut by rank. Use ring, route or auto"
        elif plan.slices > 1:
            wrong = "every key that a rank needs lies there at once, all heads of it. Use AllGather(slices=1)"
        elif not mechanism.by_rows:
            wrong = f"{type(mechanism).__name__} does not promise it (Mechanism.by_rows). Use Softmax, Hard or Linear"
        elif parts:
            wrong = f"each rank has its own part of {parts[0]} or of its gradient. Detach it, or leave it out"
        elif kernel != Reference():
            wrong = f"it takes one kernel by rule, the reference; got kernel={kernel}. Leave kernel out"
        if wrong is not None:
            raise UnsupportedError(f"deterministic=True gives the same bits on any ranks, but {wrong}.")
        reverse = to_keys(self._reversed(problem), problem) if problem.wants("k", "v") else None
        return to_queries(plan, problem), reverse

    def _reversed(self, problem: Problem) -> Plan:
        """The plan by which queries come to the keys."""
        return verified_plan(
            Transposed(self.mask),
            self.kv,
            self.schedule,
            self.sharding,
            heads=(problem.heads, problem.heads),
            head_dims=(problem.dim, OutputSide.of(problem).size),
            dtype=problem.dtype,
            batch=problem.batch,
            deterministic=True,
        )

    def _fields(self, problem: Problem, wanted: tuple[bool, ...]) -> dict[str, str]:
        """What the ranks must agree on, for `agreement`."""
        own, kv = self.sharding, self.kv
        heads, dims = (problem.heads, problem.kv_heads), (problem.dim, problem.value_dim)
        tiles = ", deterministic" if self.deterministic else ""
        return {
            "shapes": f"{problem.batch} x {heads} heads of {dims}, {own.length} queries, {kv.length} keys",
            "dtype": dtype_name(problem.dtype),
            "mask": self.mask.signature(own.length, kv.length),
            "layout": own.signature if kv == own else f"{own.signature}, keys {kv.signature}",
            "schedule": self.schedule if isinstance(self.schedule, str) else repr(self.schedule),
            "kernel": f"{self.kernel if isinstance(self.kernel, str) else repr(self.kernel)}{tiles}",
            "mechanism": self.mechanism.text,
            "gradients": " ".join(itertools.compress(("q", "k", "v", *self.mechanism.params), wanted)) or "none",
        }

    def _problem(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Problem:
        """The problem the tensors pose, or an error that shows the whole call."""
        call = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        check_tensors(q, k, v, call)
        check_part(q, self.sharding, "queries", call)
        check_part(k, self.kv, "keys", call)
        problem = problem_of(self.mechanism.without_tensors, q, k, v)
        self.mechanism.check(problem, self.sharding.count, self.kv.length)
        return problem


def problem_of(mechanism: Mechanism, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> Problem:
    """The problem of these tensors' shapes."""
    batch, heads, _, dim = q.shape
    return Problem(mechanism, batch, heads, k.shape[1], dim, v.shape[3], q.dtype, q.device, **more)


def results_of(
    mechanism: Mechanism, names: Sequence[str], extras: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The extras of these names as callers get them: numbers in float32, for float64 inputs in float64."""
    accumulator = torch.promote_types(dtype, torch.float32)
    found = (extras[mechanism.extras.index(name)] for name in names)
    return (x.to(accumulator) if x.is_floating_point() else x for x in found)


def wanted_gradients(*inputs: torch.Tensor) -> tuple[bool, ...]:
    """Which of q, k, v and the params need gradients."""
    enabled = torch.is_grad_enabled()
    return tuple([enabled and x.requires_grad for x in inputs])


def _completed(problem: Problem, plan: Plan, wanted: tuple[bool, ...]) -> Problem:
    """The problem, with what partial tiles are evaluated by where there are any, and what needs no gradient."""
    constants = constants_of(problem.mechanism, wanted)
    return dataclasses.replace(problem, allows=plan.mask.allows if len(plan.partial) else None, constants=constants)


def constants_of(mechanism: Mechanism, wanted: Sequence[bool]) -> frozenset[str]:
    """Those inputs whose gradients nobody asked for."""
    inputs = ("q", "k", "v", *mechanism.params)
    return frozenset(name for name, there in zip(inputs, wanted, strict=True) if not there)
