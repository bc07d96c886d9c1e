"""Text from a trained decoder, one byte at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from ringattn.trainer.model import Decoder


@torch.no_grad()
def generate(
    model: Decoder, prompt: bytes, count: int, *, context: int, temperature: float, top_k: int, seed: int
) -> bytes:
    """`count` bytes that follow the prompt; temperature 0 takes the likeliest byte each time.

    The model is the one that was trained on shards; it is handed PyTorch's own attention here, as one process
    and a few hundred bytes need no more. Every byte reads the whole text again: simple, and quick at this
    size.
    """
    attend = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([text[-context:]])
        logits = model(tokens, torch.arange(tokens.shape[1]), attend)[0, -1].float()
        text.append(choose(logits, temperature, top_k, generator))
    return bytes(text[len(prompt) :])


def choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One byte drawn from the top_k likeliest: logits [256]."""
    best, byte = logits.topk(min(top_k, logits.numel()))
    if temperature == 0:
        return int(byte[0])
    drawn = torch.multinomial((best / temperature).softmax(0), 1, generator=generator)
    return int(byte[drawn])
