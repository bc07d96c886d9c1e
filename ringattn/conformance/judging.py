"""How far results are from the float64 oracle, and how far they may be.

The measure is ‖error‖ / ‖A‖, A being the float64 formula with every factor absolute (`ringattn.reference`): rounding
errors are proportional to it however much of a gradient cancels. A relative norm of the gradient itself would reject
correct code on one-key rows, and an absolute tolerance would accept wrong gradients that are small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from ringattn import reference
from ringattn.conformance.case import Case, checked_case
from ringattn.conformance.running import Results, simulated
from ringattn.errors import InputError
from ringattn.mechanisms import Block, Entmax, Gated, Hard, Linear, Mechanism, Problem, Sampled, Softmax
from ringattn.mechanisms.ordered import Ordered

DENSE_LIMIT = 20_000  # tokens of a mask as a matrix
NAMES = ("out", "dq", "dk", "dv")
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-14}
"""By dtype, in units of the magnitudes of `ringattn.reference`; the oracle's own rounding is in that of float64."""
WITHOUT_ORACLE = 1000
"""Times the precision, for mechanisms that have no oracle but themselves: how far their terms cancel is not known."""


def oracle(case: Case, seen: Callable[[int], None] = lambda _: None) -> reference.Evaluation:
    """The float64 answer from the inputs as rounded to the case's dtype; ``seen`` is told each row it has come to.

    All mechanisms but Entmax and Sampled with terms of their own have oracles. Any other mechanism is compared
    with itself, in one block and float64, its gradients with those that autograd finds: a wrong merge, mask, plan or
    gradient shows.
    """

    def rows(start: int, stop: int) -> NDArray[np.bool_]:
        seen(start)
        return case.rows(start, stop)

    mechanism = checked_case(case).attends
    q, k, v, dout, dlse = (x.double().numpy() for x in case.inputs())
    backward = dout if case.backward else None
    match mechanism:
        case Hard():
            return reference.hard(q, k, v, rows, backward, scale=mechanism.scale, top=mechanism.top)
        case Gated():
            decay = _double(mechanism.log_decay)
            return reference.gated(q, k, v, rows, backward, log_decay=decay, scale=mechanism.scale)
        case Ordered():
            return reference.monotonic(q, k, v, backward, **_fields(mechanism))
        case Linear():
            return reference.linear(q, k, v, rows, backward, features=mechanism.features)
        case Entmax():
            given = {field.name: _double(getattr(mechanism, field.name)) for field in dataclasses.fields(mechanism)}
            return reference.entmax(q, k, v, rows, backward, **given)
        case Sampled(seed=int(seed)) if _plain(mechanism):
            return reference.sampled(q, k, v, rows, backward, seed=seed, scale=mechanism.scale)
        case Softmax():
            scores = {name: x for name, x in _fields(mechanism).items() if name != "seed" or x is not None}
            return reference.evaluate(q, k, v, rows, backward, dlse if case.backward else None, **scores)
    return _in_one_block(case, mechanism)


def _plain(mechanism: Sampled) -> bool:
    """Whether the scores are products and the output is of them alone."""
    return not mechanism.beyond({"scale", "seed"})


def _fields(mechanism: Mechanism) -> dict[str, Any]:
    """A mechanism's fields, tensors in float64."""
    return {field.name: _double(getattr(mechanism, field.name)) for field in dataclasses.fields(mechanism)}


def _double(x: Any) -> Any:
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else x


def _in_one_block(case: Case, mechanism: Mechanism) -> reference.Evaluation:
    """The mechanism's own formula for all pairs at once."""
    if mechanism.preparation is not None:
        raise InputError(
            f"There is no oracle of {mechanism}: what its passes over keys find has a gradient of its own."
        )
    q, k, v, dout, _ = (x.double() for x in case.inputs())
    params = {name: x.detach().double().requires_grad_() for name, x in mechanism.params.items()}
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(params.values())
    sizes = case.batch, case.heads, case.kv_heads, case.dim, case.value_dim
    problem = Problem(mechanism.without_tensors, *sizes, torch.float64, q.device, params)
    queries, keys = slice(0, case.length, 1), slice(0, case.keys, 1)
    with torch.enable_grad():
        state = mechanism.tile(problem, Block(queries, queries, keys, case.allowed()), q, k, v)
        out, _ = mechanism.finish(problem, state)
        found = torch.autograd.grad((out * dout).sum(), leaves, materialize_grads=True)
    dq, dk, dv, *rest = (x.numpy() for x in found)
    gradients = reference.Gradients(dq, dk, dv, dict(zip(params, rest, strict=True)))
    exact = out.detach().numpy()
    sizes_of_params = {name: abs(x) for name, x in gradients.params.items()}
    magnitudes = reference.Magnitudes(abs(exact), abs(dq), abs(dk), abs(dv), sizes_of_params)
    return reference.Evaluation(exact, np.full(exact.shape[:3], np.nan), gradients, magnitudes)


