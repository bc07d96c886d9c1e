"""Which models of transformers `ringattn.integrations.huggingface` knows, and what each of their layers attends to.

A layer's `Reach` says who attends to whom within one document. Each of the models here has a test that compares it with
itself in one process; what is not here is refused: nobody has looked what else it lets tokens see of each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ringattn.errors import UnsupportedError
from ringattn.masks import Causal, Documents, Full, Mask, Window

SHIFTED = {"ForCausalLM": True, "ForMaskedLM": False}
"""By transformers' names of losses, those that are sums over tokens: whether labels are those of the next token."""

FREQUENCIES_OF_THE_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the longest position that a rank sees."""

REASONS = {
    "bart": "its decoder's learned positions are counted within a shard, and its cross-attention joins two sequences",
    "bert": "its heads take their losses as means over a shard; ModernBERT's do not",
    "gemma3": "images attend in both directions, by masks made of a shard's tokens; its text model is gemma3_text",
    "llama4": "images are scattered into a shard's tokens",
    "t5": "its relative biases are computed from places within a shard, and its cross-attention joins two sequences",
}
"""Why some that are asked for are refused."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """Whom a layer's tokens attend to within one document.

    Attributes:
        causal: whether to earlier tokens only.
        window: tokens to the left, and without causality to the right; None for all.
        chunk: tokens of each run, counted from the document's beginning, within which they attend; None for all.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    def mask(self, length: int, documents: tuple[int, ...] | None) -> Mask:
        """The mask of one sequence, or of documents that are packed into it."""
        mask: Mask = Causal() if self.causal else Full()
        if self.window is not None:
            window = Window(self.window, 0 if self.causal else self.window)
            mask = window & mask if self.causal else window
        if self.chunk is not None:
            documents = tuple(_cut(documents or (length,), self.chunk))
        return mask if documents is None else Documents(documents) & mask

    @property
    def weight(self) -> Mask:
        """A mask that weighs about as much, whatever the documents: for balancing."""
        return self.mask(0, None) if self.chunk is None else Reach(window=self.chunk // 2).mask(0, None)

    def __str__(self) -> str:
        words = ["causal" if self.causal else "bidirectional"]
        words += [f"within {self.window} tokens"] if self.window is not None else []
        return " ".join(words + ([f"in chunks of {self.chunk}"] if self.chunk is not None else []))


def _cut(documents: tuple[int, ...], chunk: int) -> Iterator[int]:
    for length in documents:
        yield from itertools.repeat(chunk, length // chunk)
        if length % chunk:
            yield length % chunk


def reaches(config: Any) -> list[Reach]:
    """Of every layer of a model of this config.

    Raises:
        UnsupportedError: the architecture is not known, or what the config asks for cannot be sharded; says why.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _LAYERS:
        why = REASONS.get(str(kind), "nobody has tested what else it lets tokens see of each other")
        raise UnsupportedError(
            f"ringattn attaches to {', '.join(_LAYERS)}; got a model of type {kind!r}: {why}. Call ringattn.attention "
            f"from its attention layers instead."
        )
    _check_rotary(config)
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError(f"{kind} with use_bidirectional_attention has masks of its own; set it to False.")
    return _LAYERS[kind](config)


def check_router(config: Any) -> None:
    """Refuses auxiliary losses of routers.

    Raises:
        UnsupportedError: the config asks for one.
    """
    if getattr(config, "output_router_logits", False):
        raise UnsupportedError(
            "A router's auxiliary loss is no sum over tokens: the ranks' shares would not add up to it. Set "
            "model.config.output_router_logits = False."
        )


def balance(layers: list[Reach]) -> list[Reach]:
    """The layers in their proportions, each kind as few times as that takes."""
    counts = Counter(layers)
    common = math.gcd(*counts.values())
    return [reach for reach, count in counts.items() for _ in range(count // common)]


def _check_rotary(config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for each in nested or [parameters]:
        if each.get("rope_type") in FREQUENCIES_OF_THE_LENGTH:
            raise UnsupportedError(
                f"Rotary embeddings of type {each['rope_type']!r} take their frequencies from the longest position "
                f"that a rank sees, which differs between ranks. Use a fixed scaling, such as yarn or linear."
            )


def _causal(config: Any) -> list[Reach]:
    return [Reach()] * config.num_hidden_layers


def _one_window(config: Any) -> list[Reach]:
    """Every layer has the config's window, if it has one."""
    window = config.sliding_window
    return [Reach(window=None if window is None else window - 1)] * config.num_hidden_layers


def _by_layer(config: Any) -> list[Reach]:
    """Each layer's type is listed."""
    known = {"full_attention": Reach()}
    if config.sliding_window is not None:
        known["sliding_attention"] = Reach(window=config.sliding_window - 1)
    return _listed(config, known)


def _encoder(config: Any) -> list[Reach]:
    full, window = Reach(causal=False), Reach(causal=False, window=config.sliding_window)
    return _listed(config, {"full_attention": full, "sliding_attention": window})


def _listed(config: Any, known: dict[str, Reach]) -> list[Reach]:
    for name in config.layer_types:
        if name not in known:
            raise UnsupportedError(f"{config.model_type} has layers of type {name!r}; known are {', '.join(known)}.")
    return [known[name] for name in config.layer_types]


def _chunked(config: Any) -> list[Reach]:
    if config.attn_temperature_tuning:
        raise UnsupportedError(
            "llama4_text with attn_temperature_tuning scales queries by their places within a shard; set it to False."
        )
    return _listed(config, {"full_attention": Reach(), "chunked_attention": Reach(chunk=config.attention_chunk_size)})


_LAYERS = {
    "cohere2": _by_layer,  # layers without positions
    "deepseek_v3": _causal,  # values of another size than keys
    "exaone4": _by_layer,
    "gemma": _causal,
    "gemma2": _by_layer,  # a soft cap
    "gemma3_text": _by_layer,  # rotary embeddings for each type of layer
    "glm4": _causal,
    "gpt_oss": _by_layer,  # sinks, and experts that look at one token each
    "granite": _causal,
    "llama": _causal,
    "llama4_text": _chunked,
    "mistral": _one_window,
    "mixtral": _one_window,
    "modernbert": _encoder,
    "olmo2": _causal,
    "olmo3": _by_layer,
    "phi3": _one_window,
    "qwen2": _by_layer,
    "qwen3": _by_layer,
    "qwen3_moe": _causal,
    "smollm3": _by_layer,  # layers without positions
    "starcoder2": _one_window,
}
