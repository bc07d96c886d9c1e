"""Where entmax cuts: the threshold of every query, found in passes over keys alone.

Weights are ``[(z_j - t)+]^p`` and the threshold t is where they sum to 1. The sum falls with t and its p-th root is
convex, so Newton's steps on the root come from the left without overshooting, and one of them is enough where all
keys have the same score.

The first pass draws a *sketch* of every query's scores: count, mean and variance of those in each of `CELLS` cells
from the largest score downwards. A cell is a power of two wide, the smallest with which the cells reach the lowest
score, or 1 below the largest if that is higher: what lies deeper cannot have weight. The sketch, each cell taken for
a uniform density, has a threshold of its own, close to the one wanted.

Each pass after it is exact about such a *guess*: scores farther above it than a radius add to power sums, which are
the Taylor series of the sum of their weights, and the `NEAREST` scores within the radius are kept one by one. Where
the threshold lies within the radius and all scores there were kept, it is found to the last digits, and the radius
becomes 0. Where not, Newton's step is the next guess. All of it is sums and sets: the order of arrival does not
matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from ringattn.mechanisms.base import State

CELLS = 32
NEAREST = 64
TERMS = 6
STEPS = 10  # of Newton's method, within what one pass knows
LEAST = 2.0**-40  # the reach of the cells where all scores are one

Power = float | torch.Tensor
"""A number, or one for each query head, float64 ``[Hq, 1]``."""
Sums = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of a threshold ``[B, Hq, M]``: ``sum (z - t)+^p``, and the same of p - 1, over the scores above it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """What is known of the thresholds, float64 ``[B, Hq, M]`` each.

    Attributes:
        guess: the threshold, or what it is near.
        radius: how far from the guess it is looked for; 0 where it is found.
        low, high: it lies between these.
    """

    guess: torch.Tensor
    radius: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def state(self) -> State:
        return self.guess, self.radius, self.low, self.high


def _power(x: torch.Tensor, p: Power) -> torch.Tensor:
    """``x^p``, of ``[B, Hq, M, N]``."""
    if isinstance(p, torch.Tensor):
        return x ** p.unsqueeze(-1)
    return x if p == 1 else x**p


def _newton(sums: Sums, p: Power, start: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Where the sum is 1, between these bounds."""
    at = start
    for _ in range(STEPS):
        at = (at + _step(*sums(at), p)).clamp(low, high)
    return at


def _step(total: torch.Tensor, slope: torch.Tensor, p: Power) -> torch.Tensor:
    """Newton's step on the p-th root of the sum; far to the left where nothing lies above."""
    return torch.where(slope > 0, (total - total.clamp(min=0) ** (1 - 1 / p)) / slope, -math.inf)


# -- the first pass --------------------------------------------------------------------------------------------------


def blank(shape: tuple[int, ...], device: torch.device) -> State:
    """The sketch of no scores: the largest and the lowest, and moments ``[..., 3, CELLS]``."""
    top = torch.full(shape, -math.inf, dtype=torch.float64, device=device)
    return top, -top, top.new_zeros(*shape, 3, CELLS)


def sketch(z: torch.Tensor) -> State:
    """The sketch of scores ``[..., N]``, -inf where there is none."""
    top, low = z.amax(dim=-1), z.masked_fill(z == -math.inf, math.inf).amin(dim=-1)
    index, by = _cells(z, top, low)
    return top, low, _summed(index, torch.stack((torch.ones_like(by), by, by * by), dim=-2))


def join(into: State, part: State) -> None:
    """Merges a sketch into another, in place."""
    top, low = torch.maximum(into[0], part[0]), torch.minimum(into[1], part[1])
    moments = [_moved(x, top, low) for x in (into, part)]
    for total, x in zip(into, (top, low, moments[0] + moments[1]), strict=True):
        total.copy_(x)


