"""Thousands of calls with arguments that make no sense: an error of ours, at once, or a right answer; nothing else.

Each call is one that works, with one or two arguments replaced. What an argument may be is said by its kind; a call
that takes anything else without a word fails the test, and so do an error that is not of `ringattn.errors` and a call
that does not come back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import signal
import warnings
from collections.abc import Callable, Iterator
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ringattn
from ringattn import conformance, layouts, masks, mechanisms, schedules, training
from ringattn.cli import app
from ringattn.kernels import Kernel

CALLS = 4400  # of functions
COMMANDS = 400
PATIENCE = 30.0  # seconds for one call, on a busy machine

MESH = ringattn.Mesh.local()
VIRTUAL = ringattn.Mesh.virtual(3, rank=1)
OWN = ringattn.Sharding(12, MESH)
PART = ringattn.Sharding(12, VIRTUAL, "zigzag")
MASK = ringattn.Documents([5, 0, 7]) & ringattn.Causal()
Q = torch.randn(1, 2, 12, 4)
PLANS = ringattn.plan_all(MASK, 12, ring=3)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Liar:
    """Has every attribute, and each is nonsense."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


NONSENSE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**40, 2**63, -(2**63) - 1, 10**30),
    *(0.5, -0.0, 1e308, math.nan, math.inf, 1j, np.float32(2), np.int8(3), np.bool_(True), np.nan),
    *("", "x", "auto", "causal", "zigzag", "ring", "float32", "(" * 3000, "os:abort", "no.such:Thing", ":", "\0", b"x"),
    *([], [1, 2], [None], (), (1,), (2, 1), ((),), {}, {"x": 1}, {1, 2}, [[1, 2, 3]], [[(0, 4)], [(4, 12)]], range(3)),
    *(torch.zeros(()), torch.zeros(0), torch.arange(3), torch.zeros(3, dtype=torch.complex64), torch.zeros(2, 2)),
    *(torch.zeros(1, 2, 12, 4, dtype=torch.int32), torch.zeros(1, 2, 12, 4, device="meta"), torch.zeros(1, 2, 13, 4)),
    *(np.zeros((2, 2)), np.array(["a"]), np.array(None), np.zeros((2, 2), dtype=bool), np.arange(3)),
    *(object(), Unprintable(), Liar(), print, int, lambda *_: 1 / 0, ringattn.Ring, ringattn.Causal, Exception("x")),
    *(MESH, VIRTUAL, OWN, PART, MASK, ringattn.Zigzag(), ringattn.Ring(), ringattn.Softmax(), PLANS, PLANS[0], Q),
    *(torch.float32, torch.int8, slice(3), iter([1, 2]), ringattn.Documents([3]), ringattn.Explicit([[(0, 12)]])),
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an argument may be: some values that are right, and whether another one may be."""

    right: tuple[Any, ...]
    may_be: Callable[[Any], bool]

    @property
    def optional(self) -> Kind:
        """Or None."""
        return Kind((None, *self.right), lambda x: x is None or self.may_be(x))


def _whole(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _of(kind: type, *right: Any) -> Kind:
    return Kind(right, lambda x: isinstance(x, kind))


def _integer(least: int, most: int, *right: int) -> Kind:
    return Kind(right, lambda x: _whole(x) and least <= x <= most)


def _real(least: float, most: float, *right: float) -> Kind:
    def may_be(x: Any) -> bool:
        return isinstance(x, numbers.Real) and not isinstance(x, bool) and least <= float(x) <= most

    return Kind(right, may_be)


def _member(base: type, *right: Any) -> Kind:
    """An instance, or a name that is not nonsense by itself."""
    return Kind(right, lambda x: isinstance(x, base) or (isinstance(x, str) and x in right))


LAST = 2**40 - 1
LENGTH = _integer(0, LAST, 0, 1, 12, 40)
RANKS = _integer(1, 4096, 1, 2, 3)
RANK = _integer(0, 2, 0, 2)
MASKS = _of(ringattn.Mask, MASK, ringattn.Full(), ~ringattn.Full(), ringattn.Window(3), ringattn.Blocks([[1]], 12))
LAYOUTS = _member(layouts.Layout, "auto", "zigzag", "balanced", ringattn.Striped())
SCHEDULES = _member(schedules.Schedule, "auto", "ring", "route", "scan", ringattn.Route(lookahead=0))
KERNELS = _member(Kernel, "auto", "reference", "sdpa")
MECHANISMS = _of(mechanisms.Mechanism, ringattn.Softmax(), ringattn.Hard(), ringattn.Linear(), ringattn.Softmax(0.3))
SHARDINGS = _of(ringattn.Sharding, OWN, PART)
TENSOR = _of(torch.Tensor, Q)
FLAG = Kind((True, False), lambda x: isinstance(x, (bool, np.bool_)))
DTYPE = Kind(
    (torch.float32, "bfloat16"), lambda x: isinstance(x, torch.dtype) or (isinstance(x, str) and hasattr(torch, x))
)
PAIR = Kind(((2, 1), (4, 2)), lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(map(_whole, x)))
SCALE = _real(-1e400, 1e400, 0.5, 2)


def _numbers(x: Any) -> bool:
    """Whether NumPy makes an array of real numbers of it."""
    try:
        return np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x).dtype.kind in "iufb"
    except Exception:
        return False


def _positions(x: Any) -> bool:
    try:
        found = np.asarray(x)
    except Exception:
        return False
    return not found.size or (found.dtype.kind in "iu" and found.min() >= 0 and found.max() <= LAST)


ARRAY = Kind((Q.numpy(),), _numbers)
POSITIONS = Kind(([0, 3], torch.arange(12), range(5)), _positions)
LENGTHS = Kind(
    ([5, 7], (12,), []), lambda x: hasattr(x, "__iter__") and not isinstance(x, (str, bytes, dict, set, np.generic))
)
PLANS_OF_ALL = Kind((PLANS,), lambda x: isinstance(x, (list, tuple)) and all(isinstance(p, ringattn.Plan) for p in x))


def _word(word: str) -> Kind:
    return Kind((word,), lambda x: isinstance(x, str) and x == word)


@dataclasses.dataclass(frozen=True)
class Call:
    """A function, the kinds of its arguments, and the first right value of each makes a call that works."""

    name: str
    function: Callable[..., Any]
    kinds: dict[str, Kind]

    @property
    def right(self) -> dict[str, Any]:
        return {name: kind.right[0] for name, kind in self.kinds.items()}


def _function(mesh: ringattn.Mesh) -> int:
    return mesh.rank


def _calls() -> Iterator[Call]:
    tensors = {"q": TENSOR, "k": TENSOR, "v": TENSOR}
    members = {"mechanism": MECHANISMS, "schedule": SCHEDULES, "kernel": KERNELS}
    own = Kind((OWN,), SHARDINGS.may_be)
    request = {**tensors, "mask": MASKS, "sharding": own, "kv_sharding": SHARDINGS.optional, **members}
    yield Call("attention", ringattn.attention, {**request, "return_lse": Kind((False, True), FLAG.may_be)})
    yield Call("explain", ringattn.explain, request)
    shape = {
        "heads": PAIR.optional,
        "head_dims": PAIR.optional,
        "dtype": DTYPE.optional,
        "batch": _integer(1, LAST, 1, 3),
        "mechanism": MECHANISMS.optional,
    }
    yield Call(
        "plan",
        ringattn.plan,
        {"mask": MASKS, "sharding": SHARDINGS, "schedule": SCHEDULES, **shape, "kv_sharding": SHARDINGS.optional},
    )
    whole = {
        "mask": MASKS,
        "length": _integer(0, LAST, 12, 40),
        "layout": LAYOUTS,
        "schedule": SCHEDULES,
        "ring": RANKS,
    }
    yield Call("plan_all", ringattn.plan_all, {**whole, **shape, "kv_length": LENGTH.optional})
    yield Call("verify", ringattn.verify, {"plans": PLANS_OF_ALL})
    yield Call("balance", ringattn.balance, {"plans": PLANS_OF_ALL})
    yield Call(
        "lower_bound",
        ringattn.lower_bound,
        {"mask": MASKS, "length": _integer(0, LAST, 12), "ranks": RANKS, "imbalance": _real(1, 1e308, 1.02, 2)},
    )
    yield Call("simulate", ringattn.simulate, {"fn": Kind((_function,), callable), "ring": _integer(1, 8, 2)})
    yield Call(
        "init",
        ringattn.init,
        {
            "ring": _integer(1, 1, 1).optional,
            "ulysses": _integer(1, 1, 1),
            "transport": Kind(("local", "auto"), lambda x: isinstance(x, str) and x in ("local", "auto")),
            "timeout": _real(1e-9, 1e9, 600.0, 5),
            "agreement": Kind(
                ("auto", True, False), lambda x: isinstance(x, bool) or (isinstance(x, str) and x == "auto")
            ),
        },
    )
    yield Call(
        "Sharding",
        ringattn.Sharding,
        {
            "length": _integer(0, LAST, 12, 0),
            "mesh": _of(ringattn.Mesh, VIRTUAL, MESH),
            "layout": LAYOUTS,
            "mask": Kind((MASK, ringattn.Causal(), None), lambda x: x is None or isinstance(x, ringattn.Mask)),
        },
    )
    dim = _integer(-4, 3, 2, -2)
    yield Call("split", PART.split, {"x": TENSOR, "dim": dim})
    yield Call("join", OWN.join, {"x": TENSOR, "dim": dim})
    yield Call("positions_of", PART.positions_of, {"rank": RANK})
    yield Call(
        "Mesh",
        ringattn.Mesh,
        {
            "ring": _integer(1, 2**20, 4, 1),
            "ulysses": _integer(1, 1, 1),
            "data": _integer(1, 2**20, 1, 2),
            "rank": _integer(0, 7, 0, 3),
            "transport": Kind((None,), lambda x: x is None),
        },
    )
    yield Call("virtual", ringattn.Mesh.virtual, {"ring": _integer(1, 2**20, 4), "rank": _integer(0, 3, 0, 3)})
    yield Call(
        "from_device_mesh",
        lambda **x: _refused(ringattn.Mesh.from_device_mesh, **x),
        {name: Kind((None,), lambda x: True) for name in ("device_mesh", "ring", "ulysses", "data", "agreement")},
    )
    yield from _calls_of_masks()
    yield from _calls_of_members()
    yield from _calls_of_the_oracle()
    yield from _calls_of_training()
    yield Call(
        "conformance.check",
        conformance.check,
        {
            "schedule": SCHEDULES.optional,
            "layout": LAYOUTS.optional,
            "kernel": KERNELS.optional,
            "mechanism": _member(mechanisms.Mechanism, "softmax", ringattn.Hard()).optional,
            "mask": _member(ringattn.Mask, "causal", "", MASK).optional,
            "count": _integer(1, 100, 1),
            "seed": _integer(0, LAST, 3),
            "track": Kind((lambda _: [],), callable),
        },
    )


def _refused(function: Callable[..., Any], **arguments: Any) -> None:
    """For a function that must refuse all that is tried here: nothing of it is a DeviceMesh."""
    with pytest.raises(ringattn.InputError):
        function(**arguments)


def _calls_of_masks() -> Iterator[Call]:
    size = _integer(0, LAST, 3, 0)
    yield Call("Window", ringattn.Window, {"left": size, "right": size})
    yield Call("Prefix", ringattn.Prefix, {"n": size})
    yield Call("SinkTokens", ringattn.SinkTokens, {"n": size})
    yield Call(
        "Documents", ringattn.Documents, {"lengths": LENGTHS, "kv_lengths": Kind((None,), LENGTHS.optional.may_be)}
    )
    bits = Kind(([[1, 0], [0, 1]], torch.eye(3)), _numbers)
    yield Call("Blocks", ringattn.Blocks, {"bitmap": bits, "size": _integer(1, LAST, 4)})
    yield Call("Predicate", ringattn.Predicate, {"fn": Kind((lambda q, k: q >= k,), callable)})
    for mask in (MASK, ringattn.Causal(), ringattn.Window(3) | ringattn.Prefix(2), ringattn.Blocks(np.eye(3), 4)):
        of = f" of {mask}"
        yield Call("dense" + of, mask.dense, {"q_positions": POSITIONS, "k_positions": POSITIONS})
        yield Call("local_positions" + of, mask.local_positions, {"positions": POSITIONS, "side": _word("queries")})
        lengths = {"length": _integer(0, LAST, 12), "kv_length": Kind((None, 12), LENGTH.optional.may_be)}
        yield Call("describe" + of, mask.describe, lengths)
        yield Call("&" + of, lambda other, mask=mask: mask & other, {"other": MASKS})
        yield Call("|" + of, lambda other, mask=mask: mask | other, {"other": MASKS})
    yield Call("parse", masks.parse, {"text": Kind(("causal", "documents:3,4&~full"), lambda x: isinstance(x, str))})


def _calls_of_members() -> Iterator[Call]:
    masked = Kind((MASK, [MASK, MASK]), lambda x: isinstance(x, (ringattn.Mask, list, tuple)) and bool(x))
    yield Call("Balanced", ringattn.Balanced, {"masks": masked})
    runs = Kind(([[(0, 4)], [(4, 12)]],), lambda x: hasattr(x, "__iter__"))
    yield Call("Explicit", ringattn.Explicit, {"runs": runs})
    for layout in (ringattn.Zigzag(), ringattn.Balanced(MASK)):
        yield Call(f"describe of {layout}", layout.describe, {"length": _integer(0, LAST, 12), "size": RANKS})
    options = {"lookahead": _integer(0, 1, 1, 0), "gradient_wire": _word("float32")}
    for schedule in schedules.MEMBERS:
        yield Call(schedule.__name__, schedule, options)
    table = Kind((None, torch.zeros(2)), lambda x: x is None or isinstance(x, torch.Tensor))
    yield Call(
        "Softmax",
        ringattn.Softmax,
        {
            "scale": SCALE.optional,
            "softcap": _real(1e-300, 1e400, 2.0).optional,
            "sinks": table,
            "alibi": table,
            "relative": table,
            "bias": table,
            "dropout": _real(0, 0.999, 0.0, 0.5),
            "seed": _integer(0, 2**63 - 1, 3).optional,
        },
    )
    yield Call("Hard", ringattn.Hard, {"scale": SCALE.optional})


def _calls_of_the_oracle() -> Iterator[Call]:
    allowed = Kind((np.ones((12, 12), dtype=bool),), lambda x: callable(x) or _numbers(x))
    arrays = {"q": ARRAY, "k": ARRAY, "v": ARRAY, "allowed": allowed}
    tables = {"dout": ARRAY.optional, "scale": Kind((None, 0.5), lambda x: x is None or _numbers(x))}
    for name in ("attention", "gradients", "magnitudes", "evaluate", "hard"):
        kinds = {**arrays, **tables}
        if name == "attention":
            del kinds["dout"]
        if name == "gradients":
            kinds["dout"] = ARRAY
        yield Call(f"reference.{name}", getattr(ringattn.reference, name), kinds)
    yield Call("reference.linear", ringattn.reference.linear, {**arrays, "dout": ARRAY.optional})
    yield Call("reference.error", ringattn.reference.error, {"actual": ARRAY, "expected": ARRAY, "magnitude": ARRAY})


def _calls_of_training() -> Iterator[Call]:
    def rows(x: Any) -> bool:
        whole = isinstance(x, torch.Tensor) and x.dim() == 2 and not x.is_floating_point()
        return whole and not x.is_complex() and x.dtype != torch.bool

    tokens, mesh = torch.arange(24).view(2, 12) % 5, Kind((MESH,), lambda x: isinstance(x, ringattn.Mesh))
    layers = [ringattn.Causal(), ringattn.Window(3)]
    sample = {
        "tokens": Kind((tokens,), rows),
        "documents": Kind((None, [5, 7], [[12], [3, 9]], torch.tensor([12])), LENGTHS.optional.may_be),
        "labels": Kind((None, tokens), lambda x: x is None or rows(x)),
        "mask": Kind((None, ringattn.Causal(), layers), lambda x: x is None or x is layers or MASKS.may_be(x)),
        "shift": FLAG,
    }
    layout = Kind(("auto", "zigzag", ringattn.Striped()), LAYOUTS.may_be)
    more = {"mesh": mesh, "layout": layout, "scatter": FLAG, "positions": _word("document")}
    yield Call("Batch", training.Batch, {**sample, **more})
    yield Call("Sample.of", training.Sample.of, {**sample, "joined": FLAG})
    batch = training.Batch(tokens, MESH)
    batches = Kind(([batch],), lambda x: isinstance(x, (list, tuple)) and bool(x))
    yield Call("accumulate", training.accumulate, {"batches": batches})
    weights = {"label_smoothing": _real(0, 1, 0.0, 0.1), "z_loss": _real(0, 1e308, 0.0, 0.1)}
    of_batch = {"batch": _of(training.Batch, batch)}
    hidden, weight = torch.randn(2, 12, 4), torch.randn(5, 4)
    yield Call(
        "token_loss", training.token_loss, {"logits": _of(torch.Tensor, hidden @ weight.T), **of_batch, **weights}
    )
    head = {
        "hidden": _of(torch.Tensor, hidden),
        "weight": _of(torch.Tensor, weight),
        "bias": Kind((None, torch.zeros(5)), lambda x: x is None or isinstance(x, torch.Tensor)),
        "softcap": _real(0, 1e308, 0.0, 2.0),
        "chunk": _integer(1, LAST, 100),
    }
    yield Call("linear_cross_entropy", training.linear_cross_entropy, {**head, **of_batch, **weights})
    model = Kind((torch.nn.Linear(2, 2),), lambda x: isinstance(x, torch.nn.Module))
    yield Call(
        "tiled",
        training.tiled,
        {"module": Kind((torch.nn.Linear(2, 2),), model.may_be), "tokens": _integer(1, LAST, 3)},
    )
    yield Call("sum_gradients", training.sum_gradients, {"model": model, "mesh": mesh})
    yield Call("total", training.total, {"share": TENSOR, "mesh": mesh})
    yield Call("gradient_factor", training.gradient_factor, {"step": Kind((_backward,), callable), "mesh": mesh})
    held = Kind((torch.nn.Linear(2, 2),), lambda x: isinstance(x, torch.nn.Module) or hasattr(x, "__iter__"))
    yield Call("scale_gradients", training.scale_gradients, {"parameters": held, "factor": _real(1e-300, 1e308, 0.5)})
    norm = {"max_norm": _real(1e-300, 1e308, 1.0), "factor": _real(1e-300, 1e308, 1.0)}
    yield Call("clip_grad_norm", training.clip_grad_norm, {"parameters": held, **norm})
    data: Any = list(tokens)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    yield Call(
        "Loader",
        training.Loader,
        {
            "loader": _of(torch.utils.data.DataLoader, loader),
            "mesh": mesh,
            "seed": LENGTH,
            "prepare": Kind((None,), lambda x: x is None or callable(x)),
            "mask": sample["mask"],
            "layout": layout,
            "schedule": SCHEDULES,
            "scatter": FLAG,
            "positions": _word("document"),
            "shift": FLAG,
        },
    )


def _backward(probe: torch.nn.Module, x: torch.Tensor) -> None:
    probe(x).backward()


EVERY = list(_calls())


class _TooLongError(Exception):
    pass


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """An error of its own in what does not come back."""

    def late(_: int, __: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _text(value: Any) -> str:
    try:
        return repr(value)[:120]
    except Exception:
        return f"a {type(value).__name__}"


def _judged(call: Call, arguments: dict[str, Any]) -> str | None:
    """What is wrong with how a call ended."""
    wrong = [name for name, value in arguments.items() if not call.kinds[name].may_be(value)]
    try:
        with _within(PATIENCE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that overflow, as they may
            call.function(**arguments)
    except ringattn.RingAttentionError:
        return None
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        if any(callable(arguments.get(name)) for name in ("fn", "track", "step")):
            return None  # the user's own
        return f"{type(error).__name__}: {str(error)[:200]}"
    return f"took {', '.join(wrong)} without a word" if wrong else None


@pytest.mark.parametrize("call", EVERY, ids=lambda call: call.name)
def test_the_calls_work_before_anything_is_replaced(call: Call) -> None:
    call.function(**call.right)


@pytest.mark.timeout(600)
def test_calls() -> None:
    random = Random(0)
    found: dict[tuple[str, str], str] = {}
    for nth in range(CALLS):
        call = EVERY[nth % len(EVERY)]
        arguments, names = call.right, list(call.kinds)
        changed = random.sample(names, min(len(names), 1 + (random.random() < 0.25)))
        for name in changed:
            pool = call.kinds[name].right if random.random() < 0.15 else NONSENSE
            arguments[name] = random.choice(pool)
        said = _judged(call, arguments)
        if said is not None:
            shown = ", ".join(f"{name}={_text(arguments[name])}" for name in changed)
            found.setdefault((call.name, said), shown)
    assert not found, "\n".join(f"{name}({shown}): {said}" for (name, said), shown in found.items())


TEXTS = (
    *("", "x", "0", "1", "-1", "3", "12", "64", "1.5", "1e3", "nan", "99999999999999999999", "1099511627776", "١٢"),
    *(
        "full",
        "causal",
        "~full",
        "documents:3,4",
        "documents:30,34&causal",
        "(" * 3000,
        "~" * 3000,
        "window:-1",
        "&",
        "|",
    ),
    *(
        "window:3,,",
        "blocks:0/1",
        "blocks:2/1x",
        "os:abort",
        "no.such:Thing",
        ":",
        "\x00",
        "prefix:1e9",
        "documents:" + "1," * 99,
    ),
    *(
        "auto",
        "all",
        "zigzag",
        "ring",
        "route",
        "scan",
        "softmax",
        "linear",
        "hard",
        "float32",
        "bfloat16",
        "none",
        "x.jpg",
    ),
    *("/missing/x.png", "/dev/null/x.png", "--", "--help", "--json", "--ring"),
)
SMALL = {
    "simulate": ("--length", "12", "--dim", "4"),
    "plan": ("--length", "64"),
    "verify": ("--length", "12", "--dim", "4"),
    "train": ("--steps", "0"),  # which is nothing to do, whatever else it says
}
SHAPE = ("length", "heads", "kv-heads")
MEMBERS = ("layout", "schedule", "dtype")
MORE = ("dim", "mask", "mechanism")
OPTIONS = {
    "simulate": (*SHAPE, *MEMBERS, *MORE, "kernel", "ring", "value-dim", "batch", "seed"),
    "plan": (*SHAPE, *MEMBERS, *MORE, "ring", "value-dim", "verify", "rank", "draw"),
    "verify": (*SHAPE, *MEMBERS, *MORE, "kernel", "seed"),
    "train": (*SHAPE, *MEMBERS, "kernel", "data", "batch", "positions", "ranks", "replicas", "layers", "lr", "folder"),
}


@pytest.mark.timeout(600)
def test_commands() -> None:
    random, runner, found = Random(0), CliRunner(), []
    for nth in range(COMMANDS):
        command = list(OPTIONS)[nth % len(OPTIONS)]
        words = [command, *SMALL[command]]
        for option in random.sample(OPTIONS[command], random.randint(1, 2)):
            words += [f"--{option}", random.choice(TEXTS)]
        try:
            with _within(PATIENCE):
                shown = runner.invoke(app, words, catch_exceptions=True)
        except _TooLongError:
            found.append(f"{words}: does not come back")
            continue
        readable = shown.exception is None or isinstance(shown.exception, SystemExit)
        if not readable or shown.exit_code not in (0, 2) or (shown.exit_code and not shown.stderr.strip()):
            found.append(
                f"{[word[:60] for word in words]}: {shown.exit_code} {shown.exception!r} {shown.output[-300:]}"
            )
    assert not found, "\n".join(found)