def errors(results: Results, answer: reference.Evaluation) -> dict[str, float]:
    """‖error‖ / ‖A‖ of the output and every gradient; of the log-sum-exp, relative to 1 + |lse|."""
    exact = _pairs(answer)
    return {name: reference.error(x.double().numpy(), *exact[name]) for name, x in results.items()}


def _pairs(answer: reference.Evaluation) -> dict[str, tuple[Any, Any]]:
    """The exact value and the magnitude of each result."""
    gradients, sizes = answer.gradients, answer.magnitudes
    return {
        "out": (answer.out, sizes.out),
        "lse": (answer.lse, 1 + abs(answer.lse)),
        "dq": (gradients.dq, sizes.dq),
        "dk": (gradients.dk, sizes.dk),
        "dv": (gradients.dv, sizes.dv),
        **{f"d{name}": (x, sizes.params[name]) for name, x in gradients.params.items()},
    }


def limits(case: Case, answer: reference.Evaluation) -> dict[str, float]:
    """The largest errors allowed, by name.

    float32: 1e-6, float64: 1e-14, and three times that from 64 ranks on, whose merges add up.
    Half precision: twice the error in one piece on the same inputs, of PyTorch's own kernel where it has one, or twice
    what rounding the exact result costs, where that is more.
    """
    names = [name for name in _pairs(answer) if case.backward or not name.startswith("d")]
    if case.dtype not in (torch.float32, torch.float64):
        found, rounded = errors(in_one_piece(case), answer), _rounded(case, answer)
        return {name: 2 * max(error, rounded[name]) for name, error in found.items()}
    if not isinstance(case.attends, (Softmax, Hard, Linear, Entmax, Gated, Sampled, Ordered)):
        return dict.fromkeys(names, WITHOUT_ORACLE * torch.finfo(case.dtype).eps)
    return dict.fromkeys(names, LIMITS[case.dtype] * (1 if case.ranks < 64 else 3))


def _rounded(case: Case, answer: reference.Evaluation) -> dict[str, float]:
    """The errors of the exact results, rounded to the case's dtype."""
    exact = {name: torch.from_numpy(np.array(x)).to(case.dtype) for name, (x, _) in _pairs(answer).items()}
    return errors(exact, answer)


def in_one_piece(case: Case) -> Results:
    """The results on one device: of PyTorch's own kernel under the mask as a matrix, or of ours on one rank."""
    mechanism = case.attends
    plain = isinstance(mechanism, Softmax) and not (mechanism.params or mechanism.softcap or mechanism.dropout)
    if not isinstance(mechanism, Softmax) or not plain or case.use_lse:
        return simulated(
            dataclasses.replace(case, ranks=1, ulysses=1, layout="contiguous", schedule="auto", kernel="auto")
        )
    if max(case.length, case.keys) > DENSE_LIMIT:
        raise InputError(
            f"Half precision is judged by PyTorch's kernel under a dense mask, up to {DENSE_LIMIT} tokens; got "
            f"{case.length}. Use --dtype float32."
        )
    q, k, v, dout, _ = case.inputs()
    for x in (q, k, v):
        x.requires_grad_(case.backward)
    grouped = case.groups > 1
    out = scaled_dot_product_attention(q, k, v, attn_mask=case.allowed(), enable_gqa=grouped, scale=mechanism.scale)
    gradients = torch.autograd.grad(out, (q, k, v), dout) if case.backward else ()
    return {name: x.detach() for name, x in zip(NAMES, (out, *gradients), strict=False)}
