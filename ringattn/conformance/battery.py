"""`check`: many cases, each looked at from all sides, and a report of them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from random import Random

from ringattn import layouts
from ringattn.checking import MAX_TOKENS, instance, integer, shown
from ringattn.conformance.case import Case, checked_case
from ringattn.conformance.drawing import PARTIAL, RANKS, draw, draw_cross, in_order
from ringattn.conformance.judging import errors, limits, oracle
from ringattn.conformance.leaks import leaks
from ringattn.conformance.running import planned_traffic, run
from ringattn.errors import InputError, PlanError
from ringattn.kernels import MEMBERS as KERNELS
from ringattn.kernels import Kernel
from ringattn.layouts import Layout
from ringattn.masks import Causal, Mask, checked, parse
from ringattn.mechanisms import MEMBERS as MECHANISMS
from ringattn.mechanisms import Mechanism
from ringattn.mechanisms.ordered import Ordered
from ringattn.mesh import Mesh
from ringattn.naming import name_of, named
from ringattn.plans.choice import named_schedule
from ringattn.readable import dtype_name
from ringattn.schedules import Schedule

Track = Callable[[Sequence[Case]], Iterable[Case]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one case did.

    Attributes:
        errors, limits: by result, in units of the magnitudes of `ringattn.reference`; empty where nothing was computed.
        faults: what is wrong, in words.
        refusal: why the case cannot be computed, in the words of who refused it; None where it was.
    """

    case: Case
    errors: dict[str, float]
    limits: dict[str, float]
    faults: tuple[str, ...] = ()
    refusal: str | None = None

    def __str__(self) -> str:
        return f"{self.case}:\n  " + "\n  ".join(self.faults or (self.refusal or "right",))


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings. ``str`` is a summary, with the first of the faulty cases."""

    findings: tuple[Finding, ...]

    @property
    def faulty(self) -> list[Finding]:
        """Those with faults."""
        return [finding for finding in self.findings if finding.faults]

    @property
    def computed(self) -> list[Finding]:
        """Those that nobody refused."""
        return [finding for finding in self.findings if finding.refusal is None]

    @property
    def refusals(self) -> dict[str, int]:
        """How often something was refused in which words, numbers apart; the commonest first."""
        words = (finding.refusal for finding in self.findings if finding.refusal is not None)
        shortened = (re.sub(r"\([a-z]+=.*?\)", "(…)", each) for each in words)
        return dict(collections.Counter(re.sub(r"-?\d+(?:[.,]\d+)*", "#", each) for each in shortened).most_common())

    @property
    def kinds(self) -> dict[str, int]:
        """How many cases were computed of each mechanism, dtype and feature, and across two sequences."""
        kinds: collections.Counter[str] = collections.Counter()
        for finding in self.computed:
            case = finding.case
            cross = () if case.kv_length is None else ("cross-attention",)
            kinds.update((name_of(case.mechanism), dtype_name(case.dtype), *cross, *case.features))
        return dict(kinds)

    @property
    def worst(self) -> dict[str, float]:
        """The largest error of each result, over its limit: up to 1 is within."""
        worst: dict[str, float] = {}
        for finding in self.computed:
            for name, error in finding.errors.items():
                if error and name in finding.limits:
                    limit = finding.limits[name]
                    worst[name] = max(worst.get(name, 0.0), error / limit if limit else float("inf"))
        return worst

    @property
    def passed(self) -> bool:
        """Whether some cases were computed, all of them rightly."""
        return bool(self.computed) and not self.faulty

    def __str__(self) -> str:
        refused = len(self.findings) - len(self.computed)
        lines = [f"{len(self.computed)} cases computed, {len(self.faulty)} of them wrong; {refused} refused"]
        lines.append("computed: " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items())))
        lines += [f"refused {count} ×: {words}" for words, count in self.refusals.items()]
        if self.worst:
            lines.append("largest error over its limit: " + ", ".join(f"{n} {x:.2f}" for n, x in self.worst.items()))
        return "\n".join(lines + [str(finding) for finding in self.faulty[:1]])


def check(
    *,
    mask: Mask | str | None = None,
    layout: Layout | str | None = None,
    schedule: Schedule | str | None = None,
    mechanism: Mechanism | str | None = None,
    kernel: Kernel | str | None = None,
    count: int = 60,
    seed: int = 0,
    track: Track = iter,
    mesh: Mesh | None = None,
) -> Report:
    """Puts a member through many cases on virtual ranks, everything else drawn at random.

    Members are instances, names or ``module:Name``; what is left out is drawn. Every case must be exact (output and all
    gradients, against a float64 oracle), its plans must fit together, move the bytes they say and reach every rank, and
    a changed token may change nothing that the mask does not tie to it, by a single bit.

    Args:
        mask: one that knows its lengths, as `Documents` do, is tried at those.
        count: cases, beside those of 0 and 1 tokens and of more ranks than tokens.
        seed: of the cases: the same one gives the same.
        track: walks the cases, and may show how far it has come.
        mesh: the ranks to use instead of virtual ones, of any transport. All of them make this call.

    Raises:
        InputError: there is no such member.
    """
    integer(count, "count", least=1, below=1 << 24)
    if not callable(track):
        raise InputError(f"track is a function of all cases that gives them one by one; got {shown(track)}.")
    random = Random(integer(seed, "seed"))
    _refuse_unknown(layout, schedule, mechanism, kernel)
    pinned = {"layout": layout, "schedule": schedule, "kernel": kernel}
    given = {name: value for name, value in pinned.items() if value is not None}
    taken = parse(mask) if isinstance(mask, str) else None if mask is None else checked(mask)
    ranks = None if mesh is None else instance(mesh, Mesh, "mesh", "a ringattn.Mesh, or None").sequence_size
    drawn = itertools.chain(_edges(ranks), _drawn(random, count, ranks))
    cases = [_with(case, taken, mechanism, given) for case in drawn]
    return Report(tuple(examine(case, mesh) for case in track(cases)))


def _refuse_unknown(layout: object, schedule: object, mechanism: object, kernel: object) -> None:
    """An error where there is no member of such a name."""
    if layout is not None:
        layouts.named(layout, Causal(), 1)
    if schedule is not None:
        named_schedule(schedule)
    if mechanism is not None:
        named("mechanism", mechanism, Mechanism, MECHANISMS)
    if kernel is not None and not (isinstance(kernel, str) and kernel == "auto"):
        named("kernel", kernel, Kernel, KERNELS, also=("auto",))


def _edges(ranks: int | None) -> Iterator[Case]:
    """The shapes that go wrong first."""
    for length, usual in ((0, 1), (0, 3), (1, 1), (1, 3), (5, 7), (129, 4)):
        yield Case(length, Causal(), ranks or usual, groups=2, value_dim=12, use_lse=True)


def _drawn(random: Random, count: int, ranks: int | None) -> Iterator[Case]:
    """Any calls, and some with a schedule or kernel by name that may refuse them."""
    sizes = RANKS if ranks is None else (ranks,)
    for nth in range(count):
        case = (draw_cross if nth % 6 == 5 else draw)(random, ranks=sizes)
        if random.random() < (0.5 if case.mechanism == "linear" else 0.03):
            case = dataclasses.replace(case, schedule=random.choice(PARTIAL))
        if random.random() < 0.2:
            case = dataclasses.replace(case, kernel=random.choice(tuple(map(name_of, KERNELS))))
        yield case


def _with(case: Case, mask: Mask | None, mechanism: Mechanism | str | None, given: Mapping[str, object]) -> Case:
    """The case with the members that are to be checked."""
    changes: dict[str, object] = dict(given)
    if mechanism is not None:
        changes |= {"mechanism": mechanism, "features": frozenset(), "scale": None, "use_lse": False}
    if mask is not None:
        changes |= {"mask": mask, "features": case.features - {"bias"}, **_lengths(mask)}
    if "layout" not in given and not isinstance(case.layout, str) and mask is not None:
        changes["layout"] = "auto"  # an explicit layout is of the drawn length
    if "schedule" not in given and mechanism is not None:
        changes["schedule"] = "auto"
    changed = dataclasses.replace(case, **changes)  # type: ignore[arg-type]
    if changed.attends.causal and mask is None:
        return dataclasses.replace(changed, mask=changed.mask & Causal())
    if isinstance(changed.attends, Ordered) and mask is None:
        return dataclasses.replace(in_order(changed), **given)  # type: ignore[arg-type]
    return changed


def _lengths(mask: Mask) -> dict[str, int | None]:
    """The lengths that the mask knows of, or those of the case."""
    queries, keys = mask.extents
    if max(queries, keys) == MAX_TOKENS:
        return {}
    return {"length": queries, "kv_length": None if queries == keys else keys}


def _wrong_bytes(case: Case, planned: list[int], moved: list[int], passes: list[tuple[int, int]]) -> list[str]:
    """What the ranks have received besides what the plans say.

    Args:
        passes: of passes over keys alone the first and each after it, of which there are as many on each rank.
    """
    if case.attends.preparation is not None:
        planned = [said + first for said, (first, _) in zip(planned, passes, strict=True)]
        more = {(got - said) / each for got, said, (_, each) in zip(moved, planned, passes, strict=True) if each}
        if len(more) == 1 and (count := more.pop()) == int(count) >= 0:
            planned = [said + int(count) * each for said, (_, each) in zip(planned, passes, strict=True)]
    if planned == moved:
        return []
    return [f"the plans say that the ranks receive {planned} bytes; they received {moved}"]


def examine(case: Case, mesh: Mesh | None = None) -> Finding:
    """One case, from all sides: on the ranks of a mesh, which all ask for it, or on virtual ones."""
    checked_case(case)
    try:
        results, moved = run(mesh, case)
    except InputError as error:
        return Finding(case, {}, {}, refusal=str(error))
    except Exception as error:
        return Finding(case, {}, {}, (_words(error),))
    answer = oracle(case)
    found, most = errors(results, answer), limits(case, answer)
    faults = [
        f"{name} is off by {error:.1e}, which may be {most[name]:.1e}"
        for name, error in found.items()
        if name in most and not error <= most[name]
    ]
    try:
        traffic = planned_traffic(mesh, case)
        planned = [(t.received_bytes or 0) + (t.backward_received_bytes or 0) * case.backward for t, _ in traffic]
        one_axis = case.ulysses == 1 and (mesh is None or mesh.ulysses == 1)  # else extras and tables travel with heads
        if not case.deterministic and one_axis:  # whose passes are three
            faults += _wrong_bytes(case, planned, moved, [each for _, each in traffic])
        if min(case.length, case.keys):
            token = case.seed % min(case.length, case.keys)
            probed = leaks(case, lambda inputs: run(mesh, case, inputs)[0], results, token)
            faults += [f"token {token} leaks: {probed}"] if any(probed.tokens.values()) else []
    except PlanError as error:
        faults.append(f"the plans do not fit together: {error}")
    except Exception as error:
        faults.append(_words(error))
    return Finding(case, found, most, tuple(faults))


def _words(error: Exception) -> str:
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {at.filename}:{at.lineno}: {error}"
