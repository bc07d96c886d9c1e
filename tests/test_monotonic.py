"""Monotonic attention and MoChA over ranks: the wave against the equations, on the simulator and Gloo, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import ringattn
from ringattn import reference
from ringattn.errors import AgreementError, InputError, UnsupportedError
from ringattn.mechanisms.mocha import MoChA
from ringattn.mechanisms.monotonic import Monotonic
from ringattn.mechanisms.ordered import Ordered
from ringattn.plans.wave import plan_wave
from ringattn.schedules.wave import Wave
from tests.workers import Workers

Results = dict[str, torch.Tensor]
FULL = ringattn.Full()


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call over whole sequences: 2 of them, 4 heads on 2, 8 dims, values of 6."""

    mechanism: Ordered
    queries: int
    keys: int
    block: int = 5
    dtype: torch.dtype = torch.float32
    bias: bool = False
    spread: float = 1.0

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v, the output's gradient and the bias."""
        g = torch.Generator().manual_seed(self.queries + self.keys)
        shapes = (4, self.queries, 8), (2, self.keys, 8), (2, self.keys, 6), (4, self.queries, 6)
        q, k, v, dout = (torch.randn(2, *shape, generator=g) for shape in shapes)
        return [x.to(self.dtype) for x in (q * self.spread, k, v, dout, torch.randn(4, generator=g))]

    def expected(self) -> reference.Evaluation:
        """By the equations."""
        q, k, v, dout, bias = (x.double().numpy() for x in self.inputs())
        names = ("scale", "hard", "width", "chunk_dim", "chunk_scale")
        fields = {name: getattr(self.mechanism, name) for name in names if hasattr(self.mechanism, name)}
        return reference.monotonic(q, k, v, dout, bias=bias if self.bias else None, **fields)


def _attend(mesh: ringattn.Mesh, problem: Problem) -> tuple[Results, tuple[int, int]]:
    """This rank's results, joined, and the bytes of payload it has received in each pass beside what its plan says."""
    own, kv = ringattn.Sharding(problem.queries, mesh), ringattn.Sharding(problem.keys, mesh)
    *whole, bias = problem.inputs()
    q, k, v, dout = (s.split(x, 2).clone() for s, x in zip((own, kv, kv, own), whole, strict=True))
    leaves = [x.requires_grad_() for x in (q, k, v, *([bias] if problem.bias else []))]
    mechanism = dataclasses.replace(problem.mechanism, bias=bias if problem.bias else None)
    counters, schedule = mesh.connected().counters, Wave(problem.block)
    shape: dict[str, Any] = {"heads": (4, 2), "head_dims": (8, 6), "dtype": problem.dtype, "batch": 2}
    moved = plan_wave(own, kv, mechanism=mechanism, schedule=schedule, **shape).traffic()
    start = counters.received_bytes
    out = ringattn.attention(q, k, v, FULL, sharding=own, kv_sharding=kv, mechanism=mechanism, schedule=schedule)
    middle = counters.received_bytes
    assert middle - start == moved.received_bytes
    gradients = torch.autograd.grad(out, leaves, dout)
    assert counters.received_bytes - middle == moved.backward_received_bytes
    found = {"out": own.join(out.detach(), 2)}
    for name, sharding, x in zip(("dq", "dk", "dv"), (own, kv, kv), gradients[:3], strict=True):
        found[name] = sharding.join(x, 2)
    if problem.bias:
        found["dbias"] = gradients[3].double()
    return found, (middle - start, counters.received_bytes - middle)


def _whole(results: list[tuple[Results, tuple[int, int]]]) -> Results:
    found = dict(results[0][0])
    if "dbias" in found:
        found["dbias"] = torch.stack([each["dbias"] for each, _ in results]).sum(dim=0)
    return found


def _judge(problem: Problem, found: Results, limit: float) -> None:
    """By the magnitudes, and by the norms of the exact results: nothing cancels unnoticed."""
    answer = problem.expected()
    exact, sizes = answer.gradients, answer.magnitudes
    pairs = {"out": (answer.out, sizes.out)} | {x: (getattr(exact, x), getattr(sizes, x)) for x in ("dq", "dk", "dv")}
    pairs |= {f"d{name}": (x, sizes.params[name]) for name, x in exact.params.items()}
    assert found.keys() == pairs.keys()
    for name, x in found.items():
        assert reference.error(x.double(), *pairs[name]) <= limit, name
        assert reference.error(x.double(), pairs[name][0], pairs[name][0]) <= 10 * limit, name


