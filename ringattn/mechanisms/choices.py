"""Chosen keys: where they are, what their values are, and which pairs of a block they make."""

from __future__ import annotations

import math

import torch

from ringattn.mechanisms.blocks import Block

NOWHERE = torch.iinfo(torch.int64).max  # behind every key
AT_ONCE = 1 << 16  # candidates scored at once


def taken(
    block: Block, v: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of the keys in these columns, and their values with one more dim; nothing where the score is -inf.

    Args:
        v: ``[B, Hkv, N, Dv]``.
        scores, columns: of the chosen, ``[B, Hkv, G, M, ...]``. Where a score is no number, the value is none.
    """
    reached = scores != -math.inf
    positions = torch.where(reached, block.k_positions(v.device)[columns], NOWHERE)
    index = columns.flatten(2).unsqueeze(-1).expand(-1, -1, -1, v.shape[-1])
    values = v.gather(2, index).view(*columns.shape, v.shape[-1]) * reached.unsqueeze(-1)
    return positions, values.masked_fill(scores.isnan().unsqueeze(-1), math.nan)  # as softmax would have it


def chosen(block: Block, positions: torch.Tensor) -> torch.Tensor:
    """Which pairs of a block are of these positions ``[B, Hq, M, top]``, ``[B, Hq, M, N]``.

    Not those outside its band: the pair may lie in the rectangle of another tile, too.
    """
    at = block.k_positions(positions.device)
    if positions.shape[-1] == 1:
        found = positions == at
    else:
        column = (positions - block.k_at.start) // block.k_at.step
        inside = (column >= 0) & (column < len(at))
        column = torch.where(inside, column, 0)
        inside &= at[column] == positions
        found = torch.zeros(*positions.shape[:-1], len(at), dtype=torch.int8, device=at.device)
        found = found.scatter_add_(-1, column, inside.to(torch.int8)) > 0
    return found if block.allowed is None else found & block.allowed
