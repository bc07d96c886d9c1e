"""Kernels: what they are lowered to, what they refuse, and what PyTorch's own kernels are relied upon to do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn
from ringattn import bands
from ringattn.conformance import Case, errors, oracle, simulated
from ringattn.conformance.drawing import LAYOUTS
from ringattn.errors import InputError, UnsupportedError
from ringattn.kernels import MEMBERS, onednn
from ringattn.kernels.base import Kernel
from ringattn.kernels.choice import chosen_kernel
from ringattn.kernels.lowering import CAUSAL, FULL, TileGroup, banded, coalesce, lower
from ringattn.kernels.onednn import OneDNN
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.masks import parse
from ringattn.mechanisms.base import Problem
from ringattn.mechanisms.softmax import Softmax
from ringattn.plans import tiles
from ringattn.plans.tiles import Tiles
from tests.conformance import masks as any_mask

LIMIT = 1e-6
CPU = torch.device("cpu")


def _counted(groups: list[TileGroup], shape: tuple[int, int]) -> np.ndarray:
    """How often each pair of buffer rows is computed."""
    out = np.zeros(shape, dtype=int)
    for b in groups:
        i, j = np.arange(b.m)[:, None], np.arange(b.n)[None, :]
        pairs = (b.low <= i - j) & (i - j <= b.high)
        for nth in range(b.count):
            q = b.q + nth * b.q_next + np.arange(b.m) * b.q_step
            k = b.k + nth * b.k_next + np.arange(b.n) * b.k_step
            out[np.ix_(q, k)] += pairs
    return out


@given(
    data=st.data(),
    length=st.integers(1, 40),
    ranks=st.integers(1, 5),
    q_layout=st.sampled_from(LAYOUTS),
    k_layout=st.sampled_from(LAYOUTS),
    min_block=st.sampled_from((bands.INF, 1, 2, 4, 7)),
    max_rows=st.sampled_from((bands.INF, 3, 8)),
)
def test_lowering_computes_every_pair_once(
    data: st.DataObject,
    length: int,
    ranks: int,
    q_layout: ringattn.Layout,
    k_layout: ringattn.Layout,
    min_block: int,
    max_rows: int,
) -> None:
    mask = data.draw(any_mask(length))
    table = tiles.cut(mask.regions(length, length), q_layout.spans(length, ranks), k_layout.spans(length, ranks))
    for q_rank in range(ranks):
        for k_rank in range(ranks):
            rows = table[(table[:, 0] == q_rank) & (table[:, 1] == k_rank)][:, 2:]
            wanted = np.zeros((length, length), dtype=int)
            for q, m, q_step, k, n, k_step, lo, hi, *_ in rows.tolist():
                offset = np.arange(m)[:, None] - np.arange(n)[None, :]
                wanted[np.ix_(q + np.arange(m) * q_step, k + np.arange(n) * k_step)] += (lo <= offset) & (offset <= hi)
            groups = lower(Tiles(rows), min_block, max_rows)
            assert np.array_equal(_counted(groups, (length, length)), wanted)
            assert all(b.m == b.n <= min_block for b in groups if b.kind != FULL)
            assert all(max(b.m, b.n) * b.count <= max_rows for b in groups)
            assert np.array_equal(_counted(banded(Tiles(rows), max_rows), (length, length)), wanted)


def _tiles(mask: ringattn.Mask, length: int, layout: ringattn.Layout, ranks: int, q_rank: int, k_rank: int) -> Tiles:
    spans = layout.spans(length, ranks)
    table = tiles.cut(mask.regions(length, length), spans, spans)
    return Tiles(table[(table[:, 0] == q_rank) & (table[:, 1] == k_rank)][:, 2:])


def test_launches_are_few_and_alike() -> None:
    zigzag, contiguous = ringattn.Zigzag(), ringattn.Contiguous()
    causal, window = ringattn.Causal(), ringattn.Window(1024)
    # a zigzag rank's own keys are one causal square, its neighbour's one rectangle
    assert lower(_tiles(causal, 8192, zigzag, 2, 0, 0)) == [TileGroup(0, 4095, 4096, 4096, 1, 1, 0, 0)]
    assert lower(_tiles(causal, 8192, zigzag, 2, 0, 1)) == [TileGroup(-4095, 2047, 2048, 4096, 1, 1, 2048, 0)]
    assert lower(_tiles(causal, 8192, zigzag, 2, 1, 0)) == [TileGroup(-2047, 4095, 4096, 2048, 1, 1, 0, 0)]
    # a window of 1,024 over 8,192 rows is two launches
    assert [b.count for b in lower(_tiles(window, 8192, contiguous, 1, 0, 0))] == [7, 8]
    # halved down to squares of 128, a causal square is a launch a level
    halved = lower(_tiles(causal, 1024, contiguous, 1, 0, 0), 128)
    assert sorted((b.kind, b.m, b.count) for b in halved) == [
        (FULL, 128, 4),
        (FULL, 256, 2),
        (FULL, 512, 1),
        (CAUSAL, 128, 8),
    ]
    # equal documents are one
    packed = ringattn.Documents([64] * 32) & causal
    assert lower(_tiles(packed, 2048, contiguous, 1, 0, 0)) == [TileGroup(0, 63, 64, 64, 1, 1, 0, 0, 32, 64, 64)]


def test_coalescing_never_joins_what_is_not_one_band() -> None:
    rows = bands.regions([(0, 4, 0, 4, -9, 9), (4, 8, 4, 8, -9, 9)])
    assert len(coalesce(rows)) == 2


def _problem(**changes: object) -> Problem:
    given = {"mechanism": Softmax(), "batch": 1, "heads": 4, "kv_heads": 2, "dim": 8, "value_dim": 8}
    return Problem(**{**given, "dtype": torch.float32, "device": CPU, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value_dim": 12}, "got D=8, Dv=12"),
        ({"device": torch.device("cuda")}, "takes bfloat16 and float16; got torch.float32"),
        ({"device": torch.device("cuda"), "dtype": torch.float16, "dim": 12, "value_dim": 12}, "got D=12"),
        ({"device": torch.device("meta")}, "CPUs and CUDA"),
        ({"mechanism": Softmax(scale=-1.0)}, "a scale above 0; got -1.0"),
        ({"mechanism": Softmax(scale=0.0)}, "a scale above 0; got 0.0"),
    ],
)
def test_sdpa_refuses_in_words(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        chosen_kernel("sdpa", _problem(**changes))


@pytest.mark.parametrize(
    ("changes", "taken", "reason"),
    [
        ({}, Sdpa(), "auto took the fastest kernel for this mechanism"),
        (
            {"value_dim": 12},
            OneDNN(),
            "auto fell to it: sdpa needs value heads as wide as query heads; got D=8, Dv=12",
        ),
        ({"dtype": torch.float64}, Sdpa(), "auto took the fastest kernel for this mechanism"),
        (
            {"dtype": torch.float64, "value_dim": 12},
            Reference(),
            "auto fell to it: sdpa needs value heads as wide as query heads; got D=8, Dv=12; "
            "onednn computes in float32; got float64",
        ),
        (
            {"device": torch.device("cuda"), "dtype": torch.float16},
            Sdpa(),
            "auto took the fastest kernel for this mechanism",
        ),
        (
            {"device": torch.device("cuda")},
            Reference(),
            "auto fell to it: sdpa on CUDA takes bfloat16 and float16; got torch.float32",
        ),
    ],
)
def test_auto_takes_the_fastest_that_can_and_says_why(changes: dict[str, object], taken: Kernel, reason: str) -> None:
    assert chosen_kernel("auto", _problem(**changes)) == (taken, reason)


def test_choice() -> None:
    assert chosen_kernel(Reference(rows=3), _problem())[0] == Reference(rows=3)
    with pytest.raises(InputError, match="'auto', 'sdpa', 'onednn', 'chunked', 'reference'"):
        chosen_kernel("flash", _problem())
    with pytest.raises(UnsupportedError, match="onednn runs on CPUs; got cuda"):
        chosen_kernel("onednn", _problem(device=torch.device("cuda")))


@pytest.mark.parametrize(
    ("mask", "layout", "heads", "features"),
    [
        ("causal", "zigzag", (2, 1), ("sinks",)),
        ("causal", "striped", (3, 1), ("softcap",)),
        ("window:511&causal", "contiguous", (1, 1), ()),
        ("window:300,200", "contiguous", (2, 2), ("softcap",)),
        ("documents:700,1,1299&causal", "balanced", (4, 2), ()),
        ("full", "contiguous", (5, 1), ()),
    ],
)
def test_large_blocks_are_exact_and_computed_by_onednn(
    mask: str, layout: str, heads: tuple[int, int], features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than what hypothesis draws: whole grains and leftovers, bands across blocks, two sequences."""
    case = Case(
        length=2000,
        mask=parse(mask),
        ranks=2,
        batch=2,
        kv_heads=heads[1],
        groups=heads[0] // heads[1],
        dim=16,
        value_dim=24,
        layout=layout,
        kernel="onednn",
        use_lse=True,
        features=frozenset(features),
    )
    linear, products = onednn._linear, []

    def counted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        products.append(len(x) * len(y))
        return linear(x, y)

    monkeypatch.setattr(onednn, "_linear", counted)
    found = errors(simulated(case), oracle(case))
    assert max(found.values()) <= LIMIT, found
    assert sum(products) > 2000 * 2000 / 8


