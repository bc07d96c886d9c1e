"""CUDA rehearsed without a GPU: the engine's steps on fake CUDA tensors.

A fake tensor has a shape, a dtype and a device, and no memory: operators check their arguments and say what they would
return. So a wrong device and a wrong signature fail here, and so does what would wait for the device: reading a number
of a tensor, copying one to the host, or copying one from the host without ``non_blocking``. Numbers are not looked at.

Every rank of a call runs by itself, with a transport that checks its messages and moves nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import ringattn
from ringattn.kernels import MEMBERS as KERNELS
from ringattn.kernels.base import Kernel
from ringattn.kernels.chunked import Chunked
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.mechanisms import MEMBERS as MECHANISMS
from ringattn.mechanisms.base import Mechanism, Problem, State, Summarising
from ringattn.mechanisms.ordered import Ordered
from ringattn.mechanisms.softmax import Softmax
from ringattn.naming import by_name
from ringattn.plans.tiles import Tiles
from ringattn.runtime import engine, passing
from ringattn.runtime.call import PassCall, TileCall
from ringattn.runtime.request import Request
from ringattn.schedules import FLAT
from ringattn.transports.base import Buffers, Message, Transport

CUDA = torch.device("cuda", 0)
HOST = torch.device("cpu")
RANKS, LENGTH, HEADS, KV_HEADS, DIM = 3, 96, 4, 2, 16
WAITS = {"item", "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}
COPIES = {"to", "_to_copy", "copy_"}


OPERATORS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.Tensor.copy_: torch.ops.aten.copy_.default,
    torch.Tensor.__invert__: torch.ops.aten.bitwise_not.default,
    torch.Tensor.nonzero: torch.ops.aten.nonzero.default,
    torch.Tensor.contiguous: lambda x: torch.ops.aten.clone.default(x, memory_format=torch.contiguous_format),
}


class WaitError(AssertionError):
    """Something in a step would wait for the device."""


class _Watch(TorchDispatchMode):
    """Fails what waits for the device, and what brings a tensor of the host to one of the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        before = _tensors(args, kwargs)
        if name in WAITS and any(x.device == CUDA for x in before):
            raise WaitError(f"{func} reads a tensor of the device")
        if name in ("index", "index_put_") and any(x.dtype == torch.bool for x in before[1:]):
            raise WaitError(f"{func} by booleans counts them on the host")
        if name not in COPIES and len({x.device.type for x in before if x.dim()}) > 1:
            raise AssertionError(f"{func} takes tensors of the host and of the device")
        out = func(*args, **kwargs)
        devices = {x.device.type for x in (*before, *_tensors(out))}
        if name in COPIES:
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if len(devices) > 1 and (_tensors(out)[0].device == HOST or not asynchronous):
                raise WaitError(f"{func} copies between host and device")
        return out


class _WithoutGuards(TorchFunctionMode):
    """Methods that look for the device before they look at whether it is fake, by the operators they are made of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return _at(*args)
        if func is torch.Tensor.__setitem__:
            x, index, value = args
            if isinstance(index, torch.Tensor):
                return x.index_put_((index,), value)
            place = _at(x, index)
            return torch.ops.aten.copy_.default(place, value) if isinstance(value, torch.Tensor) else place.fill_(value)
        kwargs = kwargs or {}
        if func in OPERATORS:
            return OPERATORS[func](*args, **kwargs)
        if func is torch.Tensor.to and not isinstance(args[1], torch.dtype):
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type != args[0].device.type:
                return torch.ops.aten._to_copy(args[0], dtype=dtype, device=device, non_blocking=non_blocking)
        return func(*args, **kwargs)


def _at(x: torch.Tensor, index: Any) -> torch.Tensor:
    """``x[index]``, by slices, numbers, None, an ellipsis or one tensor."""
    steps, dim = list(index if isinstance(index, tuple) else (index,)), 0
    if any(step is ... for step in steps):
        at = next(i for i, step in enumerate(steps) if step is ...)
        given = sum(step is not None for step in steps) - 1
        steps[at : at + 1] = [slice(None)] * (x.dim() - given)
    for step in steps:
        if isinstance(step, torch.Tensor):
            places = [None] * dim + [step]
            x, dim = torch.ops.aten.index.Tensor(x, places), dim + step.dim()
        elif isinstance(step, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, step.start, step.stop, step.step or 1), dim + 1
        elif step is None:
            x, dim = x.unsqueeze(dim), dim + 1
        else:
            x = x.select(dim, step)
    return x


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class _FakeBuffers(Buffers):
    """Buffers that are not cast: a fake CUDA tensor cannot be viewed in another dtype without CUDA."""

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)


class _Stage(Transport):
    """Checks messages and moves nothing."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__("stage", rank, size, agreement=False)
        self.buffers = _FakeBuffers()

    def refusal(self, device: torch.device) -> str | None:
        return None

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], label: str) -> Callable[[], None]:
        for _, buffer in (*sends, *receives):
            assert buffer.device == CUDA, f"{label}: a message lies on {buffer.device}"
        return lambda: None


