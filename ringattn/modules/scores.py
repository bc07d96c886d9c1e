"""Scores other than the scaled dot product, and local attention (Luong et al., arXiv 1508.04025, sections 3.1 and 3.2).

Each is softmax attention over a sharded sequence, of queries or keys that are made locally.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ringattn.functional import attention
from ringattn.masks import Mask, Window
from ringattn.mechanisms.softmax import Softmax
from ringattn.sharding import Sharding


class General(nn.Module):
    """Scores ``q^T W k`` (equation 8, *general*), W of its own for each query head.

    Args:
        heads: query heads.
        dim, key_dim: of queries and of keys, which need not be equal.
    """

    def __init__(self, heads: int, dim: int, key_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim, key_dim))
        nn.init.normal_(self.weight, std=(dim * key_dim) ** -0.5)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, *, sharding: Sharding, **options: Any
    ) -> torch.Tensor:
        """Arguments, ``options`` too, as for `ringattn.attention`, q ``[B, Hq, S_local, dim]``."""
        out: torch.Tensor = attention(
            q @ self.weight, k, v, mask, sharding=sharding, mechanism=Softmax(scale=1.0), **options
        )
        return out


class Location(nn.Module):
    """Weights from the query and the key's position alone, ``softmax(W q)`` (*location*, section 3.1).

    Args:
        heads: key heads.
        dim: of queries.
        length: of the whole sequence of values, a row of W each.
    """

    def __init__(self, heads: int, dim: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, length, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(
        self,
        q: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        *,
        sharding: Sharding,
        kv_sharding: Sharding | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Arguments as for `ringattn.attention`. The rows of W travel as keys."""
        own = sharding if kv_sharding is None else kv_sharding
        k = own.split(self.weight, 1).expand(len(v), -1, -1, -1)
        options |= {"sharding": sharding, "kv_sharding": kv_sharding, "mechanism": Softmax(scale=1.0)}
        out: torch.Tensor = attention(q, k, v, mask, **options)
        return out


class Cosine(nn.Module):
    """Scores ``beta cos(q, k)`` (Graves et al., arXiv 1410.5401, equations 5 and 6), with a sharpness beta > 0 a head.

    Args:
        heads: query heads.
        sharpness: what beta begins as.
    """

    def __init__(self, heads: int, sharpness: float = 10.0) -> None:
        super().__init__()
        self.log_sharpness = nn.Parameter(torch.full((heads,), sharpness).log())

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, *, sharding: Sharding, **options: Any
    ) -> torch.Tensor:
        """Arguments as for `ringattn.attention`."""
        q = nn.functional.normalize(q, dim=-1) * self.log_sharpness.exp()[:, None, None]
        k = nn.functional.normalize(k, dim=-1)
        out: torch.Tensor = attention(
            q.to(k.dtype), k, v, mask, sharding=sharding, mechanism=Softmax(scale=1.0), **options
        )
        return out


class LocalM(nn.Module):
    """Monotonic local attention (*local-m*, section 3.2): a window of ``width`` tokens to either side of the query.

    Only what lies in the windows travels and is computed.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.window = Window(width, width)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, *, sharding: Sharding, **options: Any
    ) -> torch.Tensor:
        """Arguments as for `ringattn.attention`."""
        out: torch.Tensor = attention(q, k, v, mask & self.window, sharding=sharding, **options)
        return out


class LocalP(nn.Module):
    """Predictive local attention (*local-p*, section 3.2, equations 9 and 10).

    A query predicts its centre ``p = S sigmoid(v^T tanh(W q))`` among the S keys, and weights within ``width`` of it
    are multiplied by ``exp(-(j - p)^2 / 2 sigma^2)``, sigma half the width.

    Args:
        heads: query heads.
        dim: of queries.
        hidden: rows of W.
        width: in tokens.
    """

    def __init__(self, heads: int, dim: int, hidden: int, width: float) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Parameter(torch.empty(heads, dim, hidden))
        self.centre = nn.Parameter(torch.empty(heads, hidden, 1))
        nn.init.normal_(self.hidden, std=dim**-0.5)
        nn.init.normal_(self.centre, std=hidden**-0.5)

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
        """Arguments as for `ringattn.attention`."""
        length = (sharding if kv_sharding is None else kv_sharding).length
        share = torch.sigmoid(torch.tanh(q @ self.hidden) @ self.centre).squeeze(-1)
        mechanism = Softmax(centres=length * share, width=self.width)
        options |= {"sharding": sharding, "kv_sharding": kv_sharding, "mechanism": mechanism}
        out: torch.Tensor = attention(q, k, v, mask, **options)
        return out