def _width(top: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Of a cell: a power of two, at most 2 / (CELLS - 1)."""
    return torch.exp2(torch.ceil(torch.log2((top - low).clamp(LEAST, 1) / (CELLS - 1))))


def _edges(state: State) -> torch.Tensor:
    """The lower edges of the cells, ``[..., CELLS]``, the topmost first."""
    width = _width(*state[:2]).unsqueeze(-1)
    below = torch.arange(CELLS, dtype=torch.float64, device=width.device)
    return (torch.floor(state[0].unsqueeze(-1) / width) - below) * width


def _moved(state: State, top: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The moments of a sketch in the cells of another one, which are as wide or wider."""
    index, by = _cells(_edges(state), top, low)
    count, first, second = state[2].unbind(-2)
    moments = count, first + by * count, second + by * (2 * first + by * count)
    return _summed(index, torch.stack(moments, dim=-2).nan_to_num_(nan=0.0))


def _cells(at: torch.Tensor, top: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cells that points ``[..., N]`` lie in, `CELLS` for none, and how far above their lower edges."""
    width = _width(top, low).unsqueeze(-1)
    cell = torch.floor(at / width)
    down = torch.floor(top.unsqueeze(-1) / width) - cell
    index = down.nan_to_num_(nan=CELLS).clamp_(0, CELLS).long()
    return index, torch.sub(at, cell.mul_(width), out=down)


def _summed(index: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Moments ``[..., 3, N]``, summed by cell."""
    sums = moments.new_zeros(*moments.shape[:-1], CELLS + 1)
    return sums.scatter_add_(-1, index.unsqueeze(-2).expand(moments.shape), moments)[..., :CELLS]


def first_guess(state: State, p: Power) -> Cut:
    """The threshold of a sketch, and how far around it there are likely to be `NEAREST` / 2 scores."""
    top, low, moments = state
    count, width, edges = moments[..., 0, :], _width(top, low).unsqueeze(-1), _edges(state)
    first, second = (moments[..., i, :] / count.clamp(min=1) for i in (1, 2))
    half = (3 * (second - first * first)).clamp(min=0).sqrt().maximum(2.0**-20 * width)
    ends = [torch.nan_to_num(edges + first + x) for x in (-half, half)]
    weight = count / (2 * half)

    def sums(guess: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        below, above = ((x - guess.unsqueeze(-1)).clamp(min=0) for x in ends)
        powers = _power(below, p), _power(above, p)
        total = (weight * (powers[1] * above - powers[0] * below)).sum(dim=-1) / (p + 1)
        return total, (weight * (powers[1] - powers[0])).sum(dim=-1) / p

    high = top - count.sum(dim=-1).clamp(min=1) ** (-1 / p)
    guess = _newton(sums, p, top - 1, top - 1, high)
    from_edge = guess.unsqueeze(-1) - edges
    density = (count * ((from_edge > -width) & (from_edge < 2 * width))).sum(dim=-1) / (3 * width.squeeze(-1))
    radius = (NEAREST / 4 / density).minimum(2 * width.squeeze(-1))
    # where no key is, or a score that is no number, there is nothing to look for
    nowhere = torch.where(top == -math.inf, 0.0, math.nan)
    found = (torch.where(top.isfinite(), x, nowhere) for x in (guess, top - 1, high))
    return Cut(next(found), torch.where(top.isfinite(), radius, 0.0), *found)


# -- the passes after it ---------------------------------------------------------------------------------------------


def nothing(shape: tuple[int, ...], device: torch.device) -> State:
    """What no scores add: sums ``[..., TERMS + 4]`` and the nearest, as distances from the guess, inf for none."""
    sums = torch.zeros(*shape, TERMS + 4, dtype=torch.float64, device=device)
    return sums, sums.new_full((*shape, NEAREST), math.inf)


def gathered(z: torch.Tensor, cut: Cut, p: Power) -> State:
    """What scores ``[..., N]`` add: power sums of those beyond the radius, the first two of all above; the nearest.

    The last of the sums is the number of those within the radius.
    """
    above, radius = z - cut.guess.unsqueeze(-1), cut.radius.unsqueeze(-1)
    near, base = above.abs() <= radius, torch.where(above > 0, above, 1.0)
    term = _power(above.clamp(min=0), p)
    every = [term.sum(dim=-1), (term / base).sum(dim=-1)]
    term *= above > radius
    far = [term.sum(dim=-1)]
    for _ in range(int(p) if isinstance(p, (int, float)) and p < TERMS and p == int(p) else TERMS):
        far.append(term.div_(base).sum(dim=-1))
    far += [torch.zeros_like(far[0])] * (TERMS + 1 - len(far))  # what comes after it has no weight in the series
    sums = torch.stack((*far, *every, near.sum(dim=-1)), dim=-1)
    return sums, _nearest(above.masked_fill_(~near, math.inf))


def _nearest(above: torch.Tensor) -> torch.Tensor:
    """The `NEAREST` of these distances, inf where there are fewer."""
    missing = NEAREST - above.shape[-1]
    if missing > 0:
        above = torch.cat((above, above.new_full((*above.shape[:-1], missing), math.inf)), dim=-1)
    return above.gather(-1, above.abs().topk(NEAREST, dim=-1, largest=False).indices)


def gather(into: State, part: State) -> None:
    """Merges what other scores add, in place."""
    into[0].add_(part[0])
    into[1].copy_(_nearest(torch.cat((into[1], part[1]), dim=-1)))


def next_guess(state: State, cut: Cut, p: Power, precise: float) -> Cut:
    """The threshold where it is certain, Newton's next guess elsewhere; ``precise`` is how far from 1 a sum may be."""
    (*far, total, slope, count), nearest = state[0].unbind(-1), state[1]
    there = nearest < math.inf
    rising, falling = _series(p, far), _series(p - 1, far[1:])

    def sums(by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        above = nearest - by.unsqueeze(-1)
        counts = there & (above > 0)
        above = torch.where(counts, above, 1.0)
        weights = torch.where(counts, _power(above, p), 0.0)
        return (rising(by) + weights.sum(dim=-1), falling(by) + (weights / above).sum(dim=-1))

    by = _newton(sums, p, -cut.radius, -cut.radius, cut.radius)
    rest = (_binomials(p, TERMS)[-1] * by**TERMS * far[TERMS]).abs()
    exact = (count <= NEAREST) & ((sums(by)[0] - 1).abs() + rest <= precise)
    low, high = torch.where(total >= 1, cut.guess, cut.low), torch.where(total <= 1, cut.guess, cut.high)
    newton = (cut.guess + _step(total, slope, p)).clamp(low, high)
    stuck = ((total - 1).abs() <= precise) | ((newton - cut.guess).abs() <= 2.0**-51 * cut.guess.abs())
    found = cut.radius == 0
    guess = torch.where(found, cut.guess, torch.where(exact, cut.guess + by, newton))
    narrower = cut.radius * (NEAREST / 4 / count).clamp(max=1)
    radius = torch.where(found | exact | stuck, 0.0, narrower)
    return Cut(guess, radius, low, high)


def _binomials(p: Power, terms: int) -> list[Power]:
    """``p over k`` for k up to ``terms``."""
    found: list[Power] = [1.0]
    for k in range(terms):
        found.append(found[-1] * (p - k) / (k + 1))
    return found


def _series(p: Power, sums: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``sum (d - x)^p`` from the sums of ``d^(p - k)``, for x far smaller than any d."""
    coefficients = [b * s for b, s in zip(_binomials(p, len(sums) - 1), sums, strict=True)]

    def at(x: torch.Tensor) -> torch.Tensor:
        total = coefficients[-1]
        for c in coefficients[-2::-1]:
            total = c - x * total
        return total

    return at