MECHANISMS = (Monotonic(), Monotonic(hard=True), MoChA(1), MoChA(4, chunk_dim=3), MoChA(40, chunk_scale=2.0))


@given(
    mechanism=st.sampled_from(MECHANISMS),
    ranks=st.sampled_from((1, 2, 3, 5, 8)),
    queries=st.integers(0, 24),
    keys=st.integers(0, 24),
    block=st.integers(1, 25),
    bias=st.booleans(),
    wide=st.booleans(),
)
def test_virtual_ranks(
    mechanism: Ordered, ranks: int, queries: int, keys: int, block: int, bias: bool, wide: bool
) -> None:
    """Any lengths, blocks and numbers of ranks, empty ones too: out, all gradients, and the bytes the plan says."""
    problem = Problem(mechanism, queries, keys, block, torch.float64 if wide else torch.float32, bias)
    _judge(problem, _whole(ringattn.simulate(_attend, problem, ring=ranks).results), 1e-14 if wide else 1e-6)


@pytest.mark.parametrize("mechanism", [Monotonic(), MoChA(9)], ids=str)
def test_saturated_energies_over_many_keys(mechanism: Ordered) -> None:
    problem = Problem(mechanism, 12, 400, block=5, spread=50.0)
    _judge(problem, _whole(ringattn.simulate(_attend, problem, ring=3).results), 1e-6)


def _in_arrays(mesh: ringattn.Mesh, problem: Problem) -> tuple[dict[str, NDArray[np.float64]], tuple[int, int]]:
    """As `_attend`, in what pickles without shared memory."""
    found, moved = _attend(mesh, problem)
    return {name: x.double().numpy() for name, x in found.items()}, moved


@pytest.mark.parametrize("transport", ["gloo", "mpi"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_give_the_bits_of_the_simulator(request: pytest.FixtureRequest, transport: str, ranks: int) -> None:
    workers: Workers = request.getfixturevalue(transport)
    for mechanism in (Monotonic(), MoChA(12, chunk_dim=3)):
        problem = Problem(mechanism, 23, 31, block=4, bias=True)
        runs = workers.run(ranks, _in_arrays, problem)
        found = _whole([({name: torch.from_numpy(x) for name, x in each.items()}, moved) for each, moved in runs])
        virtual = _whole(ringattn.simulate(_attend, problem, ring=ranks).results)
        assert all(torch.equal(found[name], virtual[name].double()) for name in found)
        _judge(problem, found, 1e-6)


def _kept(mesh: ringattn.Mesh, problem: Problem) -> tuple[int, int]:
    """Bytes that autograd keeps of a call beside inputs and output, and what the plan says."""
    own, kv = ringattn.Sharding(problem.queries, mesh), ringattn.Sharding(problem.keys, mesh)
    q, k, v, *_ = problem.inputs()
    parts = [s.split(x, 2).requires_grad_() for s, x in zip((own, kv, kv), (q, k, v), strict=True)]
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    call: dict[str, Any] = {"sharding": own, "kv_sharding": kv, "mechanism": problem.mechanism}
    call["schedule"] = Wave(problem.block)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ringattn.attention(parts[0], parts[1], parts[2], FULL, **call)
    shape: dict[str, Any] = {"heads": (4, 2), "head_dims": (8, 6), "dtype": problem.dtype, "batch": 2}
    plan = plan_wave(own, kv, mechanism=problem.mechanism, schedule=Wave(problem.block), **shape)
    planned = sum(size for name, size in plan.memory().buffers.items() if name.startswith("kept"))
    return sum(x.nbytes for x in kept if x.dtype == torch.float64), planned


def test_what_is_kept_is_linear() -> None:
    """A number for each query, and one for each own key and block; no matrix of queries and keys."""
    for kept, planned in ringattn.simulate(_kept, Problem(MoChA(4), 40, 50, block=8), ring=2).results:
        assert kept == planned == 2 * 4 * 8 * (40 + 6 * 25)


def test_half_precision_is_rounded_once() -> None:
    """Inputs and outputs are bfloat16, and nothing between them is."""
    problem = Problem(MoChA(3), 20, 30, dtype=torch.bfloat16)
    found = _whole(ringattn.simulate(_attend, problem, ring=1).results)
    answer = problem.expected()
    assert reference.error(found["out"].double(), answer.out, answer.magnitudes.out) <= 2**-9
    assert reference.error(found["dq"].double(), answer.gradients.dq, answer.gradients.dq) <= 2**-8


@pytest.mark.parametrize("mechanism", [Monotonic(), MoChA(3, chunk_dim=2)], ids=str)
def test_gradcheck(mechanism: Ordered) -> None:
    sharding = ringattn.Sharding(5, ringattn.init())
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, 5, d, generator=g, dtype=torch.float64) for h, d in ((2, 4), (1, 4), (1, 3))]
    leaves = [x.requires_grad_() for x in (*inputs, torch.randn(2, generator=g, dtype=torch.float64))]

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        attends = dataclasses.replace(mechanism, bias=bias)
        return ringattn.attention(q, k, v, FULL, sharding=sharding, mechanism=attends, schedule=Wave(2))

    assert torch.autograd.gradcheck(fn, leaves)


