"""The public API: the op, its handles, wrong arguments, meshes and start-up."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import handles
from ringattn.errors import InputError
from ringattn.plans import planning
from tests.workers import Workers


def _inputs(length: int = 20, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 8, generator=g).to(dtype).requires_grad_() for h in (4, 2, 2))
    return q, k, v


def _one(length: int = 20) -> ringattn.Sharding:
    return ringattn.Sharding(length, ringattn.init())


def test_the_plan_lives_as_long_as_the_graph() -> None:
    q, k, v = _inputs()
    out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one())  # the sharding is gone at once
    gc.collect()
    out.sum().backward()
    assert q.grad is not None
    before = handles.live()
    del out
    gc.collect()
    assert handles.live() < before, "and no longer"


def test_plans_are_made_once_for_equal_values(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plan = [], planning.flat_plan

    def spy(*args: Any, **options: Any) -> ringattn.Plan:
        made.append(args)
        return plan(*args, **options)

    monkeypatch.setattr(planning, "flat_plan", spy)
    sharding = _one()
    for _ in range(3):
        ringattn.attention(*_inputs(), ringattn.Documents([5, 15]) & ringattn.Causal(), sharding=sharding)
    assert len(made) == 1
    ringattn.attention(*_inputs(), ringattn.Documents([6, 14]) & ringattn.Causal(), sharding=sharding)
    assert len(made) == 2
    q, k, v = (x[..., :4] for x in _inputs())  # another shape reads the same keys
    ringattn.attention(q, k, v, ringattn.Documents([6, 14]) & ringattn.Causal(), sharding=sharding)
    assert len(made) == 2


def test_explain_says_what_attention_would_do_and_why() -> None:
    q, k, v = _inputs()
    mesh = ringattn.Mesh.virtual(2)  # no transport: nothing is sent
    part = ringattn.Sharding(40, mesh, "zigzag")
    said = ringattn.explain(q, k, v, ringattn.Causal(), sharding=part)
    assert said.startswith("rank 0 of 2, ring: causal, 40 tokens zigzag, 2 ranks")
    assert said.endswith("kernel sdpa: auto took the fastest kernel for this mechanism")
    narrow = ringattn.explain(q, k, v[..., :4], ringattn.Causal(), sharding=part, schedule="ring")
    assert (
        f"kernel onednn: auto fell to it: sdpa needs value heads as wide as query heads; got D={q.shape[3]}" in narrow
    )


def test_strided_inputs_are_right() -> None:
    q, k, v = _inputs()
    expected = ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one())
    for a, b in ((2, 3), (1, 2)):
        q, k, v = (x.detach().transpose(a, b).contiguous().transpose(a, b) for x in (q, k, v))
        assert (q.stride(-1) == 1) == ((a, b) == (1, 2))
        torch.testing.assert_close(ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one()), expected)


def test_inputs_and_incoming_gradients_are_never_written() -> None:
    q, k, v = _inputs()
    out, lse = ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one(), return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    kept = copy.deepcopy([x.detach() for x in (q, k, v, out, lse, dout, dlse)])
    torch.autograd.backward([out, lse], [dout, dlse], retain_graph=True)
    first = [x.grad.clone() for x in (q, k, v) if x.grad is not None]
    for x in (q, k, v):
        x.grad = None
    torch.autograd.backward([out, lse], [dout, dlse])
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v, out, lse, dout, dlse), strict=True))
    assert all(torch.equal(a, x.grad) for a, x in zip(first, (q, k, v), strict=True) if x.grad is not None)


def test_gradients_that_nobody_asked_for() -> None:
    q, k, v = (x.detach() for x in _inputs())
    k.requires_grad_()
    out, lse = ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one(), return_lse=True)
    lse.sum().backward()
    assert q.grad is None and k.grad is not None and out.requires_grad
    with torch.no_grad():
        assert not ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    q, k, v = _inputs(dtype=dtype)
    out, lse = ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one(), return_lse=True)
    out.sum().backward()
    assert {x.dtype for x in (out, q.grad, k.grad, v.grad) if x is not None} == {dtype}
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_meshes_and_shardings_pickle_without_their_transport_and_still_plan() -> None:
    sharding = ringattn.Sharding(50, ringattn.Mesh.local(), "zigzag")
    ringattn.attention(*_inputs(50), ringattn.Causal(), sharding=sharding)
    again = pickle.loads(pickle.dumps(sharding))
    assert again == sharding and hash(again) == hash(sharding)
    assert again.mesh.transport is None and not len(again.calls)
    assert ringattn.plan(ringattn.Causal(), again).area == 50 * 51 // 2
    with pytest.raises(InputError, match="no transport"):
        ringattn.attention(*_inputs(50), ringattn.Causal(), sharding=again)


def _other(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": _other((4, 20, 8))}, r"\[batch, heads, tokens, dim\]"),
        ({"q": _other((2, 4, 19, 8))}, "Rank 0 holds 20 of the 20 queries; got q .*Pass this rank's part"),
        ({"k": _other((2, 2, 19, 8)), "v": _other((2, 2, 19, 8))}, "20 of the 20 keys"),
        ({"k": _other((2, 3, 20, 8)), "v": _other((2, 3, 20, 8))}, "multiple of key heads; got 4 and 3"),
        ({"k": _other((2, 2, 20, 7))}, "must be .B, Hq, S, D."),
        ({"v": _other((1, 2, 20, 8))}, "must be .B, Hq, S, D."),
        ({"q": _other((2, 0, 20, 8))}, "must not be empty"),
        ({"v": _other((2, 2, 20, 8), torch.bfloat16)}, "one dtype and device"),
        ({x: _other((2, 4, 20, 8), torch.int64) for x in "qkv"}, "float64, float32, bfloat16 and float16"),
        ({"mask": ringattn.Documents([3])}, "sum to 3, the sequence has 20"),
        ({"mask": None}, "must be a ringattn mask"),
        ({"mechanism": "softmax"}, "must be a ringattn mechanism"),
        ({"schedule": "tree"}, "schedule must be"),
        ({"kernel": "flash"}, "kernel must be"),
    ],
)
def test_wrong_arguments_show_the_call(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {**dict(zip("qkv", _inputs(), strict=True)), "mask": ringattn.Causal(), **change}
    with pytest.raises(InputError, match=words):
        ringattn.attention(**given, sharding=_one())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ringattn.Sharding(8, ringattn.Mesh.local()).split(torch.zeros(3, 7), 1), "8 tokens of 8 along"),
        (lambda: ringattn.Sharding(8, ringattn.Mesh.local()).join(torch.zeros(3, 7), 1), "the part of rank 0"),
        (lambda: ringattn.Sharding(8, ringattn.Mesh.local()).split(torch.zeros(8), 1), "no dimension 1"),
        (lambda: ringattn.Sharding(8, 4), "needs a Mesh"),  # type: ignore[arg-type]
        (lambda: ringattn.Mesh.virtual(2, rank=2), "is 0 to 1; got 2"),
        (lambda: ringattn.Softmax(scale=float("nan")), "must be a finite number"),
        (lambda: ringattn.init(ring=3), "must divide the world of 1"),
        (lambda: ringattn.init(ring=0), "at least one rank each"),
        (lambda: ringattn.init(transport="ucx"), "'auto', 'local', 'gloo', 'nccl' or 'mpi'"),  # type: ignore[arg-type]
        (lambda: ringattn.init(timeout=0), "a number of seconds"),
        (lambda: ringattn.init(transport="gloo"), "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_wrong_set_up_says_what_to_do(call: Callable[[], object], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=words):
        call()


def test_two_axes_share_a_sequence() -> None:
    """Ranks are numbered with the ulysses axis running fastest, and schedules of one axis run over all of them."""

    def places(mesh: ringattn.Mesh) -> tuple[dict[str, int], list[int]]:
        ring = mesh.along_ring
        there, here = torch.tensor([mesh.rank]), torch.zeros(1, dtype=torch.int64)
        left, right = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
        ring.connected().exchange([(right, there)], [(left, here)]).wait()
        return mesh.coordinates, [ring.rank, ring.size, int(here)]

    results = ringattn.simulate(places, ring=3, ulysses=2).results
    for rank, (coordinates, (place, size, heard)) in enumerate(results):
        assert coordinates == {"data": 0, "ring": rank // 2, "ulysses": rank % 2}
        assert (place, size, heard) == (rank // 2, 3, (rank - 2) % 6)

    def out(mesh: ringattn.Mesh) -> torch.Tensor:
        sharding = ringattn.Sharding(20, mesh, "zigzag")
        q, k, v = (sharding.split(x, 2) for x in _inputs())
        return sharding.join(ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, schedule="route"), 2)

    flat, both = (ringattn.simulate(out, ring=4 // u, ulysses=u).results[0] for u in (1, 2))
    assert torch.equal(flat, both)


@pytest.mark.parametrize("kernel", ["onednn", "sdpa", "reference"])
def test_the_default_device_changes_nothing(kernel: str) -> None:
    def results() -> list[torch.Tensor]:
        q, k, v = _inputs()
        with torch.device("meta"):
            out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one(), kernel=kernel)
            grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out, device="cpu"))
        return [out.detach(), *grads]

    q, k, v = _inputs()
    out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=_one(), kernel=kernel)
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x.to_sparse(), "sparse_coo"),
        (lambda x: x.to_mkldnn(), "_mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(make: Callable[[torch.Tensor], torch.Tensor], kind: str) -> None:
    q, k, v = (x.detach() for x in _inputs())
    sharding = _one()
    ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding)  # a plan of the same shape is kept
    with pytest.raises(InputError, match=f"q must be a dense tensor; got a {kind} one"):
        ringattn.attention(make(q), k, v, ringattn.Causal(), sharding=sharding)


def test_a_kept_plan_is_of_the_same_ranks() -> None:
    q, k, v = _inputs()
    sharding, others = _one(), ringattn.Sharding(20, ringattn.Mesh.virtual(4))
    for _ in range(2):
        with pytest.raises(InputError, match="Rank 0 holds 5 of the 20 keys"):
            ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, kv_sharding=others)
        ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, kv_sharding=_one())


# -- start-up on real ranks ----------------------------------------------------------------------------------------


def _started(mesh: ringattn.Mesh) -> dict[str, Any]:
    """Several meshes over the workers' default group, side by side."""
    whole = ringattn.init()
    pairs = ringattn.init(ring=2)
    device_mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    of_torch = ringattn.Mesh.from_device_mesh(device_mesh["cp"])
    outputs = []
    for one in (whole, pairs, of_torch):
        sharding = ringattn.Sharding(24, one, "zigzag")
        full = (torch.randn(1, 2, 24, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        q, k, v = (sharding.split(x, 2) for x in full)
        out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding)
        outputs.append(sharding.join(out, 2))
    with pytest.raises(InputError, match="one mesh dimension; got 2"):
        ringattn.Mesh.from_device_mesh(device_mesh)
    with pytest.raises(InputError, match="must divide the world of 4"):
        ringattn.init(ring=3)
    with pytest.raises(InputError, match="runs on gloo; got transport='nccl'"):
        ringattn.init(transport="nccl")
    assert dist.is_initialized(), "the default group is the caller's"
    return {
        "coordinates": (whole.coordinates, pairs.coordinates, of_torch.rank),
        "agreement": (whole.connected().agreement, ringattn.init(agreement=False).connected().agreement),
        "close": all(torch.allclose(out, outputs[0], atol=1e-6) for out in outputs),
    }


def test_init_adopts_a_group_and_meshes_live_side_by_side(gloo: Workers) -> None:
    for rank, found in enumerate(gloo.run(4, _started)):
        assert found["close"]
        assert found["agreement"] == (True, False)
        assert found["coordinates"] == (
            {"data": 0, "ring": rank, "ulysses": 0},
            {"data": rank // 2, "ring": rank % 2, "ulysses": 0},
            rank % 2,
        )
