"""Calls for the tests of every schedule, layout, kernel and transport: `ringattn.conformance`, drawn by hypothesis."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringattn.conformance import Case, Results, drawing
from ringattn.kernels import Kernel, OneDNN, Reference, Sdpa
from ringattn.layouts import Layout
from ringattn.masks import Mask
from ringattn.mechanisms.base import Problem, State


@dataclasses.dataclass(frozen=True)
class Preferred(Kernel):
    """A kernel where it can compute the problem, the reference kernel elsewhere."""

    kernel: Kernel

    def supports(self, problem: Problem) -> bool:
        return True

    def refusal(self, problem: Problem) -> str | None:
        return None

    def _taken(self, problem: Problem) -> Kernel:
        return Reference() if self.kernel.refusal(problem) else self.kernel

    def forward(self, problem: Problem, *rest: Any) -> State:
        return self._taken(problem).forward(problem, *rest)

    def backward(self, problem: Problem, *rest: Any) -> None:
        self._taken(problem).backward(problem, *rest)

    def __str__(self) -> str:
        return f"{self.kernel} or reference"


KERNELS: tuple[Kernel | str, ...] = (
    "auto",
    "reference",
    Preferred(Sdpa()),
    Preferred(OneDNN(rows=8, columns=12, min_block=8, multiple_of=4)),  # of which short sequences have many blocks
)

RANDOMS = st.randoms(use_true_random=False)  # whose draws hypothesis chooses, and shrinks


def cases(dtypes: tuple[torch.dtype, ...] = drawing.DTYPES) -> st.SearchStrategy[Case]:
    """Any call."""
    return RANDOMS.map(lambda random: drawing.draw(random, kernels=KERNELS, dtypes=dtypes))


def cross_cases() -> st.SearchStrategy[Case]:
    """Any call of queries with the keys of another sequence."""
    return RANDOMS.map(lambda random: drawing.draw_cross(random, kernels=KERNELS))


def masks(length: int, predicates: bool = True) -> st.SearchStrategy[Mask]:
    """Every class of mask and random combinations of them."""
    return RANDOMS.map(lambda random: drawing.mask(random, length, predicates=predicates))


def layouts(length: int, ranks: int) -> st.SearchStrategy[Layout | str]:
    """Every layout; of the explicit ones, runs dealt at random."""
    return RANDOMS.map(lambda random: drawing.layout(random, length, ranks))


def lengths_of_documents(length: int) -> st.SearchStrategy[list[int]]:
    """Document lengths that sum to ``length``; one-token and empty documents included."""
    return RANDOMS.map(lambda random: drawing.document_lengths(random, length))


def single_device(case: Case) -> Results:
    """PyTorch's own attention in the case's dtype, for what low precision can be asked of. Needs reachable rows."""
    *inputs, dout, _ = case.inputs()
    q, k, v = (x.requires_grad_() for x in inputs)
    allowed = case.allowed()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
    (out * dout).sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
