"""Losses: one mean over tokens however they are sharded, with and without logits; memory for time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import ringattn
from ringattn.errors import InputError, UnsupportedError
from ringattn.training import IGNORED, Batch, accumulate, fused, linear_cross_entropy, tiled, token_loss

WIDTH, WORDS = 8, 33
LIMIT = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@dataclasses.dataclass
class Labels:
    labels: Tensor
    count: int


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm().clamp_min(1e-30))


def by_hand(logits: Tensor, labels: Tensor, count: int, smoothing: float, z_loss: float) -> Tensor:
    """Token by token, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits.double().flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label != IGNORED:
            log_p = row - row.exp().sum().log()
            total = total - (1 - smoothing) * log_p[label] - smoothing * log_p.mean()
            total = total + z_loss * row.exp().sum().log() ** 2
    return total / count


@given(
    seed=st.integers(0, 1 << 16),
    length=st.integers(0, 9),
    words=st.integers(1, 40),
    chunk=st.integers(1, 200),
    softcap=st.sampled_from([0.0, 3.0]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.3]),
    with_bias=st.booleans(),
    masked=st.floats(0, 1),
)
def test_both_losses_are_the_sum_over_tokens(
    seed: int, length: int, words: int, chunk: int, softcap: float, smoothing: float, z_loss: float, with_bias: bool,
    masked: float,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, length, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(words, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(words, generator=draw, dtype=torch.float64, requires_grad=True) if with_bias else None
    labels = torch.randint(0, words, (2, length), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < masked] = IGNORED
    batch = Labels(labels, 29)
    inputs = [x for x in (hidden, weight, bias) if x is not None]

    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = by_hand(logits, labels, 29, smoothing, z_loss)
    wanted = (
        torch.autograd.grad(expected, inputs, allow_unused=True, retain_graph=True)
        if expected.requires_grad
        else [None] * 3
    )
    plain = token_loss(logits, batch, label_smoothing=smoothing, z_loss=z_loss)
    fused = linear_cross_entropy(
        hidden, weight, batch, bias=bias, softcap=softcap, label_smoothing=smoothing, z_loss=z_loss, chunk=chunk
    )
    for loss in (plain, fused):
        assert abs(loss.item() - expected.item()) <= 1e-13 * max(1, abs(expected.item()))
        for found, right in zip(torch.autograd.grad(loss, inputs, retain_graph=True), wanted, strict=False):
            assert (found - (0 if right is None else right)).norm() <= 1e-13 * (1 + found.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_is_as_exact_as_its_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, dtype=dtype, requires_grad=True) for n in (40, WORDS))
    batch = Labels(torch.randint(0, WORDS, (1, 40)), 40)
    fused = linear_cross_entropy(hidden[None], weight, batch, chunk=200)
    exact = token_loss((hidden.double() @ weight.double().T)[None], batch)
    assert fused.dtype == torch.float32 and relative(fused.detach(), exact.detach()) < LIMIT[dtype]
    for found, right in zip(
        torch.autograd.grad(fused, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert found.dtype == dtype and relative(found, right) < LIMIT[dtype]


def test_the_fused_loss_is_an_op_that_compiles() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, requires_grad=True) for n in (14, WORDS))
    labels = torch.randint(0, WORDS, (14,))
    labels[:3] = IGNORED
    arguments = (hidden, weight, None, labels, [2.0, 0.1, 0.2], 50)
    torch.library.opcheck(torch.ops.ringattn.linear_cross_entropy.default, arguments)
    batch = Labels(labels[None], 11)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    row = hidden.detach()[None]
    assert torch.equal(compiled(row, weight, batch), linear_cross_entropy(row, weight, batch))


@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_fused_loss_is_that_of_a_linear_layer(backward_too: bool, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(40, 32, requires_grad=True)
    weight = torch.randn(300, 32, dtype=weight_dtype, requires_grad=True)
    batch = Labels(torch.randint(0, 300, (1, 40)), 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden[None], weight, batch, chunk=500)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_too):
        found = torch.autograd.grad(loss, (hidden, weight))
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    exact = token_loss((rounded[0] @ rounded[1].T)[None], batch)
    for ours, right, x in zip(found, torch.autograd.grad(exact, rounded), (hidden, weight), strict=True):
        assert ours.dtype == x.dtype and relative(ours, right) < 1e-2


@pytest.mark.parametrize("label", [-1, WORDS, WORDS + 1000])
def test_labels_outside_the_vocabulary_are_refused(label: int) -> None:
    batch = Labels(torch.tensor([[1, label, IGNORED]]), 2)
    with pytest.raises(InputError, match="words of the vocabulary, 0 to 32"):
        linear_cross_entropy(torch.ones(1, 3, WIDTH), torch.ones(WORDS, WIDTH), batch, chunk=20)


def test_the_loss_of_logits_compiles() -> None:
    torch.manual_seed(0)
    logits, batch = torch.randn(1, 9, WORDS), Labels(torch.randint(0, WORDS, (1, 9)), 8)
    batch.labels[0, 3] = IGNORED

    def loss(x: Tensor) -> Tensor:
        return token_loss(x, batch, label_smoothing=0.1, z_loss=0.2)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), loss(logits))


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that an operation has made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_of_all_logits_is_made() -> None:
    hidden, weight, labels = torch.randn(512, WIDTH), torch.randn(4096, WIDTH), torch.randint(0, 4096, (512,))
    inputs = (hidden, weight, None, labels, [0.0, 0.0, 0.0], 1 << 14)
    with Largest() as seen:  # type: ignore[no-untyped-call]
        _, lse = fused._forward(*inputs)
        fused._backward(torch.ones(()), lse, *inputs, [True, True, False])
    assert 0 < seen.numel <= weight.numel() < 512 * 4096


