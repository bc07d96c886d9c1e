"""Monotonic attention and MoChA in one process: blocks that flow into one another against the papers' equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import reference
from ringattn.errors import InputError, UnsupportedError
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.mocha import MoChA
from ringattn.mechanisms.monotonic import Monotonic
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.walk import Flow

Tensors = dict[str, torch.Tensor]
BIAS = torch.tensor([0.0, -1.0, 0.5, -3.0], dtype=torch.float64)
MECHANISMS: tuple[Ordered, ...] = (
    Monotonic(),
    Monotonic(scale=3.0, bias=BIAS),
    Monotonic(bias=BIAS, hard=True),
    MoChA(1, bias=BIAS),
    MoChA(width=3, chunk_dim=2),
    MoChA(width=4, chunk_scale=5.0, bias=BIAS),
    MoChA(width=40, chunk_dim=5),
    MoChA(width=3, hard=True),
)


def _drawn(seed: int, rows: int, keys: int) -> list[torch.Tensor]:
    """q, k, v and the output's gradient: 2 sequences, 4 heads on 2, 6 dims, values of 3."""
    g = torch.Generator().manual_seed(seed)
    shapes = (4, rows, 6), (2, keys, 6), (2, keys, 3), (4, rows, 3)
    return [torch.randn(2, *shape, generator=g, dtype=torch.float64) for shape in shapes]


def _expected(mechanism: Ordered, q: Any, k: Any, v: Any, dout: Any) -> reference.Evaluation:
    fields = {name: getattr(mechanism, name) for name in ("scale", "bias", "hard")}
    if isinstance(mechanism, MoChA):
        fields |= {name: getattr(mechanism, name) for name in ("width", "chunk_dim", "chunk_scale")}
    return reference.monotonic(q, k, v, dout, **fields)


def _in_blocks(mechanism: Ordered, inputs: list[torch.Tensor], rows: int, keys: int) -> Tensors:
    """Output and gradients over blocks of these rows and keys, as they flow into one another."""
    q, k, v, dout = inputs
    sizes = q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    problem = Problem(mechanism.without_tensors, *sizes, q.dtype, q.device, mechanism.params)
    runs_q, runs_k = ([(a, min(a + n, x.shape[2])) for a in range(0, x.shape[2], n)] for x, n in ((q, rows), (k, keys)))
    found = {f"d{name}": torch.zeros_like(x) for name, x in (("q", q), ("k", k), ("v", v), *mechanism.params.items())}
    found["out"] = torch.zeros_like(dout)
    dparams = {name: found[f"d{name}"] for name in mechanism.params}
    above = [torch.zeros(2, 4, b - a, dtype=q.dtype) for a, b in runs_k]
    below = [torch.zeros_like(x) for x in above]
    if above:
        above[0][:, :, 0] = 1
    flows: dict[tuple[int, int], Flow] = {}
    for i, (a, b) in enumerate(runs_q):
        left = torch.zeros(2, 4, b - a, dtype=q.dtype)
        for j, (c, d) in enumerate(runs_k):
            c = max(0, c - mechanism.reach)
            flows[i, j] = Flow(left, above[j])
            part, (left, above[j]) = mechanism.block(problem, q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], flows[i, j])
            found["out"][:, :, a:b] += part
    for i, (a, b) in reversed([*enumerate(runs_q)]):
        right = torch.zeros(2, 4, b - a, dtype=q.dtype)
        for j, (c, d) in reversed([*enumerate(runs_k)]):
            c = max(0, c - mechanism.reach)
            tensors = q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]
            grads, (right, below[j]) = mechanism.block_grad(
                problem, *tensors, flows[i, j], dout[:, :, a:b], Flow(right, below[j]), dparams
            )
            for name, at, grad in zip("qkv", (slice(a, b), slice(c, d), slice(c, d)), grads, strict=True):
                found[f"d{name}"][:, :, at] += grad
    return found


def _errors(found: Tensors, answer: reference.Evaluation) -> dict[str, float]:
    exact, sizes = answer.gradients, answer.magnitudes
    pairs = {
        "out": (answer.out, sizes.out),
        **{x: (getattr(exact, x), getattr(sizes, x)) for x in ("dq", "dk", "dv")},
    }
    pairs |= {f"d{name}": (x, sizes.params[name]) for name, x in exact.params.items()}
    return {name: reference.error(x, *pairs[name]) for name, x in found.items()}


@given(
    mechanism=st.sampled_from(MECHANISMS),
    seed=st.integers(0, 999),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 12)),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 12)),
)
def test_blocks_flow_into_one_another(
    mechanism: Ordered, seed: int, sizes: tuple[int, int], blocks: tuple[int, int]
) -> None:
    """However rows and keys are cut, output and gradients are those of the equations."""
    inputs = _drawn(seed, *sizes)
    found, answer = _in_blocks(mechanism, inputs, *blocks), _expected(mechanism, *inputs)
    assert max(_errors(found, answer).values()) <= 1e-14


