"""Spatial attention of four terms (An Empirical Study of Spatial Attention Mechanisms, arXiv 1904.05873, section 3.1).

    A_ij ~ exp(E1 + E2 + E3 + E4)
    E1 = q_i . k_j          query and key content          E3 = u . k_j          key content alone
    E2 = q_i . W R_{j-i}    query content, relative place  E4 = w . W R_{j-i}    relative place alone

R is sines and cosines of the distance at some frequencies, along a line or along both axes of an image. Since

    sin f(j-i) = sin fj cos fi - cos fj sin fi             cos f(j-i) = cos fj cos fi + sin fj sin fi

all four are one dot product of wider heads, ``[q + u, r_i] . [k_j, sin fj, cos fj]``: attention over any mask and
layout, in which keys carry their places with them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ringattn.checking import integer
from ringattn.errors import InputError
from ringattn.functional import attention
from ringattn.masks import Mask
from ringattn.mechanisms.softmax import Softmax
from ringattn.sharding import Sharding

TERMS = frozenset({1, 2, 3, 4})


class SpatialAttention(nn.Module):
    """Attention by content and relative place, each of the four terms if it is asked for.

    Args:
        heads: of queries and keys, which have as many.
        dim: of both.
        frequencies: of sines and cosines, for each axis.
        width: pixels in a row of an image whose pixels are the tokens, row by row; None for a sequence.
        terms: which of the terms 1 to 4 count.
        longest: the longest wavelength, in tokens or pixels; the shortest is 2 pi.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        frequencies: int = 8,
        width: int | None = None,
        terms: Collection[int] = TERMS,
        longest: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.terms = frozenset(terms)
        if not self.terms or not self.terms <= TERMS:
            raise InputError(f"terms are some of 1, 2, 3 and 4; got {sorted(self.terms)}.")
        self.width = None if width is None else integer(width, "width", least=1)
        self.longest, self.dim = longest, dim
        axes = 1 if width is None else 2
        self.frequencies = integer(frequencies, "frequencies", least=1)
        if self.terms & {2, 4}:
            self.places = nn.Parameter(torch.randn(heads, dim, 2 * axes * frequencies) * dim**-0.5)
        if 3 in self.terms:
            self.content = nn.Parameter(torch.randn(heads, dim) * dim**-0.5)
        if 4 in self.terms:
            self.place = nn.Parameter(torch.randn(heads, dim) * dim**-0.5)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        *,
        sharding: Sharding,
        kv_sharding: Sharding | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Arguments as for `ringattn.attention`, q and k ``[B, H, S_local, D]``."""
        wide = [q if 1 in self.terms else torch.zeros_like(q)]
        if 3 in self.terms:
            wide[0] = wide[0] + self.content.to(q.dtype)[:, None]
        if self.terms & {2, 4}:
            keys = sharding if kv_sharding is None else kv_sharding
            wide.append(self._turned(q, self._waves(sharding, q)))
            k = torch.cat([k, torch.cat(self._waves(keys, k), dim=-1).expand(*k.shape[:3], -1)], dim=-1)
        options |= {"sharding": sharding, "kv_sharding": kv_sharding, "mechanism": Softmax(scale=1.0)}
        out: torch.Tensor = attention(torch.cat(wide, dim=-1), k, v, mask, **options)
        return out

    def _waves(self, sharding: Sharding, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sines and cosines of this rank's places, ``[S_local, F]`` each, F over all axes."""
        positions = sharding.positions.to(like.device)
        axes = [positions] if self.width is None else [positions // self.width, positions % self.width]
        powers = torch.arange(self.frequencies, dtype=torch.float64, device=like.device) / self.frequencies
        angles = torch.cat([x.double()[:, None] * self.longest**-powers for x in axes], dim=-1)
        return angles.sin().to(like.dtype), angles.cos().to(like.dtype)

    def _turned(self, q: torch.Tensor, waves: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """What meets the sines and cosines of keys, ``[B, H, S_local, 2 F]``."""
        query = q if 2 in self.terms else torch.zeros_like(q)
        if 4 in self.terms:
            query = query + self.place.to(q.dtype)[:, None]
        of_sine, of_cosine = (query @ self.places.to(q.dtype)).chunk(2, dim=-1)
        sine, cosine = waves
        return torch.cat([of_sine * cosine + of_cosine * sine, of_cosine * cosine - of_sine * sine], dim=-1)
