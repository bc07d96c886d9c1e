"""torch.compile: one graph whatever the masks, what eager mode gives to the bit, and no ring that runs twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ringattn
from ringattn import handles
from ringattn.errors import InputError, UnsupportedError
from ringattn.kernels import Reference
from ringattn.mechanisms import Mechanism
from ringattn.runtime import op
from ringattn.runtime.request import Request
from ringattn.runtime.spelling import spelled
from scripts.benchmarks import compile as bench
from tests.workers import Workers

Tensors = tuple[torch.Tensor, ...]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CAUSAL = ringattn.Causal()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _inputs(length: int = 24, dtype: torch.dtype = torch.float32) -> Three:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 8, generator=g).to(dtype).requires_grad_() for h in (4, 2, 2))
    return q, k, v


def _one(length: int = 24, layout: str = "zigzag") -> ringattn.Sharding:
    return ringattn.Sharding(length, ringattn.init(), layout)


def _compared(fn: Callable[..., Any], calls: list[tuple[Any, ...]], backend: str = "aot_eager") -> int:
    """The graphs that these calls need, each equal to its eager one in every bit, results and gradients."""
    counting = CompileCounterWithBackend(backend)
    compiled = torch.compile(fn, fullgraph=True, backend=counting)
    for args in calls:
        leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        found, expected = (_results(each(*args), leaves) for each in (compiled, fn))
        assert len(found) == len(expected)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    return int(counting.frame_count)


def _results(out: torch.Tensor | Tensors, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    outs = out if isinstance(out, tuple) else (out,)
    loss = torch.stack([x.masked_fill(x.isinf(), 0).square().sum() for x in outs]).sum()
    return [x.detach() for x in outs] + list(torch.autograd.grad(loss, leaves) if leaves else ())


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", bench.CHECKPOINTS)
@pytest.mark.parametrize("steps", bench.STEPS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_rank(backend: str, steps: str, checkpointing: str) -> None:
    row = bench.measured(ringattn.init(), backend, steps, checkpointing)
    assert bench.fine(row, steps, checkpointing), row
    assert backend == "inductor" or row.difference == 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_ranks_send_what_eager_mode_sends(gloo: Workers, ranks: int) -> None:
    for steps in bench.STEPS:
        for checkpointing in bench.CHECKPOINTS:
            for row in gloo.run(ranks, bench.measured, "aot_eager", steps, checkpointing):
                assert row.eager_messages > 0
                assert row.difference == 0
                assert bench.fine(row, steps, checkpointing), (steps, checkpointing, row)


def test_selective_checkpointing_in_eager_mode_sends_nothing_twice(gloo: Workers) -> None:
    for checkpointing, times in (("selective", 0), ("checkpoint", 1)):
        for messages, eager, forward in gloo.run(2, _eager_messages, checkpointing):
            assert messages == eager + times * forward


def _eager_messages(mesh: ringattn.Mesh, checkpointing: str) -> tuple[int, int, int]:
    steps, weight = bench.steps_of(mesh, "8 masks"), torch.eye(16)
    found, messages, _ = bench._run(bench.network(checkpointing), steps, weight, mesh)
    expected, plain, forward = bench._run(bench.network("plain"), steps, weight, mesh)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    return messages, plain, forward


# -- what may change without another graph, and what may not ---------------------------------------------------------


def test_masks_of_one_kind_and_any_shardings_share_a_graph() -> None:
    masks = [ringattn.Documents([n, 24 - n]) & CAUSAL for n in range(1, 13)]
    shardings = [_one(), _one(layout="contiguous"), _one(layout="striped")]

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ringattn.Mask, sharding: Any) -> torch.Tensor:
        return ringattn.attention(q.sin(), k, v, mask, sharding=sharding)

    assert _compared(fn, [(*_inputs(), mask, sharding) for mask in masks for sharding in shardings]) == 1
    others = [CAUSAL, ringattn.Full(), ringattn.Window(5), ~ringattn.Full()]
    assert _compared(fn, [(*_inputs(), mask, shardings[0]) for mask in others]) == 4  # a graph for each class


def test_log_sum_exp_and_other_dtypes() -> None:
    sharding = _one()
    for dtype in (torch.float64, torch.bfloat16):
        calls = [(*_inputs(dtype=dtype), ringattn.Documents([n, 24 - n])) for n in (3, 9, 20)]
        assert (
            _compared(
                lambda q, k, v, mask: ringattn.attention(q, k, v, mask, sharding=sharding, return_lse=True), calls
            )
            == 1
        )


@dataclasses.dataclass(frozen=True)
class _Learned:
    """A layer's learned tensors as they are used."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.Tensor], Mechanism]


