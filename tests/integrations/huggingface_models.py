"""Tiny models of every architecture that ringattn attaches to, and what each gives in one process."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {**MIXED, "use_sliding_window": True}),
    "qwen3": ("Qwen3ForCausalLM", {**MIXED, "use_sliding_window": True, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 7}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    ),
    "gemma3_text": ("Gemma3ForCausalLM", {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 24}),
    "gpt_oss": ("GptOssForCausalLM", {**MIXED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        "Llama4ForCausalLM",
        {"num_local_experts": 2, "attention_chunk_size": 5, "no_rope_layer_interval": 2, "head_dim": 8}
        | {"attn_temperature_tuning": False, "intermediate_size_mlp": 48},
    ),
    "modernbert": ("ModernBertForMaskedLM", {"local_attention": 10, "global_attn_every_n_layers": 2}),
}

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("Cohere2ForCausalLM", MIXED),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 32, "first_k_dense_replace": 1},
    ),
    "exaone4": ("Exaone4ForCausalLM", MIXED),
    "gemma": ("GemmaForCausalLM", {"head_dim": 8}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 8}),
    "granite": ("GraniteForCausalLM", {"attention_multiplier": 0.5}),
    "mixtral": ("MixtralForCausalLM", {"sliding_window": 7, "num_local_experts": 4}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", MIXED),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 7}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**MIXED, "use_sliding_window": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": 7}),
}
"""Relatives of those, tested less."""


def build(name: str, **more: Any) -> PreTrainedModel:
    """A tiny model of this architecture, the same on every rank."""
    torch.manual_seed(0)
    kind, options = (CONFIGS | MORE)[name]
    cls = getattr(transformers, kind)
    sizes = {k: v for k, v in SIZES.items() if name != "modernbert" or k != "num_key_value_heads"}
    model: PreTrainedModel = cls(cls.config_class(**{**sizes, **options, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def sample(length: int, rows: int = 1, seed: int = 1) -> Tensor:
    """Token ids ``[rows, length]``."""
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