def test_onednn_does_not_look_at_what_is_masked() -> None:
    """Keys beyond the band lie in the same blocks: whatever they hold, a query's output is the same."""
    sharding = ringattn.Sharding(600, ringattn.init())
    q, k, v = (torch.randn(1, 1, 600, 16) for _ in range(3))
    expected = ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, kernel="onednn")
    k[:, :, 500:] = torch.nan
    out = ringattn.attention(q, k, v, ringattn.Causal(), sharding=sharding, kernel="onednn")
    assert torch.equal(out[:, :, :500], expected[:, :, :500])
    assert out[:, :, 500:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [ringattn.Causal(), ringattn.Window(100), ringattn.Documents([300, 1, 723])])
def test_sdpa_on_cuda_is_as_exact_as_the_reference_kernel(dtype: torch.dtype, mask: ringattn.Mask) -> None:
    sharding = ringattn.Sharding(1024, ringattn.Mesh.local())
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(2, h, 1024, 64, generator=g).to("cuda", dtype) for h in (4, 2, 2, 4)]
    results = {}
    for kernel in ("sdpa", "reference"):
        q, k, v = (x.clone().requires_grad_() for x in base[:3])
        out, lse = ringattn.attention(q, k, v, mask, sharding=sharding, kernel=kernel, return_lse=True)
        ((out * base[3]).sum() + lse.sum()).backward()
        results[kernel] = [out, q.grad, k.grad, v.grad]
    for ours, exact in zip(results["sdpa"], results["reference"], strict=True):
        assert ours is not None and exact is not None
        assert (ours - exact).float().norm() <= 2 * torch.finfo(dtype).eps * exact.float().norm()


