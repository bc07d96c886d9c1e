"""Every public function, and the kinds of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import ringattn
from ringattn import conformance, masks, mechanisms, schedules
from tests.fuzzing.judging import Report, judged, text
from tests.fuzzing.kinds import (
    ARRAY,
    DTYPE,
    FLAG,
    KERNELS,
    LAST,
    LAYOUTS,
    LENGTH,
    LENGTHS,
    MASK,
    MASKS,
    MECHANISMS,
    MESH,
    NONSENSE,
    OWN,
    PAIR,
    PART,
    PLANS_OF_ALL,
    POSITIONS,
    RANK,
    RANKS,
    SCALE,
    SCHEDULES,
    SHARDINGS,
    TENSOR,
    VIRTUAL,
    Call,
    Kind,
    instance_of,
    integer,
    is_numbers,
    is_whole,
    member,
    real,
    word,
)
from tests.fuzzing.training import calls_of_checkpoints, calls_of_training


def _function(mesh: ringattn.Mesh) -> int:
    return mesh.rank


def calls() -> Iterator[Call]:
    tensors = {"q": TENSOR, "k": TENSOR, "v": TENSOR}
    members = {"mechanism": MECHANISMS, "schedule": SCHEDULES, "kernel": KERNELS}
    own = Kind((OWN,), SHARDINGS.may_be)
    plain = Kind((False, True), FLAG.may_be)
    request = {**tensors, "mask": MASKS, "sharding": own, "kv_sharding": SHARDINGS.optional, **members}
    request["deterministic"] = plain
    yield Call("attention", ringattn.attention, {**request, "return_lse": plain})
    yield Call("explain", ringattn.explain, request)
    shape = {
        "heads": PAIR.optional,
        "head_dims": PAIR.optional,
        "dtype": DTYPE.optional,
        "batch": integer(1, LAST, 1, 3),
        "mechanism": MECHANISMS.optional,
    }
    yield Call(
        "plan",
        ringattn.plan,
        {"mask": MASKS, "sharding": SHARDINGS, "schedule": SCHEDULES, **shape, "kv_sharding": SHARDINGS.optional},
    )
    whole = {
        "mask": MASKS,
        "length": integer(0, LAST, 12, 40),
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
        {"mask": MASKS, "length": integer(0, LAST, 12), "ranks": RANKS, "imbalance": real(1, 1e308, 1.02, 2)},
    )
    yield Call("simulate", ringattn.simulate, {"fn": Kind((_function,), callable), "ring": integer(1, 8, 2)})
    yield Call(
        "init",
        ringattn.init,
        {
            "ring": integer(1, 1, 1).optional,
            "ulysses": integer(1, 1, 1),
            "transport": Kind(("local", "auto"), lambda x: isinstance(x, str) and x in ("local", "auto")),
            "timeout": real(1e-9, 1e9, 600.0, 5),
            "agreement": Kind(
                ("auto", True, False), lambda x: isinstance(x, bool) or (isinstance(x, str) and x == "auto")
            ),
            "profile": Kind((None,), lambda x: x is None),
        },
    )
    yield Call(
        "Sharding",
        ringattn.Sharding,
        {
            "length": integer(0, LAST, 12, 0),
            "mesh": instance_of(ringattn.Mesh, VIRTUAL, MESH),
            "layout": LAYOUTS,
            "mask": Kind((MASK, ringattn.Causal(), None), lambda x: x is None or isinstance(x, ringattn.Mask)),
        },
    )
    dim = integer(-4, 3, 2, -2)
    yield Call("split", PART.split, {"x": TENSOR, "dim": dim})
    yield Call("join", OWN.join, {"x": TENSOR, "dim": dim})
    yield from _calls_of_collectives()
    yield Call("positions_of", PART.positions_of, {"rank": RANK})
    yield Call(
        "Mesh",
        ringattn.Mesh,
        {
            "ring": integer(1, 2**20, 4, 1),
            "ulysses": integer(1, 1, 1),
            "data": integer(1, 2**20, 1, 2),
            "rank": integer(0, 7, 0, 3),
            "transport": Kind((None,), lambda x: x is None),
        },
    )
    yield Call("virtual", ringattn.Mesh.virtual, {"ring": integer(1, 2**20, 4), "rank": integer(0, 3, 0, 3)})
    yield Call(
        "from_device_mesh",
        lambda **x: _refused(ringattn.Mesh.from_device_mesh, **x),
        {name: Kind((None,), lambda x: True) for name in ("device_mesh", "ring", "ulysses", "data", "agreement")},
    )
    for mesh in (MESH, VIRTUAL):  # neither has groups of torch.distributed
        yield Call(
            "device_mesh",
            lambda flat, mesh=mesh: _refused(mesh.device_mesh, flat=flat),
            {"flat": Kind((True,), lambda x: True)},
        )
    yield from _calls_of_masks()
    yield from _calls_of_members()
    yield from _calls_of_the_oracle()
    yield from calls_of_training()
    yield from calls_of_checkpoints()
    yield from _calls_of_conformance()
    yield Call(
        "conformance.check",
        conformance.check,
        {
            "schedule": SCHEDULES.optional,
            "layout": LAYOUTS.optional,
            "kernel": KERNELS.optional,
            "mechanism": member(mechanisms.Mechanism, "softmax", ringattn.Hard()).optional,
            "mask": member(ringattn.Mask, "causal", "", MASK).optional,
            "count": integer(1, 100, 1),
            "seed": integer(0, LAST, 3),
            "track": Kind((lambda _: [],), callable),
        },
    )


def _refused(function: Callable[..., Any], **arguments: Any) -> None:
    """For a function that must refuse all that is tried here: nothing of it is a DeviceMesh."""
    with pytest.raises(ringattn.InputError):
        function(**arguments)


def _calls_of_masks() -> Iterator[Call]:
    size = integer(0, LAST, 3, 0)
    yield Call("Window", ringattn.Window, {"left": size, "right": size})
    yield Call("Prefix", ringattn.Prefix, {"n": size})
    yield Call("SinkTokens", ringattn.SinkTokens, {"n": size})
    yield Call(
        "Documents", ringattn.Documents, {"lengths": LENGTHS, "kv_lengths": Kind((None,), LENGTHS.optional.may_be)}
    )
    bits = Kind(([[1, 0], [0, 1]], torch.eye(3)), is_numbers)
    yield Call("Blocks", ringattn.Blocks, {"bitmap": bits, "size": integer(1, LAST, 4)})
    yield Call("Predicate", ringattn.Predicate, {"fn": Kind((lambda q, k: q >= k,), callable)})
    for mask in (MASK, ringattn.Causal(), ringattn.Window(3) | ringattn.Prefix(2), ringattn.Blocks(np.eye(3), 4)):
        of = f" of {mask}"
        yield Call("dense" + of, mask.dense, {"q_positions": POSITIONS, "k_positions": POSITIONS})
        yield Call("local_positions" + of, mask.local_positions, {"positions": POSITIONS, "side": word("queries")})
        lengths = {"length": integer(0, LAST, 12), "kv_length": Kind((None, 12), LENGTH.optional.may_be)}
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
        yield Call(f"describe of {layout}", layout.describe, {"length": integer(0, LAST, 12), "size": RANKS})
    options = {"lookahead": integer(0, 1, 1, 0), "gradient_wire": word("float32")}
    for schedule in schedules.FLAT:
        yield Call(schedule.__name__, schedule, options)
    grouped = {"slices": integer(1, LAST, 1, 2), "keep": FLAG, "gradient_wire": word("float32")}
    yield Call("Ulysses", ringattn.Ulysses, grouped)
    table = Kind((None, torch.zeros(2)), lambda x: x is None or isinstance(x, torch.Tensor))
    yield Call(
        "Softmax",
        ringattn.Softmax,
        {
            "scale": SCALE.optional,
            "softcap": real(1e-300, 1e400, 2.0).optional,
            "sinks": table,
            "alibi": table,
            "relative": table,
            "bias": table,
            "dropout": real(0, 0.999, 0.0, 0.5),
            "seed": integer(0, 2**63 - 1, 3).optional,
        },
    )
    yield Call("Hard", ringattn.Hard, {"scale": SCALE.optional, "top": integer(1, LAST, 1, 3)})
    between = real(1.05, 2, 1.5, 2)
    alpha = Kind(between.right, lambda x: isinstance(x, torch.Tensor) or between.may_be(x))
    yield Call("Entmax", ringattn.Entmax, {"alpha": alpha, "scale": SCALE.optional})
    yield Call("Sampled", ringattn.Sampled, {"seed": integer(0, 2**63 - 1, 3).optional})
    yield Call("Linear", ringattn.Linear, {"features": word("taylor")})
    yield Call("Gated", ringattn.Gated, {"log_decay": table, "scale": SCALE.optional})
    yield Call("MoChA", ringattn.MoChA, {"width": integer(1, LAST, 4)})


def _calls_of_collectives() -> Iterator[Call]:
    own, dim, mesh = Kind((OWN,), SHARDINGS.may_be), integer(-4, 3, 2, -2), instance_of(ringattn.Mesh, MESH)
    names = Kind(((), ("lse",)), lambda x: isinstance(x, (tuple, list)) and all(isinstance(n, str) for n in x))
    yield Call("reduce", ringattn.reduce, {"x": TENSOR, "mesh": mesh, "op": word("sum")})
    yield Call("cumsum", ringattn.cumsum, {"x": TENSOR, "sharding": own, "dim": dim})
    beside = {"left": integer(0, 40, 2), "right": integer(0, 40, 1)}
    yield Call("halo", ringattn.halo, {"x": TENSOR, "sharding": own, "dim": dim, **beside})
    read = {"q": TENSOR, "k": TENSOR, "v": TENSOR, "sharding": own, "mechanism": MECHANISMS, "extras": names}
    yield Call("pool", ringattn.pool, read)
    rows = {"q": TENSOR, "k": TENSOR, "mask": MASKS, "rows": POSITIONS, "sharding": own}
    yield Call("attention_rows", ringattn.attention_rows, {**rows, "kv_sharding": SHARDINGS.optional})


def _calls_of_the_oracle() -> Iterator[Call]:
    allowed = Kind((np.ones((12, 12), dtype=bool),), lambda x: callable(x) or is_numbers(x))
    arrays = {"q": ARRAY, "k": ARRAY, "v": ARRAY, "allowed": allowed}
    tables = {"dout": ARRAY.optional, "scale": Kind((None, 0.5), lambda x: x is None or is_numbers(x))}
    for name in ("attention", "gradients", "magnitudes", "evaluate", "hard"):
        kinds = {**arrays, **tables}
        if name == "attention":
            del kinds["dout"]
        if name == "gradients":
            kinds["dout"] = ARRAY
        yield Call(f"reference.{name}", getattr(ringattn.reference, name), kinds)
    yield Call("reference.linear", ringattn.reference.linear, {**arrays, "dout": ARRAY.optional})
    yield Call("reference.error", ringattn.reference.error, {"actual": ARRAY, "expected": ARRAY, "magnitude": ARRAY})


def _calls_of_conformance() -> Iterator[Call]:
    """Functions of a case, and the cases themselves, which are wrong when they are run."""
    size = integer(1, 64, 2, 1)
    case = {
        "length": integer(0, 200, 12, 0),
        "mask": MASKS,
        "ranks": integer(1, 8, 2, 1),
        "batch": integer(1, 9, 1, 2),
        **dict.fromkeys(("kv_heads", "groups", "dim", "value_dim"), size),
        "layout": LAYOUTS,
        "schedule": SCHEDULES,
        "kernel": KERNELS,
        "dtype": DTYPE,
        **{name: Kind((False, True), FLAG.may_be) for name in ("use_lse", "backward", "deterministic")},
        "seed": integer(0, 2**63 - 1, 3),
        "mechanism": member(mechanisms.Mechanism, "softmax", ringattn.Hard()),
        "features": Kind((frozenset(), frozenset({"softcap"})), lambda x: isinstance(x, frozenset)),
        "scale": SCALE.optional,
        "kv_length": Kind((None,), lambda x: x is None or is_whole(x)),
    }
    yield Call("simulated", lambda **fields: conformance.simulated(conformance.Case(**fields)), case)
    placed = ("layout", "schedule", "kernel")  # which change no answer
    exact = {name: kind for name, kind in case.items() if name not in placed}
    yield Call("oracle", lambda **fields: conformance.oracle(conformance.Case(**fields)), exact)
    made = Kind((conformance.Case(12, MASK),), lambda x: isinstance(x, conformance.Case))
    yield Call(
        "attend", conformance.attend, {"mesh": Kind((MESH,), lambda x: isinstance(x, ringattn.Mesh)), "case": made}
    )
    yield Call("examine", conformance.examine, {"case": made})


EVERY = list(calls())


def fuzzed(count: int, seed: int = 0, every: Sequence[Call] = EVERY) -> Report:
    """So many calls with one argument replaced, or two."""
    random, report = Random(seed), Report()
    for nth in range(count):
        call = every[nth % len(every)]
        arguments, names = call.right, list(call.kinds)
        changed = random.sample(names, min(len(names), 1 + (random.random() < 0.25)))
        for name in changed:
            pool = call.kinds[name].right if random.random() < 0.15 else NONSENSE
            arguments[name] = random.choice(pool)
        wrong = ", ".join(name for name, value in arguments.items() if not call.kinds[name].may_be(value))
        theirs = any(callable(arguments.get(name)) for name in ("fn", "track", "step"))
        said = judged(partial(call.function, **arguments), wrong, theirs=theirs)
        report.add(call.name, said, ", ".join(f"{name}={text(arguments[name])}" for name in changed))
    return report
