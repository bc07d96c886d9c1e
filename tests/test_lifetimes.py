"""How long shardings, plans and calls live: no longer than they are needed, without the garbage collector."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import weakref
from collections.abc import Iterator

import pytest
import torch

import ringattn
from ringattn import handles
from ringattn.sharding import PLANS

LENGTH = 96


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the collector of cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, LENGTH, 8, generator=g).requires_grad_() for _ in range(3))
    return q, k, v


def _mask(number: int) -> ringattn.Mask:
    return ringattn.Documents([number, LENGTH - number]) & ringattn.Causal()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("keep_output", [False, True])
def test_a_dropped_sharding_is_freed_at_once(keep_output: bool) -> None:
    sharding = ringattn.Sharding(LENGTH, ringattn.init())
    seen, before = weakref.ref(sharding), handles.live()
    out = ringattn.attention(*_inputs(), _mask(5), sharding=sharding)
    if not keep_output:
        out.sum().backward()
        del out
    del sharding
    assert seen() is None
    if keep_output:
        out.sum().backward()  # the plan is the graph's
        del out
    assert handles.live() < before


@pytest.mark.usefixtures("uncollected")
def test_a_sharding_keeps_the_plans_that_were_used_last() -> None:
    sharding, inputs = ringattn.Sharding(LENGTH, ringattn.init()), _inputs()
    waiting = ringattn.attention(*inputs, _mask(1), sharding=sharding)
    expected = torch.autograd.grad(ringattn.attention(*inputs, _mask(1), sharding=sharding).sum(), inputs)
    before = handles.live()
    for number in range(2, PLANS + 20):
        ringattn.attention(*inputs, _mask(number), sharding=sharding)
    assert len(sharding.calls) == PLANS
    assert handles.live() - before <= 4 * PLANS  # a call, and a mask of three objects
    found = torch.autograd.grad(waiting.sum(), inputs)  # long since forgotten, and not gone
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_thousand_masks_take_no_memory() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # this process's peak is somebody else's
        assert fresh.apply(_grown) < 20 * 1024


def _grown() -> int:
    """KiB by which the process's peak grew in the last 1,000 of 1,300 steps, each with a mask of its own."""
    torch.set_num_threads(1)
    sharding, inputs = ringattn.Sharding(LENGTH, ringattn.init()), _inputs()
    for number in range(1300):
        first, second = 1 + number % 31, 1 + number // 31
        mask = ringattn.Documents([first, second, LENGTH - first - second]) & ringattn.Causal()
        ringattn.attention(*inputs, mask, sharding=sharding).sum().backward()
        if number == 299:
            alive, peak = handles.live(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert handles.live() <= alive + 8
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