def _rows(mesh: ringattn.Mesh, problem: Problem, at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The joined weights of some rows, and those rows of the output."""
    own, kv = ringattn.Sharding(problem.queries, mesh), ringattn.Sharding(problem.keys, mesh)
    q, k, v, *_ = problem.inputs()
    parts = own.split(q, 2), kv.split(k, 2), kv.split(v, 2)
    call: dict[str, Any] = {"sharding": own, "kv_sharding": kv, "mechanism": problem.mechanism}
    weights = kv.join(ringattn.attention_rows(*parts[:2], FULL, at, **call), 3)
    return weights, own.join(ringattn.attention(*parts, FULL, **call), 2)[:, :, at]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("mechanism", [Monotonic(), MoChA(7, chunk_dim=2)], ids=str)
def test_rows_are_the_weights_of_the_values(mechanism: Ordered, ranks: int) -> None:
    """In any order, keys of windows that lie on several ranks among them."""
    problem = Problem(mechanism, 13, 17, dtype=torch.float64)
    weights, out = ringattn.simulate(_rows, problem, [12, 0, 7], ring=ranks).results[-1]
    values = problem.inputs()[2].repeat_interleave(2, dim=1)
    assert weights.shape == (2, 4, 3, 17)
    torch.testing.assert_close(weights @ values, out, rtol=1e-12, atol=1e-13)
    assert (weights >= 0).all() and (weights.sum(dim=-1) <= 1 + 1e-12).all()


def test_ranks_that_ask_for_other_rows_learn_it() -> None:
    problem = Problem(Monotonic(), 9, 9)
    with pytest.raises(AgreementError, match="they differ in shapes"):
        ringattn.simulate(lambda mesh: _rows(mesh, problem, [mesh.rank]), ring=2)


def _stops(mesh: ringattn.Mesh, problem: Problem) -> torch.Tensor:
    own, kv = ringattn.Sharding(problem.queries, mesh), ringattn.Sharding(problem.keys, mesh)
    q, k, *_, bias = problem.inputs()
    mechanism = dataclasses.replace(problem.mechanism, bias=bias)
    parts = own.split(q, 2), kv.split(k, 2)
    return own.join(ringattn.monotonic_stops(*parts, sharding=own, kv_sharding=kv, mechanism=mechanism), 2)


@given(
    mechanism=st.sampled_from((Monotonic(), Monotonic(scale=0.1), MoChA(3, chunk_dim=5))),
    ranks=st.sampled_from((1, 2, 3, 5, 8)),
    queries=st.integers(1, 24),
    keys=st.integers(0, 24),
)
def test_stops_are_those_of_the_rule(mechanism: Ordered, ranks: int, queries: int, keys: int) -> None:
    """The first key from the last one's on whose energy is above 0."""
    problem = Problem(mechanism, queries, keys)
    q, k, _, _, bias = (x.double() for x in problem.inputs())
    dims = 8 - getattr(mechanism, "chunk_dim", 0)
    scale = mechanism.scale or dims**-0.5
    energies = scale * q[..., :dims] @ k[..., :dims].repeat_interleave(2, dim=1).transpose(-1, -2) + bias[:, None, None]
    expected = torch.full((2, 4, queries), -1)
    for batch in range(2):
        for head in range(4):
            at = 0
            for i in range(queries):
                at = next((j for j in range(at, keys) if energies[batch, head, i, j] > 0), keys)
                expected[batch, head, i] = at if at < keys else -1
    for found in ringattn.simulate(_stops, problem, ring=ranks).results:
        assert torch.equal(found, expected)


def _call(mesh: ringattn.Mesh, **more: Any) -> torch.Tensor:
    sharding = more.pop("sharding", None) or ringattn.Sharding(16, mesh, more.pop("layout", "contiguous"))
    x = torch.randn(1, 2, sharding.count, 4)
    call = {"mask": FULL, "mechanism": Monotonic(), **more}
    out: torch.Tensor = ringattn.attention(x, x, x, sharding=sharding, **call)
    return out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask": ringattn.Causal()}, "Monotonic searches all keys from the first on; got the mask causal. Use"),
        ({"layout": "zigzag"}, "so both are contiguous; got queries zigzag"),
        ({"schedule": "ring"}, "and ring meets keys in any order. Use schedule='auto'"),
        ({"schedule": ringattn.Route()}, "Monotonic walks the keys in order, and route meets keys in any order"),
        ({"deterministic": True}, "and deterministic=True computes tiles in an order of its own. Leave it out"),
        ({"kernel": "reference"}, "and kernel=reference computes tiles in any order. Leave kernel out"),
        ({"mechanism": ringattn.Softmax(), "schedule": "wave"}, "wave hands blocks .* Use ring, route or auto"),
        ({"mechanism": ringattn.Hard(), "schedule": Wave()}, "wave hands blocks of queries from rank to rank"),
        ({"return_lse": True}, "has no extra 'lse'"),
    ],
)
def test_refusals(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ringattn.simulate(lambda mesh: _call(mesh, **arguments), ring=2)


def test_ordinary_plans_say_where_to_go() -> None:
    sharding = ringattn.Sharding(16, ringattn.Mesh.virtual(2))
    with pytest.raises(UnsupportedError, match="Monotonic walks the keys in order, by plans of another kind"):
        ringattn.plan(FULL, sharding, mechanism=Monotonic())
    with pytest.raises(UnsupportedError, match="wave hands blocks of queries"):
        ringattn.plan(FULL, sharding, "wave")


def _apart(mesh: ringattn.Mesh) -> str:
    try:
        _call(mesh, mechanism=MoChA(2 + mesh.rank))
    except AgreementError as error:
        return str(error)
    return "no error"


def test_ranks_that_call_differently_learn_it() -> None:
    assert all("they differ in mechanism (rank 0: " in said for said in ringattn.simulate(_apart, ring=3).results)


def test_explain_shows_the_wave() -> None:
    sharding = ringattn.Sharding(16, ringattn.init())
    x = torch.randn(1, 2, 16, 4)
    said = ringattn.explain(x, x, x, FULL, sharding=sharding, mechanism=MoChA(3), schedule=Wave(4))
    assert "rank 0 of 1, wave: full, 16 tokens contiguous, 1 ranks" in said and "step 3: compute block 3" in said


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo asks of what goes from graph to graph
def test_compiled_code_breaks_its_graph_and_gives_the_same() -> None:
    sharding, bias = ringattn.Sharding(16, ringattn.init()), torch.randn(2, requires_grad=True)
    x = torch.randn(1, 2, 16, 4, requires_grad=True)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return ringattn.attention(2 * x, x, x, FULL, sharding=sharding, mechanism=MoChA(3, bias=bias)) ** 2

    results = []
    for run in (fn, torch.compile(fn, backend="aot_eager")):
        out = run(x)
        results.append((out, *torch.autograd.grad(out.sum(), (x, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(Exception, match="_between_graphs talks to other ranks, and is called between graphs"):
        torch.compile(fn, fullgraph=True, backend="eager")(x)
