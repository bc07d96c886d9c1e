"""Rates: how long each kernel took for one class of problems on this machine.

A kernel's speed depends on the processor it runs on: of two generations of one family, each prefers another kernel by
a third. So rates are measured where they are used, once for each class of problems, and kept (`store`, `trial`).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ringattn import bands, layouts
from ringattn.mechanisms.base import Problem
from ringattn.plans.plan import Plan
from ringattn.readable import dtype_name

MARGIN = 1.04
"""A kernel is kept until another one is faster by this factor: noise flips no choice, and what it costs is this."""
SMALLEST = 1 << 20  # pairs of all heads of a rank below which nothing is measured: 3 to 5 ms of a core
PAIRS = 1 << 22  # pairs of all heads of a trial with heads of 64 dims: about 60 ms of a core, forward and backward
SIDES = 64, 2048  # of a trial's tiles; what is larger is computed at the rate of the largest


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call's tiles are like, the same on every rank, so that all measure, or none does.

    Attributes:
        pairs: of queries and keys that one head of an average rank attends to.
        side: rows and columns of a typical causal square.
    """

    pairs: int
    side: int

    @staticmethod
    def from_plan(plan: Plan) -> Work:
        """The work of a plan's ranks, on average."""
        area = bands.area(plan.regions) + bands.area(plan.partial)
        queries, keys = (int(layouts.counts(spans, plan.size).sum()) for spans in (plan.q_spans, plan.k_spans))
        # a causal square of n rows has n / 2 keys for each query
        side = min(2 * area // max(queries, 1), max(queries, keys) // plan.size)
        return Work(area // plan.size, side)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A class of problems: what is measured once and for all of them.

    Attributes:
        mechanism: the class of the mechanism.
        dtype: ``float32`` and so on.
        dim, value_dim: of a head.
        heads, kv_heads: of a trial: as many as keep all threads busy, grouped as the problem's are.
        side: rows and columns of a trial's causal squares, a power of two.
        backward: whether the gradients are computed too.
    """

    mechanism: str
    dtype: str
    dim: int
    value_dim: int
    heads: int
    kv_heads: int
    side: int
    backward: bool

    @staticmethod
    def from_problem(problem: Problem, work: Work) -> Workload | None:
        """The class of a problem; None where it is too small to measure for, or not on a CPU, which clocks wait for."""
        if problem.device.type != "cpu" or problem.batch * problem.heads * work.pairs < SMALLEST:
            return None
        threads, group = torch.get_num_threads(), min(problem.heads // problem.kv_heads, 4)
        kv_heads = min(problem.batch * problem.kv_heads, -(-threads // group))
        affordable = math.isqrt(2 * pairs(problem.dim, problem.value_dim) // (group * kv_heads))
        low, high = SIDES
        side = max(low, min(work.side, affordable, high))
        return Workload(
            type(problem.mechanism).__name__,
            dtype_name(problem.dtype),
            problem.dim,
            problem.value_dim,
            group * kv_heads,
            kv_heads,
            1 << (side.bit_length() - 1 if side == affordable else round(math.log2(side))),
            problem.wants("q", "k", "v", *problem.mechanism.params),
        )

    def is_like(self, other: Workload) -> bool:
        """Whether they are of one kind: all the same but for the tiles' size and the number of heads."""
        kind = [(x.mechanism, x.dtype, x.dim, x.value_dim, x.backward) for x in (self, other)]
        return kind[0] == kind[1]

    @staticmethod
    def subject(problem: Problem, work: Work) -> str:
        """The class in words that are the same on ranks with other numbers of threads."""
        dims = f"{problem.heads}/{problem.kv_heads} heads of {problem.dim} and {problem.value_dim}"
        wanted = problem.wants("q", "k", "v", *problem.mechanism.params)
        side = 1 << work.side.bit_length()
        name = type(problem.mechanism).__name__
        return f"{name}, {problem.dtype}, {problem.batch} x {dims}, tiles below {side}, gradients {wanted}"

    def __str__(self) -> str:
        counts = (self.heads,) if self.heads == self.kv_heads else (self.heads, self.kv_heads)
        heads = f"{'/'.join(map(str, counts))} head{'s' * (self.heads > 1)}"
        dims = str(self.dim) if self.dim == self.value_dim else f"{self.dim} and {self.value_dim}"
        direction = "forward and backward" if self.backward else "forward"
        return f"{self.mechanism}, {self.dtype}, {heads} of {dims}, tiles of {self.side}, {direction}"


def pairs(dim: int, value_dim: int) -> int:
    """Pairs of all heads of a trial, by which it takes about as long whatever the heads' dims."""
    return PAIRS * torch.get_num_threads() * 128 // max(dim + value_dim, 32)


@dataclasses.dataclass(frozen=True)
class Rates:
    """The seconds each kernel took for a trial of a class, in the order in which ``auto`` prefers them."""

    workload: Workload
    seconds: tuple[tuple[str, float], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels that were measured."""
        return tuple(name for name, _ in self.seconds)

    @property
    def best(self) -> str:
        """The first that none of the others outdoes by more than the margin."""
        least = min(seconds for _, seconds in self.seconds)
        return next(name for name, seconds in self.seconds if seconds <= MARGIN * least)

    def __str__(self) -> str:
        each = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in self.seconds)
        return f"{each} for {self.workload}"
