"""Tiny models of every architecture that ringattn attaches to, on Gloo ranks, against themselves in one process.

As `ringattn verify --model`: 301 tokens, one document or three, random weights, float32. Differences are relative norms
of the logits and of the gradient of the worst parameter; leaks are tokens of other documents whose logits change by any
bit when a token of the first document does.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import ringattn
from ringattn.integrations.model_parity import LIMIT, Parity, compare
from scripts.benchmarks.teams import Team, Worker

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
MIXED = {"num_key_value_heads": 2, "sliding_window": 31, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {**MIXED, "use_sliding_window": True},
    "qwen3": {**MIXED, "use_sliding_window": True, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 31},
    "gemma2": {**MIXED, "head_dim": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**MIXED, "head_dim": 16},
    "gpt_oss": {**MIXED, **EXPERTS, "head_dim": 16},
    "llama4_text": {"num_key_value_heads": 2, "attention_chunk_size": 31, "no_rope_layer_interval": 2, "head_dim": 16}
    | {"num_local_experts": 2, "intermediate_size_mlp": 96, "attn_temperature_tuning": False},
    "modernbert": {"local_attention": 30, "global_attn_every_n_layers": 2, "cls_token_id": None, "sep_token_id": None},
}
PACKS = ([301], [120, 1, 180])


def measured(worker: Worker, name: str, documents: list[int], ulysses: int) -> Parity:
    """One row, on every rank."""
    mesh = worker.kept.setdefault("mesh", None) or ringattn.init(ulysses=ulysses)
    worker.kept["mesh"] = mesh
    schedule = "ulysses" if ulysses > 1 else "auto"
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **MODELS[name])
    kind: Any = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForMaskedLM
    return compare(kind.from_config(config, dtype=torch.float32).eval(), mesh, documents, schedule=schedule)


def main() -> int:
    """Prints the table; 1 where a model is not itself."""
    parser = argparse.ArgumentParser(prog="scripts/bench huggingface", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="Gloo ranks (default 2 3)")
    parser.add_argument("--ulysses", type=int, default=1, help="ranks on the ulysses axis, of each number (default 1)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    found: dict[tuple[str, int, int], Parity] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("comparing", total=len(options.ranks) * len(options.models) * len(PACKS))
        for ranks in options.ranks:
            with Team(ranks) as team:
                for name in options.models:
                    for pack in PACKS:
                        found[name, ranks, len(pack)] = team.call(measured, name, pack, options.ulysses)[0]
                        progress.advance(task)
    columns = [f"{ranks} ranks, {'packed' if len(pack) > 1 else 'one'}" for ranks in options.ranks for pack in PACKS]
    table = Table("model", *columns, title=f"transformers {transformers.__version__}: logits / worst gradient")
    for name in options.models:
        cells = [found[name, ranks, len(pack)] for ranks in options.ranks for pack in PACKS]
        table.add_row(name, *(f"{each.logits:.1e} / {each.worst[1]:.1e}" for each in cells))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    fine = all(each.logits <= LIMIT and each.worst[1] <= LIMIT and not each.leaks for each in found.values())
    print(f"every difference at most {LIMIT:.0e}, and no leak:", fine)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
