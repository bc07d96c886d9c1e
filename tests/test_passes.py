"""Passes over keys alone before the main one, and the results beside the output, by a softmax that takes two passes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import ringattn
from ringattn.mechanisms.base import Mechanism, Problem, State
from ringattn.mechanisms.blocks import Block
from ringattn.mechanisms.scores import Scored
from ringattn.mechanisms.softmax import Softmax


@dataclasses.dataclass(frozen=True, eq=False)
class Normaliser(Scored):
    """Finds the log-sum-exp, and says so ``passes`` passes later than it could."""

    passes: int = 1

    def empty(self, problem: Problem, length: int) -> State:
        lse = problem.rows(problem.heads, length, 1).squeeze(-1)
        return lse.fill_(-math.inf), problem.rows(problem.heads, length, 0)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        assert v.shape[-1] == problem.value_dim == 0
        scores, _ = self.scores(problem, block, q, k)
        return scores.logsumexp(dim=-1).flatten(1, 2), q.new_zeros(*q.shape[:3], 0)

    def merge(self, into: State, part: State) -> None:
        into[0].copy_(torch.logaddexp(into[0], part[0]))

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        done = problem.known[1] + 1 if problem.known else torch.ones(())
        return state[1], (state[0], done)

    def tile_grad(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("nobody asks for the gradients of a pass over keys alone")

    def settled(self, known: State) -> bool:
        # a rank of more queries takes more passes: all must go on with it
        return int(known[1]) >= self.passes + known[0].shape[2] % 3


@dataclasses.dataclass(frozen=True, eq=False)
class TwoPass(Softmax):
    """Softmax that knows its log-sum-exp before it sees values."""

    passes: int = 1

    @property
    def preparation(self) -> Mechanism:
        return Normaliser(self.scale, self.softcap, self.passes)

    def tile(self, problem: Problem, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        scores, _ = self.scores(problem, block, q, k)
        lse = problem.known[0][:, :, block.queries]
        weights = torch.exp(scores - lse.nan_to_num(neginf=0).unflatten(1, (problem.kv_heads, -1)).unsqueeze(-1))
        return (weights @ v.unsqueeze(2)).flatten(1, 2), lse

    def merge(self, into: State, part: State) -> None:
        into[0].add_(part[0])
        into[1].copy_(part[1])

    def finish(self, problem: Problem, state: State) -> tuple[torch.Tensor, State]:
        return state[0].to(problem.dtype), (problem.known[0],)


def _attend(mesh: ringattn.Mesh, mechanism: Mechanism, schedule: str) -> tuple[list[torch.Tensor], int]:
    """Output, log-sum-exp and all gradients of the whole sequence, and the bytes of the forward pass."""
    length, mask = 50, ringattn.Documents([17, 1, 32]) & ringattn.Causal()
    g = torch.Generator().manual_seed(0)
    sharding = ringattn.Sharding(length, mesh, mask=mask)
    whole = (torch.randn(1, h, length, d, generator=g, dtype=torch.float64) for h, d in ((4, 8), (2, 8), (2, 6)))
    q, k, v = (sharding.split(x, 2).clone().requires_grad_() for x in whole)
    before = mesh.connected().counters.sent_bytes
    out, lse = ringattn.attention(
        q, k, v, mask, sharding=sharding, mechanism=mechanism, schedule=schedule, kernel="reference", extras=["lse"]
    )
    sent = mesh.connected().counters.sent_bytes - before
    (out.sin().sum() + lse.cos().sum()).backward()
    return [sharding.join(x.detach(), 2) for x in (out, lse, *(x.grad for x in (q, k, v) if x.grad is not None))], sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", ["ring", "route"])
def test_what_is_known_before_the_main_pass(ranks: int, schedule: str) -> None:
    for (found, _), (expected, _) in zip(
        *(ringattn.simulate(_attend, mechanism, schedule, ring=ranks).results for mechanism in (TwoPass(), Softmax())),
        strict=True,
    ):
        assert len(found) == 5
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() <= 1e-13 * y.norm()


def test_keys_alone_travel_and_all_ranks_make_as_many_passes() -> None:
    """Of 8 + 6 dims a key and value 8 travel in each further pass, and the numbers by which ranks agree."""
    sent = {
        passes: sum(bytes_ for _, bytes_ in ringattn.simulate(_attend, TwoPass(passes=passes), "route", ring=3).results)
        for passes in (2, 3)
    }
    one = sum(bytes_ for _, bytes_ in ringattn.simulate(_attend, Softmax(), "route", ring=3).results)
    assert 8 / 14 * one * 0.8 <= sent[3] - sent[2] <= 8 / 14 * one


def test_explain_says_what_goes_before() -> None:
    sharding = ringattn.Sharding(12, ringattn.init())
    q = torch.randn(1, 2, 12, 4)
    said = ringattn.explain(q, q, q, ringattn.Causal(), sharding=sharding, mechanism=TwoPass())
    assert "before it, passes over keys alone" in said


@pytest.mark.parametrize("extras", [("nothing",), "lse", ("lse", 3), 5, ("denominator",)])
def test_unknown_results_are_refused(extras: Any) -> None:
    sharding = ringattn.Sharding(12, ringattn.init())
    q = torch.randn(1, 2, 12, 4)
    for mechanism in (Softmax(), ringattn.Linear()):
        with pytest.raises((ringattn.InputError, ringattn.UnsupportedError), match="extra"):
            ringattn.attention(q, q, q, ringattn.Causal(), sharding=sharding, mechanism=mechanism, extras=extras)
