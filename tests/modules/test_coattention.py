"""Co-attention against the papers' equations, with context and question sharded each by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ringattn.modules.coattention import DCN, BiDAF, DCNPlus
from tests.modules.dense import Inputs, Shardings, compare, drawn

DIM, CONTEXT, QUESTION = 6, 37, 7


def _compare(module: torch.nn.Module, equation: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def call(own: torch.nn.Module, x: Inputs, owners: Shardings) -> torch.Tensor:
        sharded = {"sharding": owners["context"], "question_sharding": owners["question"]}
        out: torch.Tensor = own(x["q"], x["question"], **sharded)
        return out

    inputs = drawn(seed=1, q=(2, CONTEXT, DIM), question=(2, QUESTION, DIM))
    axes = {"q": ("context", 1), "question": ("question", 1)}
    lengths = {"context": CONTEXT, "question": QUESTION}
    compare(module, call, lambda m, x: equation(m, x["q"], x["question"]), inputs, axes, lengths)


def _bidaf(module: BiDAF, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    pairs = h[:, :, None] * u[:, None]
    first, second = module.of_context.weight[0], module.of_question.weight[0]
    scores = (h @ first)[:, :, None] + (u @ second)[:, None] + pairs @ module.of_both
    seen = torch.softmax(scores, dim=2) @ u
    about = torch.softmax(scores.amax(dim=2), dim=1)[:, None] @ h
    return torch.cat([h, seen, h * seen, h * about], dim=2)


def _dcn(module: DCN, d: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    q = torch.tanh(module.project(raw))
    affinity = torch.einsum("bmd,bnd->bmn", d, q)
    of_question = torch.softmax(affinity, dim=1).transpose(1, 2) @ d
    return torch.softmax(affinity, dim=2) @ torch.cat([q, of_question], dim=2)


def _dcn_plus(module: DCNPlus, d: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    def coattention(e_d: torch.Tensor, e_q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        affinity = torch.einsum("bmd,bnd->bmn", e_d, e_q)
        s_d = torch.softmax(affinity, dim=2) @ e_q
        s_q = torch.softmax(affinity, dim=1).transpose(1, 2) @ e_d
        return s_d, s_q, torch.softmax(affinity, dim=2) @ s_q

    s1_d, s1_q, c1 = coattention(d, q)
    e2_d, e2_q = module.encode(s1_d), module.encode(s1_q)
    s2_d, _, c2 = coattention(e2_d, e2_q)
    return torch.cat([d, e2_d, s1_d, s2_d, c1, c2], dim=2)


def test_bidaf() -> None:
    torch.manual_seed(0)
    _compare(BiDAF(DIM), _bidaf)


def test_dcn() -> None:
    torch.manual_seed(0)
    _compare(DCN(DIM), _dcn)


def test_dcn_plus() -> None:
    torch.manual_seed(0)
    _compare(DCNPlus(torch.nn.Sequential(torch.nn.Linear(DIM, DIM), torch.nn.Tanh())), _dcn_plus)
