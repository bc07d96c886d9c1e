"""The measurement of kernels on one class of problems: the same tiles through each of them in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ringattn.kernels.base import Kernel
from ringattn.kernels.rates import Rates, Workload, pairs
from ringattn.mechanisms.base import Mechanism, OutputGrad, Problem
from ringattn.plans import tiles as t
from ringattn.plans.tiles import Tiles

ROUNDS = 3
MOST_ROWS = 4096


def measure(
    kernels: Sequence[Kernel],
    mechanism: Mechanism,
    workload: Workload,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """The least of a few times of each kernel, which take turns so that a slow moment is everybody's.

    A first round that is not counted compiles what is compiled at first use. PyTorch's random state is left alone.
    """
    problem, tiles = problem_of(mechanism, workload), _tiles(workload)
    run = _runner(problem, tiles)
    fastest = dict.fromkeys(map(str, kernels), math.inf)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for kernel in kernels:
            run(kernel, workload.backward)
        for _ in range(ROUNDS):
            for kernel in kernels:
                started = clock()
                run(kernel, workload.backward)
                fastest[str(kernel)] = min(fastest[str(kernel)], clock() - started)
    return Rates(workload, tuple(fastest.items()))


def problem_of(mechanism: Mechanism, workload: Workload) -> Problem:
    """One of the class, on a CPU."""
    return Problem(
        mechanism,
        1,
        workload.heads,
        workload.kv_heads,
        workload.dim,
        workload.value_dim,
        getattr(torch, workload.dtype),
        torch.device("cpu"),
    )


def _tiles(workload: Workload) -> Tiles:
    """Documents of the workload's side, one causal square each, as many as the trial can afford."""
    side = workload.side
    affordable = 2 * pairs(workload.dim, workload.value_dim) // (workload.heads * side * side)
    first = np.arange(max(1, min(affordable, MOST_ROWS // side))) * side
    rows = np.zeros((len(first), t.WIDTH), dtype=np.int64)
    for column in (t.Q, t.K, t.Q_POSITION, t.K_POSITION):
        rows[:, column] = first
    rows[:, [t.M, t.N]], rows[:, t.HIGH] = side, side - 1
    rows[:, [t.Q_STEP, t.K_STEP, t.Q_STRIDE, t.K_STRIDE]] = 1
    return Tiles(rows)


def _runner(problem: Problem, tiles: Tiles) -> Callable[[Kernel, bool], None]:
    """Runs a kernel on tensors of the problem's shapes."""
    length = int(tiles.rows[-1, t.Q] + tiles.rows[-1, t.M])
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, heads, length, dim, generator=generator).to(problem.dtype)
        for heads, dim in (
            (problem.heads, problem.dim),
            (problem.kv_heads, problem.dim),
            (problem.kv_heads, problem.value_dim),
            (problem.heads, problem.value_dim),
        )
    )

    def run(kernel: Kernel, backward: bool) -> None:
        state = kernel.forward(problem, q, k, v, tiles, None)
        if backward:
            out, extras = problem.mechanism.finish(problem, state)
            output_grad = OutputGrad((out, *extras), dout, (None,) * len(extras))
            dq, dk, dv = (problem.rows(x.shape[1], length, x.shape[3]) for x in (q, k, v))
            kernel.backward(problem, q, k, v, output_grad, tiles, (dq, dk, dv), {})

    return run


def pairs_of(workload: Workload) -> int:
    """Of queries and keys, all heads together, that a trial attends to."""
    return _tiles(workload).area * workload.heads