@dataclasses.dataclass(frozen=True, eq=False)
class Tempered(Softmax):
    """A softmax with one field more."""

    temperature: float = 1.0


WRITTEN_FOR_SOFTMAX = [kernel for kernel in (member() for member in MEMBERS[:-1]) if kernel.refusal(_problem()) is None]


@pytest.mark.parametrize("kernel", WRITTEN_FOR_SOFTMAX, ids=str)
@pytest.mark.parametrize("value", [0.5, torch.ones(4)], ids=["number", "tensor"])
def test_a_field_that_a_kernel_does_not_know_is_refused(
    kernel: Kernel, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A term that softmax learns later is never dropped without a word."""
    learned = dataclasses.make_dataclass("Softmax", [("tilt", object, None)], bases=(Softmax,), frozen=True, eq=False)
    monkeypatch.setattr(f"{type(kernel).__module__}.Softmax", learned)
    assert kernel.refusal(_problem(mechanism=learned())) is None
    assert f"{kernel} has no tilt" in str(kernel.refusal(_problem(mechanism=learned(tilt=value))))


def test_what_is_made_of_softmax_goes_to_the_reference_kernel() -> None:
    kernel, reason = chosen_kernel("auto", _problem(mechanism=Tempered()))
    assert kernel == Reference()
    assert "sdpa computes Softmax itself; got Tempered(); onednn computes Softmax itself" in reason
    with pytest.raises(UnsupportedError, match=r"got Tempered\(temperature=0.5\)"):
        chosen_kernel("sdpa", _problem(mechanism=Tempered(temperature=0.5)))


def test_a_kernel_of_ones_own_has_a_name_and_is_given_as_module_and_name() -> None:
    mine = chosen_kernel(f"{__name__}:Mine", _problem())[0]
    assert mine == Mine() and str(mine) == "mine"


@dataclasses.dataclass(frozen=True)
class Mine(Reference):
    """A kernel from outside the package."""