@pytest.mark.parametrize(
    "learned",
    [
        _Learned("sinks", (4,), lambda x: ringattn.Softmax(sinks=x)),
        _Learned("bias", (4, 24, 24), lambda x: ringattn.Softmax(bias=x)),
        _Learned("alibi", (4,), lambda x: ringattn.Softmax(alibi=x.abs())),
        _Learned("alpha", (4,), lambda x: ringattn.Entmax(1.5 + x.tanh() / 4)),
        _Learned("softcap", (4,), lambda x: ringattn.Softmax(softcap=3.5, scale=0.25, sinks=x)),
    ],
    ids=lambda x: x.name,
)
def test_learned_tensors_and_their_gradients(learned: _Learned) -> None:
    sharding = _one()

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, mask: ringattn.Mask) -> torch.Tensor:
        return ringattn.attention(q, k, v, mask, sharding=sharding, mechanism=learned.make(x * 2))

    g = torch.Generator().manual_seed(1)
    calls = [
        (*_inputs(), torch.randn(learned.shape, generator=g, requires_grad=True), ringattn.Documents([n, 24 - n]))
        for n in (3, 9, 20)
    ]
    assert _compared(fn, calls) == 1


@pytest.mark.parametrize(
    ("mechanism", "schedule", "kernel"),
    [
        (ringattn.Linear(), "scan", "auto"),
        (ringattn.Linear(), ringattn.Route(), Reference()),
        (ringattn.Hard(), "auto", "auto"),
        (ringattn.Hard(top=3), "auto", "auto"),
        (ringattn.Entmax(1.3), "auto", "auto"),
        (ringattn.Sampled(seed=5, straight_through=0.5), "auto", "auto"),
        (ringattn.Softmax(), ringattn.Ring(), "sdpa"),
    ],
    ids=str,
)
def test_other_mechanisms_schedules_and_kernels(mechanism: Any, schedule: Any, kernel: Any) -> None:
    sharding = _one()

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: ringattn.Mask) -> torch.Tensor:
        return ringattn.attention(
            q.cos(), k, v, mask, sharding=sharding, mechanism=mechanism, schedule=schedule, kernel=kernel
        )

    assert _compared(fn, [(*_inputs(), mask) for mask in (CAUSAL, ringattn.Causal())]) == 1


def test_another_scale_is_another_computation() -> None:
    sharding = _one()

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return ringattn.attention(q, k, v, CAUSAL, sharding=sharding, mechanism=ringattn.Softmax(scale=scale))

    assert _compared(fn, [(*_inputs(), scale) for scale in (0.1, 0.2, 0.1)]) == 3  # 0.2 is tried as a symbol first


def test_dropout_draws_another_seed_at_every_run_and_the_backward_pass_replays_it() -> None:
    sharding, (q, k, v) = _one(), _inputs()
    mechanism = ringattn.Softmax(dropout=0.5)
    fn = torch.compile(
        lambda q, k, v: ringattn.attention(q, k, v, CAUSAL, sharding=sharding, mechanism=mechanism),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(3)
    first, second = fn(q, k, v), fn(q, k, v)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(fn(q, k, v), first)
    # linear in v: the gradient of the same mask of dropped pairs, times v, is the output's sum
    (dv,) = torch.autograd.grad(second.sum(), v)
    assert torch.allclose((dv * v).sum(), second.sum(), rtol=1e-5)


def test_a_seed_of_63_bits_is_the_same_seed_and_another_one_no_other_graph() -> None:
    sharding, (q, k, v) = _one(), _inputs()

    def fn(seed: int) -> torch.Tensor:
        return ringattn.attention(
            q, k, v, CAUSAL, sharding=sharding, mechanism=ringattn.Softmax(dropout=0.5, seed=seed)
        )

    seeds = (5, (1 << 32) + 9, 9, 1 << 31, (1 << 31) + 1, (1 << 63) - 1, *range(100, 112), 0)
    assert _compared(fn, [(seed,) for seed in seeds]) == 2


def test_without_gradients() -> None:
    sharding, inputs = _one(), tuple(x.detach() for x in _inputs())
    assert _compared(lambda q, k, v: ringattn.attention(q, k, v, CAUSAL, sharding=sharding), [inputs]) == 1
    q, k, v = _inputs()
    assert _compared(lambda q, k, v: ringattn.attention(q, k, v, CAUSAL, sharding=sharding), [(q, k.detach(), v)]) == 1


def test_the_output_may_be_written() -> None:
    sharding = _one()
    fn = lambda q, k, v: ringattn.attention(q, k, v, CAUSAL, sharding=sharding).mul_(2)  # noqa: E731
    for backend in ("aot_eager", "inductor"):
        assert _compared(fn, [_inputs()], backend) == 1


def test_the_log_sum_exp_may_be_written() -> None:
    sharding = _one()

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = ringattn.attention(q, k, v, CAUSAL, sharding=sharding, return_lse=True)
        lse.mul_(0)
        return out

    inputs = _inputs()
    assert _compared(fn, [inputs]) == 1
    untouched = ringattn.attention(*inputs, CAUSAL, sharding=sharding)
    for x, y in zip(_results(fn(*inputs), [*inputs]), _results(untouched, [*inputs]), strict=True):
        assert torch.equal(x, y)


def test_what_is_made_on_another_default_device_compiles() -> None:
    with torch.device("meta"):
        mask, sharding = ringattn.Documents([4, 20]), _one()
    assert mask.token.device.type == sharding.token.device.type == "cpu"
    assert _compared(lambda *x: ringattn.attention(x[0], x[1], x[2], mask, sharding=sharding), [_inputs()]) == 1


def test_the_plan_lives_as_long_as_the_compiled_graph_needs_it() -> None:
    q, k, v = _inputs()
    fn = torch.compile(
        lambda q, k, v, mask, sharding: ringattn.attention(q, k, v, mask, sharding=sharding),
        fullgraph=True,
        backend="aot_eager",
    )
    out = fn(q, k, v, CAUSAL, _one())  # the sharding is gone at once
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = ringattn.attention(q, k, v, CAUSAL, sharding=_one())
    for x, y in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.equal(x, y)
    before = handles.live()
    del out, expected
    assert handles.live() < before, "and no longer"


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_mask_made_inside_compiled_code_is_refused_in_words() -> None:
    sharding = _one()
    fn = torch.compile(
        lambda q, k, v: ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding), backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"made inside compiled code\. Make it outside and pass it in"):
        torch.compile(fn, fullgraph=True)(*_inputs())