def _by_loops(
    mechanism: Ordered, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The definition, for autograd: soft alignment and softmaxes over windows."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    last = mechanism.chunk_dim if isinstance(mechanism, MoChA) else 0
    first, keys = q.shape[3] - last, k.shape[2]
    scale = first**-0.5 if mechanism.scale is None else mechanism.scale
    p = torch.sigmoid(scale * q[..., :first] @ k[..., :first].transpose(-1, -2) + bias[:, None, None])
    above, rows = [torch.ones_like(p[:, :, 0, 0]), *[torch.zeros_like(p[:, :, 0, 0])] * (keys - 1)], []
    for i in range(q.shape[2]):
        goes_on, row = torch.zeros_like(above[0]), []
        for j in range(keys):
            arrives = goes_on + above[j]
            row.append(p[:, :, i, j] * arrives)
            goes_on = (1 - p[:, :, i, j]) * arrives
        above = row
        rows.append(torch.stack(row, dim=-1))
    weights = torch.stack(rows, dim=2)
    if isinstance(mechanism, MoChA):
        u = (
            q[..., -last or 0 :]
            @ k[..., -last or 0 :].transpose(-1, -2)
            * (mechanism.chunk_scale or (last or 6) ** -0.5)
        )
        spread = torch.zeros_like(weights)
        for n in range(keys):
            start = max(0, n - mechanism.width + 1)
            share = weights[..., n, None] * u[..., start : n + 1].softmax(dim=-1)
            spread = spread + torch.nn.functional.pad(share, (start, keys - n - 1))
        weights = spread
    return weights @ v


@pytest.mark.parametrize("mechanism", [x for x in MECHANISMS if not x.hard], ids=str)
def test_the_reference_has_the_gradients_that_autograd_finds(mechanism: Ordered) -> None:
    q, k, v, dout = _drawn(3, 5, 8)
    bias = torch.zeros(4, dtype=torch.float64) if mechanism.bias is None else mechanism.bias.clone()
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    out = _by_loops(mechanism, *leaves)
    expected = dict(zip(("dq", "dk", "dv", "dbias"), torch.autograd.grad(out, leaves, dout), strict=True))
    found = {"out": out.detach(), **{name: x for name, x in expected.items() if name[1:] != "bias" or mechanism.params}}
    answer = _expected(mechanism, *(x.detach() for x in (q, k, v, dout)))
    assert max(_errors(found, answer).values()) <= 1e-14


@pytest.mark.parametrize("mechanism", [Monotonic(scale=30.0), MoChA(3, scale=30.0, chunk_scale=30.0)], ids=str)
def test_saturated_energies_over_many_keys_keep_their_digits(mechanism: Ordered) -> None:
    """Probabilities that round to 0 and 1, over 400 keys: as exact as any."""
    inputs = _drawn(1, 12, 400)
    found = _in_blocks(mechanism, inputs, 5, 150)
    assert all(x.isfinite().all() for x in found.values())
    assert max(_errors(found, _expected(mechanism, *inputs)).values()) <= 1e-12


def test_searches_that_stop_at_no_key_give_nothing() -> None:
    never = torch.full((4,), -1e9, dtype=torch.float64)
    found = _in_blocks(Monotonic(bias=never), _drawn(0, 4, 9), 2, 4)
    assert all((found[name] == 0).all() for name in ("out", "dq", "dk", "dv", "dbias"))


@given(seed=st.integers(0, 999), rows=st.integers(1, 9), keys=st.integers(1, 12))
def test_the_decoding_rule(seed: int, rows: int, keys: int) -> None:
    """Hard searches stop at the first key, from that of the row before on, whose energy is above 0."""
    q, k, v, dout = _drawn(seed, rows, keys)
    found = _in_blocks(Monotonic(hard=True), [q, k, v, dout], 4, 5)
    energies = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    for batch, head in np.ndindex(2, 4):
        at = 0
        for i in range(rows):
            at = next((j for j in range(at, keys) if energies[batch, head, i, j] > 0), keys)
            expected = v[batch, head // 2, at] if at < keys else torch.zeros(3)
            assert torch.equal(found["out"][batch, head, i], expected.double())
    assert (found["dq"] == 0).all() and (found["dk"] == 0).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Monotonic(scale="1"), "Monotonic's scale must be a finite number"),  # type: ignore[arg-type]
        (lambda: Monotonic(bias=[1.0]), "Monotonic's bias must be a tensor"),  # type: ignore[arg-type]
        (lambda: Monotonic(hard=1), "Monotonic's hard"),  # type: ignore[arg-type]
        (lambda: MoChA(0), "MoChA's width"),
        (lambda: MoChA(width=2, chunk_dim=-1), "MoChA's chunk_dim"),
        (lambda: MoChA(2, chunk_scale=float("nan")), "MoChA's chunk_scale must be a finite number"),
        (lambda: _check(MoChA(2, chunk_dim=6)), "leaves some of the 6 dims"),
        (lambda: _check(Monotonic(bias=torch.zeros(3))), r"bias must have shape \[4\]"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def _check(mechanism: Ordered) -> None:
    mechanism.check(Problem(mechanism, 1, 4, 2, 6, 3, torch.float32, torch.device("cpu")), 5, 5)


def test_there_are_no_tiles() -> None:
    mechanism = MoChA(3)
    problem = Problem(mechanism, 1, 4, 2, 6, 3, torch.float32, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="MoChA has no tiles that could be computed in any order"):
        mechanism.empty(problem, 3)