@pytest.mark.parametrize("ring", [1, 2, 3, 5])
def test_shares_of_all_ranks_and_batches_sum_to_the_mean_over_tokens(ring: int) -> None:
    torch.manual_seed(0)
    embed, head = (torch.randn(WORDS, WIDTH, dtype=torch.float64) for _ in range(2))
    rows = [torch.randint(0, WORDS, (1, n)) for n in (4, 17, 9)]
    labelled = [row.clone() for row in rows]
    labelled[1][:, 3:] = IGNORED

    def losses(mesh: ringattn.Mesh) -> tuple[float, float, int]:
        batches = accumulate(Batch(x, mesh, labels=y) for x, y in zip(rows, labelled, strict=True))
        states = [embed[batch.tokens] for batch in batches]
        plain = sum(float(token_loss(x @ head.T, b)) for x, b in zip(states, batches, strict=True))
        fused = sum(float(linear_cross_entropy(x, head, b)) for x, b in zip(states, batches, strict=True))
        return plain, fused, batches[0].count

    pairs = [(x, y) for row, of in zip(rows, labelled, strict=True) for x, y in zip(row[0], of[0, 1:], strict=False)]
    kept = [(x, y) for x, y in pairs if y != IGNORED]
    x, y = (torch.stack(each) for each in zip(*kept, strict=True))
    mean = float(functional.cross_entropy(embed[x] @ head.T, y))
    found = ringattn.simulate(losses, ring=ring).results
    assert {count for *_, count in found} == {len(kept)}
    assert abs(sum(plain for plain, *_ in found) - mean) < 1e-14 * 10
    assert abs(sum(fused for _, fused, _ in found) - mean) < 1e-14 * 10


def test_wrong_arguments_of_a_loss_are_refused() -> None:
    batch = Labels(torch.zeros(1, 4, dtype=torch.int64), 4)
    with pytest.raises(InputError, match=r"logits must be \[1, 4, 'V'\]"):
        token_loss(torch.zeros(1, 5, 9), batch)
    with pytest.raises(InputError, match="label_smoothing"):
        token_loss(torch.zeros(1, 4, 9), batch, label_smoothing=2)
    with pytest.raises(InputError, match="weight must be"):
        linear_cross_entropy(torch.zeros(1, 4, 9), torch.zeros(7, 8), batch)
    shard = torch.zeros(7, 9)
    shard.full_tensor = lambda: shard  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="shard of itself"):
        linear_cross_entropy(torch.zeros(1, 4, 9), shard, batch)


@pytest.mark.parametrize("tokens", [1, 3, 10, 64])
def test_a_tiled_module_is_the_module(tokens: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)).double()
    again = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)).double()
    again.load_state_dict(plain.state_dict())
    names = list(again.state_dict())
    assert tiled(again, tokens) is again and list(again.state_dict()) == names and isinstance(again, nn.Sequential)
    x = torch.randn(2, 10, 4, dtype=torch.float64, requires_grad=True)
    out, right = again(x), plain(x)
    assert relative(out.detach(), right.detach()) < 1e-15
    for found, wanted in zip(
        torch.autograd.grad(out.sin().sum(), [x, *again.parameters()]),
        torch.autograd.grad(right.sin().sum(), [x, *plain.parameters()]),
        strict=True,
    ):
        assert relative(found, wanted) < 1e-14


def test_a_tiled_module_keeps_its_input_alone() -> None:
    mlp = tiled(nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4)), 16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        mlp(torch.randn(1, 256, 4, requires_grad=True))
    assert kept and max(kept) <= 256 * 4