def test_wrong_arguments_in_compiled_code_are_typed() -> None:
    sharding, (q, k, v) = _one(), _inputs()
    fn = torch.compile(lambda q, k, v, mask: ringattn.attention(q, k, v, mask, sharding=sharding), backend="aot_eager")
    with pytest.raises(InputError, match="sum to 3, the sequence has 24"):
        fn(q, k, v, ringattn.Documents([3]))


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ringattn.attention(q, k, v, CAUSAL, sharding=sharding)

    sharding = _one()
    with pytest.raises(Exception, match="cannot be exported: a program holds no plan") as caught:
        torch.export.export(Model(), _inputs(), strict=strict)
    assert strict or isinstance(caught.value, UnsupportedError)  # strict export wraps what it meets


# -- the ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.14
@pytest.mark.parametrize(
    "mechanism", [ringattn.Softmax(), ringattn.Softmax(sinks=torch.randn(4), scale=0.3), ringattn.Hard()], ids=str
)
def test_opcheck(mechanism: Any) -> None:
    sharding, inputs = _one(), _inputs()
    params = [x.detach().requires_grad_() for x in mechanism.params.values()]
    mechanism = dataclasses.replace(mechanism, **dict(zip(mechanism.params, params, strict=True)))
    request = Request(CAUSAL, sharding, None, mechanism, "auto", "auto")
    call, ticket, _ = op.prepared(request, *inputs)
    numbers: list[float] = []
    text = spelled(mechanism, numbers)
    tokens, seed = [CAUSAL.token, sharding.token, sharding.token], torch.tensor(0)
    # tickets differ from run to run, which is what the op is for
    torch.library.opcheck(
        torch.ops.ringattn.prepare.default,
        (*inputs, params, tokens, seed, numbers, text, "auto", "auto", False, call.wanted),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(torch.ops.ringattn.attention.default, (*inputs, params, ticket, numbers, text, call.wanted))
    with torch.no_grad():
        out, aux = torch.ops.ringattn.attention(*inputs, params, ticket, numbers, text, call.wanted)
        saved, given = [out, *aux], [None] * len(aux)
        plain = [x.detach() for x in inputs], [x.detach() for x in params]
        torch.library.opcheck(
            torch.ops.ringattn.attention_backward.default,
            (*plain[0], plain[1], saved, torch.ones_like(out), given, ticket, call.wanted),
        )


def _with_collectives(x: torch.Tensor, sharding: ringattn.Sharding) -> torch.Tensor:
    y = ringattn.reduce(x * 2, sharding.mesh, "sum").sin()
    z = ringattn.halo(y, sharding, 0, 1, 2).cos()
    q = z[None, None, :2]
    pooled = ringattn.pool(q, y[None, None], y[None, None], sharding=sharding)
    assert isinstance(pooled, torch.Tensor)
    return z.sum() + pooled.sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, which looks at tensors between graphs
def test_graphs_break_for_collectives_and_look_at_nothing_in_them() -> None:
    def both(mesh: ringattn.Mesh) -> None:
        sharding = ringattn.Sharding(12, mesh)
        x = torch.randn(12 // mesh.size, 4, generator=torch.Generator().manual_seed(mesh.rank))
        found = []
        for run in (_with_collectives, torch.compile(_with_collectives, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            value = run(leaf, sharding)
            value.backward()
            found.append((value.detach(), leaf.grad))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1])

    ringattn.simulate(both, ring=1)
    ringattn.simulate(both, ring=3)


def test_a_graph_without_breaks_says_which_collective_breaks_it() -> None:
    sharding = ringattn.Sharding(12, ringattn.init())
    with pytest.raises(Exception, match=r"ringattn\.reduce talks to other ranks"):
        torch.compile(_with_collectives, fullgraph=True, backend="aot_eager")(torch.randn(12, 4), sharding)