def _rehearse(
    kernel: Kernel,
    mechanism: Mechanism,
    dtype: torch.dtype,
    schedule: str,
    mask: ringattn.Mask,
    layout: str,
) -> None:
    """Both passes of every rank."""
    for rank in range(RANKS):
        mesh = ringattn.Mesh.virtual(RANKS, rank=rank, transport=_Stage(rank, RANKS))
        sharding = ringattn.Sharding(LENGTH, mesh, layout, mask)
        with FakeTensorMode(allow_non_fake_inputs=True), _WithoutGuards():
            _rehearse_rank(kernel, mechanism, dtype, schedule, mask, sharding)


def _rehearse_rank(
    kernel: Kernel,
    mechanism: Mechanism,
    dtype: torch.dtype,
    schedule: str,
    mask: ringattn.Mask,
    sharding: ringattn.Sharding,
) -> None:
    def made(heads: int) -> torch.Tensor:
        return torch.empty(2, heads, sharding.count, DIM, dtype=dtype, device=CUDA)

    q, k, v, dout = made(HEADS), made(KV_HEADS), made(KV_HEADS), made(HEADS)
    learned = {
        name: torch.empty((x.shape[0], sharding.count, LENGTH) if name == "bias" else x.shape, device=CUDA)
        for name, x in mechanism.params.items()
    }
    asked = dataclasses.replace(mechanism, **learned) if learned else mechanism
    params = list(asked.params.values())
    request = Request(mask, sharding, None, asked, schedule, kernel)
    call = request.call((q, k, v, *params), (True,) * (3 + len(params)))
    assert isinstance(call, TileCall | PassCall)
    with _Watch(), torch._C._AutoDispatchBelowADInplaceOrView():  # as in the ops
        _run(call, (q, k, v), params, dout)


def _run(call: TileCall | PassCall, inputs: Sequence[torch.Tensor], params: list[torch.Tensor], dout: Any) -> None:
    q, k, v = inputs
    _ = call.tours if isinstance(call, PassCall) else call.passes  # found once, before the first step
    by: ModuleType = passing if isinstance(call, PassCall) else engine
    out, extras = by.forward(call, q, k, v, params, 7, 1)
    asked = extras[: len(call.problem.mechanism.extras)]
    daux = tuple(torch.empty_like(x) if x.is_floating_point() else None for x in asked)
    gradients = by.backward(call, q, k, v, params, 7, 1, (out, *extras), dout, daux)
    wide = [x.to(call.problem.accumulator) for x in (q, k, v)]
    for x, like in zip((out, *gradients[:3], *gradients[3]), (dout, *wide, *params), strict=True):
        assert (x.device, x.shape, x.dtype) == (like.device, like.shape, like.dtype)
    assert all(x.device == CUDA for x in extras)


SOFTMAX = Softmax(softcap=2.0, sinks=torch.zeros(HEADS), dropout=0.1, alibi=torch.ones(HEADS))
TABLES = Softmax(relative=torch.ones(HEADS, 9), bias=torch.zeros(HEADS, LENGTH, LENGTH))
Served = tuple[Kernel, Mechanism, torch.dtype]
SERVED: dict[str, Served] = {
    "sdpa, bfloat16": (Sdpa(), Softmax(), torch.bfloat16),
    "sdpa, float16, sinks": (Sdpa(), Softmax(sinks=torch.zeros(HEADS)), torch.float16),
    "reference, float32": (Reference(), SOFTMAX, torch.float32),
    "reference, bfloat16, tables": (Reference(), TABLES, torch.bfloat16),
    "reference, linear": (Reference(), ringattn.Linear(), torch.bfloat16),
    "chunked, linear": (Chunked(), ringattn.Linear(), torch.bfloat16),
    "reference, gated": (Reference(), ringattn.Gated(carried=True), torch.float32),
    "chunked, gated": (Chunked(), ringattn.Gated(carried=True), torch.float32),
}
WAITING: dict[str, Served] = {
    "reference, hard": (Reference(), ringattn.Hard(), torch.float32),
    "reference, sampled": (Reference(), ringattn.Sampled(), torch.float32),
    "reference, entmax": (Reference(), ringattn.Entmax(), torch.float32),
    "reference, additive": (Reference(), Softmax(additive=torch.ones(HEADS, DIM)), torch.float32),
}
"""What is known to wait: hard choices and draws count the candidates for the highest score, entmax asks whether its
thresholds are found, additive scores whether any number is far from 0."""

