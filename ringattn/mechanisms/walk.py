"""The recurrence of monotonic alignment over one block, by antidiagonals.

    r_ij = (1 - p_i,j-1) r_i,j-1 + a_i-1,j        a_ij = p_ij r_ij

In the plane of rows and keys, r needs its left neighbour and the one above it: all pairs of an antidiagonal are
independent, and a block of M rows and N keys takes M + N steps. Every factor and term is a probability: nothing is
divided, nothing cancels, and what underflows is below 1e-308. It is float64 throughout: in float32 saturated energies
cost five digits over some hundred keys.

Gradients, with g_ij that of the weight a_ij:

    da_ij = g_ij + dr_i+1,j        dr_ij = p_ij da_ij + (1 - p_ij) dr_i,j+1
    de_ij = a_ij (1 - p_ij) (da_ij - dr_i,j+1)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Flow(NamedTuple):
    """What flows into a block, or out of it; of gradients, in the other direction.

    Attributes:
        left: float64 ``[B, Hq, M]``, of each row, the probability that its search goes on at the block's first key.
        above: float64 ``[B, Hq, N]``, of each key, the weight that the row before the block has given it.
    """

    left: torch.Tensor
    above: torch.Tensor


class Walk:
    """A block's recurrence.

    Its planes ``[M + N, B Hq, M]`` are skewed: at ``[s, :, i]`` is the pair of row i and key s - i. Beyond both ends of
    its keys a row stops nowhere and goes on with certainty, so that what flows out of it arrives at the last step.

    Attributes:
        alignment: ``[B, Hq, M, N]``, the probability of each row to stop at each key.
    """

    def __init__(self, energies: torch.Tensor, flow: Flow) -> None:
        """Takes the energies, float64 ``[B, Hq, M, N]``, and what flows in."""
        self._shape, self._flow = energies.shape, flow
        self.alignment = energies
        if not energies.numel():
            return
        plane = _skewed(energies, -math.inf)
        self._stops, self._goes_on = torch.sigmoid(plane), torch.sigmoid(-plane)  # each with all its digits
        self._reached = torch.zeros_like(plane)
        for edge, x in zip(_edges(self._reached, energies.shape), flow, strict=True):
            edge += x.flatten(0, 1)
        reached, go = self._reached.unbind(0), self._goes_on.unbind(0)
        upper, lower = self._reached[:, :, :-1].unbind(0), self._reached[:, :, 1:].unbind(0)
        stop_upper = self._stops[:, :, :-1].unbind(0)
        for s in range(1, len(reached)):
            reached[s].addcmul_(go[s - 1], reached[s - 1])
            lower[s].addcmul_(stop_upper[s - 1], upper[s - 1])
        self.alignment = _level(self._stops * self._reached, energies.shape)

    @property
    def out(self) -> Flow:
        """What flows out: right, and below."""
        if not self.alignment.numel():
            return self._flow
        return Flow(self._reached[-1].reshape(self._shape[:3]), self.alignment[:, :, -1].contiguous())

    def backward(self, dalignment: torch.Tensor, dflow: Flow) -> tuple[torch.Tensor, Flow]:
        """The gradients of the energies ``[B, Hq, M, N]`` and of what has flown in, from those of what came of it."""
        if not dalignment.numel():
            return dalignment, dflow
        dalignment = dalignment.clone()
        dalignment[:, :, -1] += dflow.above
        given = _skewed(dalignment, 0)
        reached = self._stops * given
        reached[-1] += dflow.left.flatten(0, 1)
        steps, go = reached.unbind(0), self._goes_on.unbind(0)
        upper, lower = reached[:, :, :-1].unbind(0), reached[:, :, 1:].unbind(0)
        stop_upper = self._stops[:, :, :-1].unbind(0)
        for s in range(len(steps) - 2, -1, -1):
            steps[s].addcmul_(go[s], steps[s + 1])
            upper[s].addcmul_(stop_upper[s], lower[s + 1])
        # what a row gains by stopping at a key, over going on
        given[:-1, :, :-1] += reached[1:, :, 1:]
        given[:-1] -= reached[1:]
        given.mul_(self._stops).mul_(self._goes_on).mul_(self._reached)
        heads = self._shape[:2]
        left, above = (edge.unflatten(0, heads).contiguous() for edge in _edges(reached, self._shape))
        return _level(given, self._shape), Flow(left, above)


def searched(stops: torch.Tensor, flow: Flow) -> tuple[torch.Tensor, Flow]:
    """The alignment, and what flows out, of rows that stop with certainty at the first key where they may.

    As `Walk` of probabilities 0 and 1, in M steps: how far a row gets is a minimum of indices, that of the first such
    key from where it begins on, or of the end of the block.

    Args:
        stops: where rows may stop, bool ``[B, Hq, M, N]``.
        flow: 0 or 1 everywhere.
    """
    rows, keys = stops.shape[2:]
    if not stops.numel():
        return stops.double(), flow
    index = torch.arange(keys, device=stops.device)
    first = torch.where(stops, index, keys).flip(-1).cummin(dim=-1).values.flip(-1)
    first = torch.nn.functional.pad(first, (0, 1), value=keys)  # a row that begins nowhere stops nowhere
    at = keys - (flow.above * (keys - index)).sum(dim=-1).long()
    begins, ends = [], []
    for row in range(rows):
        begins.append(torch.where(flow.left[:, :, row] > 0, 0, at))
        at = first[:, :, row].gather(-1, begins[-1].unsqueeze(-1)).squeeze(-1)
        ends.append(at)
    stopped = torch.stack(ends, dim=2)
    alignment = (stopped.unsqueeze(-1) == index).double()
    goes_on = (torch.stack(begins, dim=2) < keys) & (stopped == keys)
    return alignment, Flow(goes_on.double(), alignment[:, :, -1].contiguous())


def _skewed(x: torch.Tensor, beyond: float) -> torch.Tensor:
    """``[B, Hq, M, N]`` as a skewed plane, with this number beyond both ends of the keys."""
    batch, heads, rows, keys = x.shape
    plane = x.new_full((rows + keys, batch * heads, rows), beyond)
    _of_pairs(plane, x.shape).copy_(x.flatten(0, 1))
    return plane


def _level(plane: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A skewed plane as ``[B, Hq, M, N]``."""
    return _of_pairs(plane, shape).contiguous().view(shape)


def _of_pairs(plane: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The view ``[B Hq, M, N]`` of a skewed plane, in which the pair of row i and key j is at ``[i + j, :, i]``."""
    step = plane.stride(0)
    return plane.as_strided((plane.shape[1], *shape[2:]), (plane.stride(1), step + 1, step))


def _edges(plane: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key of each row, ``[B Hq, M]``, and each key of the first row, ``[B Hq, N]``: views."""
    rows, keys = shape[2:]
    return plane[:rows].diagonal(dim1=0, dim2=2), plane[:keys, :, 0].T
