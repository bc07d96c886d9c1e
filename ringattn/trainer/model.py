"""A small decoder language model over bytes, written for one shard of a sequence.

    B   batch        S   tokens on this rank (its shard, not the whole context)      C   width
    H   heads        D   head dim

Nothing here knows about ranks. Every part but attention works on each token by itself; attention is handed in
as `attend(q, k, v)`, and where a token stands comes in as `positions`. That is all a model needs to be
sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ringattn.training import save_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, Hq, S, D], k and v [B, Hkv, S, D] -> [B, Hq, S, D]
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [S, D / 2]

VOCABULARY = 256  # bytes
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class Shape:
    """The size of a decoder. heads / kv_heads query heads share a key head (grouped-query attention)."""

    layers: int
    width: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Width inside SwiGLU: 8/3 C keeps its three matrices at the 8 C^2 of a plain MLP (Shazeer 2020)."""
        return -(-8 * self.width // (3 * 32)) * 32


class Decoder(nn.Module):
    """tokens [B, S] -> logits [B, S, 256].

    Attributes:
        recompute: whether the backward pass computes the blocks again, but for attention, whose outputs are kept.
    """

    def __init__(self, shape: Shape, seed: int, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.recompute = shape, recompute
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(DecoderBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        """The same weights on every rank, from a generator of our own: torch's global one may be anywhere.

        Matrices keep the size of what passes through (standard deviation 1 / sqrt(inputs)); those that write
        into the residual stream start smaller, by the root of how many add up (GPT-2, 2.3).
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = 1.0 if name == "embedding.weight" else weight.shape[1] ** -0.5
                if name == "head.weight":  # near zero: every byte starts equally likely
                    scale = 0.02
                if name.endswith(("attention.output.weight", "mlp.down.weight")):
                    scale /= (2 * self.shape.layers) ** 0.5
                nn.init.normal_(weight, std=scale, generator=generator)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Tokens [B, S]; positions [S], of each token in the sequence or in its document."""
        rotation = rope(positions, self.shape.head_dim)
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, attend, use_reentrant=False, context_fn=save_attention())
            else:
                x = block(x, rotation, attend)
        logits: Tensor = self.head(self.norm(x))
        return logits


class DecoderBlock(nn.Module):
    """Attention between tokens, then an MLP on each, both added to what comes in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.mlp = SwiGLU(shape)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, attend)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; what the attention is, the caller decides."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.query = nn.Linear(shape.width, shape.heads * shape.head_dim, bias=False)
        self.key = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=False)
        self.value = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=False)
        self.output = nn.Linear(shape.heads * shape.head_dim, shape.width, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        q, k, v = (self._heads(linear(x)) for linear in (self.query, self.key, self.value))
        out = attend(rotate(q, rotation), rotate(k, rotation), v)
        mixed: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H D] -> [B, H, S, D]. The sizes are spelt out: -1 has no answer on a rank without tokens."""
        batch, length, width = x.shape
        return x.view(batch, length, width // self.shape.head_dim, self.shape.head_dim).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, GLU Variants Improve Transformer)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


def rope(positions: Tensor, head_dim: int) -> Rotation:
    """Cosines and sines of the rotary embedding (Su et al. 2021, RoFormer, 3.2.2), each [S, D / 2] in
    float32.

    The angles are formed in float64: at position 1,000,000 a float32 angle is off by 0.03 radians already,
    and two ranks must agree on where a token stands.
    """
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angles = positions.double().outer(frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """X [B, H, S, D], its two halves taken as the coordinates of D / 2 planes, each turned by its angle."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.to(x.dtype)
