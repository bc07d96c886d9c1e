"""Co-attention against the papers' equations, with context and question sharded each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringattn
from ringattn.modules.coattention import DCN, BiDAF, DCNPlus
from tests.modules.running import check_module

RANKS = (1, 2, 3, 5, 8)
DIM, CONTEXT, QUESTION = 6, 37, 7


def _inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, DIM, generator=g, dtype=torch.float64) for n in (CONTEXT, QUESTION)]


def _sharded(mesh: ringattn.Mesh, module: torch.nn.Module, context: torch.Tensor, question: torch.Tensor) -> Any:
    own = ringattn.Sharding(CONTEXT, mesh, layout="zigzag")
    other = ringattn.Sharding(QUESTION, mesh, layout="striped")
    leaves = [s.split(x, 1).clone().requires_grad_() for s, x in ((own, context), (other, question))]
    return module(*leaves, sharding=own, question_sharding=other), [own, other], leaves


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


@pytest.mark.parametrize("ranks", RANKS)
def test_bidaf(ranks: int) -> None:
    torch.manual_seed(0)
    check_module(BiDAF(DIM), _bidaf, _sharded, _inputs(), ranks, dim=1)


@pytest.mark.parametrize("ranks", RANKS)
def test_dcn(ranks: int) -> None:
    torch.manual_seed(0)
    check_module(DCN(DIM), _dcn, _sharded, _inputs(), ranks, dim=1)


@pytest.mark.parametrize("ranks", RANKS)
def test_dcn_plus(ranks: int) -> None:
    torch.manual_seed(0)
    module = DCNPlus(torch.nn.Sequential(torch.nn.Linear(DIM, DIM), torch.nn.Tanh()))
    check_module(module, _dcn_plus, _sharded, _inputs(), ranks, dim=1)