DOCUMENTS = ringattn.Documents([16, 16, 16, 1, 47])  # equal ones are one launch
CALLS: dict[str, tuple[ringattn.Mask, str]] = {
    **{name: (DOCUMENTS & ringattn.Causal(), "zigzag") for name in by_name(FLAT)},
    "route": (ringattn.Window(20, 5), "contiguous"),
    "scan": (ringattn.Causal(), "contiguous"),
}
"""For each schedule a mask and a layout; full, causal and flipped pieces are among them."""


@pytest.mark.parametrize(
    ("case", "schedule"),
    [
        (case, schedule)
        for case, (_, mechanism, _) in SERVED.items()
        for schedule in CALLS
        if by_name(FLAT)[schedule].payload.per_key or isinstance(mechanism, Summarising)
    ],
)
def test_every_step_runs_on_cuda_without_waiting_for_it(case: str, schedule: str) -> None:
    (kernel, mechanism, dtype), (mask, layout) = SERVED[case], CALLS[schedule]
    _rehearse(kernel, mechanism, dtype, schedule, mask & ringattn.Causal() if mechanism.causal else mask, layout)


def test_a_predicate_is_asked_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    allows = ringattn.Predicate.allows

    def on_the_host(mask: ringattn.Predicate, q: Any, k: Any) -> Any:
        with _disable_current_modes():
            return allows(mask, q, k)

    monkeypatch.setattr(ringattn.Predicate, "allows", on_the_host)
    mask = ringattn.Predicate(lambda q, k: (q * k) % 3 == 0)
    _rehearse(Reference(), Softmax(), torch.float32, "ring", mask, "contiguous")


@pytest.mark.parametrize("case", WAITING)
def test_what_waits_is_known(case: str) -> None:
    with pytest.raises(WaitError):
        _rehearse(*WAITING[case], "ring", *CALLS["ring"])


def test_every_kernel_that_serves_cuda_is_rehearsed_with_every_mechanism() -> None:
    rehearsed = {(type(kernel), type(mechanism)) for kernel, mechanism, _ in (*SERVED.values(), *WAITING.values())}
    for kernel in (member() for member in KERNELS):
        for mechanism in (member() for member in MECHANISMS if not issubclass(member, Ordered)):
            for dtype in (torch.bfloat16, torch.float32):
                problem = Problem(mechanism, 1, HEADS, KV_HEADS, DIM, DIM, dtype, CUDA)
                if kernel.supports(problem) and kernel.refusal(problem) is None:
                    assert (type(kernel), type(mechanism)) in rehearsed


# -- faults that it must catch ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Faulty(Sdpa):
    """Does something wrong in every forward pass."""

    fault: Callable[[torch.Tensor], object] = bool

    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        self.fault(q)
        return super().forward(problem, q, k, v, tiles, state)


def _short(q: torch.Tensor) -> object:
    """A call that lacks an argument."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, q, 0.0, False, False)


FAULTS: dict[str, tuple[Callable[[torch.Tensor], object], type[Exception]]] = {
    "item": (lambda q: q.sum().item(), WaitError),
    "tolist": (lambda q: q[0, 0, 0].tolist(), WaitError),
    "bool": (lambda q: bool((q > 0).any()), WaitError),
    "cpu": (lambda q: q.cpu(), WaitError),
    "cpu, later": (lambda q: q.to("cpu", non_blocking=True), WaitError),
    "from the host": (lambda q: torch.ones(3).to(q.device), WaitError),
    "into the host": (lambda q: torch.ones(q.shape).copy_(q), WaitError),
    "by booleans": (lambda q: q[q > 0], WaitError),
    "nonzero": (lambda q: (q > 0).nonzero(), WaitError),
    "equal": (lambda q: torch.equal(q, q), WaitError),
    "wrong device": (lambda q: q + torch.zeros(q.shape), AssertionError),
    "wrong device of an index": (lambda q: q.index_select(0, torch.arange(1)), AssertionError),
    "wrong signature": (_short, RuntimeError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rehearsal_catches(fault: str) -> None:
    does, error = FAULTS[fault]
    with pytest.raises(error):
        _rehearse(Faulty(fault=does), Softmax(), torch.bfloat16, "ring", *CALLS["ring"])


def test_the_rehearsal_catches_a_message_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    take = _FakeBuffers.take
    monkeypatch.setattr(_FakeBuffers, "take", lambda self, name, shape, dtype, _: take(self, name, shape, dtype, HOST))
    with pytest.raises(AssertionError):
        _rehearse(*SERVED["sdpa, bfloat16"], "ring", *CALLS["ring"])
