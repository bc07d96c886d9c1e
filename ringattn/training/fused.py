"""The op of `linear_cross_entropy`: a product with the vocabulary and its cross-entropy, some words at a time.

    N, H, V    tokens, hidden size, words
    z [N, V]   logits, of which some columns exist at any time
    lse [N]    log-sum-exp of each token's logits, kept for the backward pass

With smoothing e and weight w of the z-loss the loss of a token with label y is

    lse - (1 - e) z_y - e mean(z) + w lse^2,     its slope  (1 + 2 w lse) softmax(z) - (1 - e) onehot(y) - e / V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ringattn.errors import InputError
from ringattn.training.sample import IGNORED

_LIBRARY = torch.library.Library("ringattn", "FRAGMENT")
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float[] numbers, int chunk"
_LIBRARY.define(f"linear_cross_entropy({_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"linear_cross_entropy_backward(Tensor grad, Tensor lse, {_INPUTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)"
)


@dataclasses.dataclass(frozen=True)
class _Head:
    """The head of a language model, over the tokens that have a label."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    softcap: float
    smoothing: float
    z_weight: float
    words: int

    @classmethod
    def over(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, numbers: list[float], chunk: int
    ) -> tuple[_Head, Tensor]:
        """The head, and which tokens it is over."""
        kept = (labels != IGNORED).nonzero()[:, 0]
        words = max(1, chunk // max(1, len(kept)))
        softcap, smoothing, z_weight = numbers
        return cls(hidden[kept], weight, bias, labels[kept], softcap, smoothing, z_weight, words), kept

    @property
    def wide(self) -> torch.dtype:
        """The dtype of what is summed up."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some words of the vocabulary at a time, and the logits of all tokens for them."""
        for first in range(0, len(self.weight), self.words):
            some = slice(first, first + self.words)
            logits = (self.hidden @ self.weight[some].T).to(self.wide)
            if self.bias is not None:
                logits += self.bias[some]
            yield some, logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def targets(self, some: slice) -> tuple[Tensor, Tensor]:
        """The tokens whose labels are among these words, and which of them."""
        rows = ((self.labels >= some.start) & (self.labels < some.stop)).nonzero()[:, 0]
        return rows, self.labels[rows] - some.start

    def slopes(self, lse: Tensor, grad: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The gradients that arrive at the products with some words, in the dtype of the products."""
        for some, logits in self.chunks():
            capped = 1 - (logits / self.softcap).square_() if self.softcap else None
            slope = logits.sub_(lse[:, None]).exp_().mul_((1 + 2 * self.z_weight * lse)[:, None])
            slope[self.targets(some)] -= 1 - self.smoothing
            slope.sub_(self.smoothing / len(self.weight)).mul_(grad)
            yield some, (slope if capped is None else slope.mul_(capped)).to(self.hidden.dtype)


def _in_given_dtypes(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op without autocast, which would have forward and backward compute other logits."""

    def run(*inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return op(*inputs)

    return run


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The sum of the tokens' losses, and lse of all tokens, 0 where there is no label."""
    head, kept = _Head.over(*inputs)
    if len(kept) and not 0 <= int(head.labels.min()) <= int(head.labels.max()) < len(head.weight):
        raise InputError(
            f"Labels must be words of the vocabulary, 0 to {len(head.weight) - 1}, or {IGNORED} for none; got "
            f"{int(head.labels.min())} to {int(head.labels.max())}."
        )
    lse = torch.full((len(kept),), -torch.inf, dtype=head.wide, device=kept.device)
    target, total = torch.zeros_like(lse), torch.zeros_like(lse)
    for some, logits in head.chunks():
        rows, words = head.targets(some)
        target[rows] = logits[rows, words]
        if head.smoothing:
            total += logits.sum(1)
        lse = torch.logaddexp(lse, logits.logsumexp(1))
    losses = lse - (1 - head.smoothing) * target - head.smoothing / len(head.weight) * total
    lse_of_all = inputs[3].new_zeros(inputs[3].shape, dtype=head.wide)
    lse_of_all[kept] = lse
    return (losses + head.z_weight * lse.square()).sum(), lse_of_all


def _backward(grad: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where they are not wanted."""
    *inputs_of_head, wanted = inputs
    hidden, weight, bias = inputs_of_head[:3]
    head, kept = _Head.over(*inputs_of_head)
    grad_hidden = torch.zeros_like(head.hidden, dtype=head.wide)
    grad_weight = torch.empty_like(weight) if wanted[1] else weight.new_empty(0)
    grad_bias = torch.empty_like(bias) if wanted[2] else weight.new_empty(0)
    for some, slope in head.slopes(lse[kept], grad):
        if wanted[0]:
            grad_hidden += slope @ weight[some]
        if wanted[1]:
            torch.mm(slope.T, head.hidden, out=grad_weight[some])
        if wanted[2]:
            grad_bias[some] = slope.sum(0, dtype=head.wide)
    if not wanted[0]:
        return hidden.new_empty(0), grad_weight, grad_bias
    return torch.zeros_like(hidden).index_copy_(0, kept, grad_hidden.to(hidden.dtype)), grad_weight, grad_bias


def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    hidden, labels = inputs[0], inputs[3]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=wide), labels.new_empty(labels.shape, dtype=wide)


def _fake_backward(_grad: Tensor, _lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, *_, wanted = inputs
    given = zip((hidden, weight, bias), wanted, strict=True)
    a, b, c = (torch.empty_like(x) if asked else weight.new_empty(0) for x, asked in given)
    return a, b, c


_LIBRARY.impl("linear_cross_entropy", _in_given_dtypes(_forward), "CompositeExplicitAutograd")
_LIBRARY.impl("linear_cross_entropy_backward", _in_given_dtypes(_backward), "CompositeExplicitAutograd")
torch.library.register_fake("ringattn::linear_cross_entropy", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("ringattn::linear_cross_entropy_backward", _fake_backward, lib=_LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, ctx.numbers, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    found = torch.ops.ringattn.linear_cross_entropy_backward(
        grad, lse, hidden, weight, bias, labels, ctx.numbers, ctx.chunk, wanted
    )
    return *(x if asked else None for x, asked in zip(found, wanted, strict=True)), None, None, None


torch.library.register_autograd(
    "ringattn::linear_cross_entropy", _gradients, setup_context=_setup_context, lib=_LIBRARY
)
