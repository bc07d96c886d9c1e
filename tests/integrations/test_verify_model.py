"""`ringattn verify --model`: users' models pass, and one that was broken on purpose is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention
from typer.testing import CliRunner

import ringattn
from ringattn.cli import app
from ringattn.errors import InputError
from ringattn.integrations.model_parity import Parity, compare, load_model
from tests.workers import Workers

BIG = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**BIG, "model_type": "llama"},
    "gemma2": {**BIG, "model_type": "gemma2", "head_dim": 64, "sliding_window": 4096},
}
DOCUMENTS = [20, 1, 30]


class Deaf(LlamaAttention):
    """An attention layer that does not listen to its mask."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return super().forward(*inputs, **{**options, "attention_mask": None})


def broken() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[1].self_attn.__class__ = Deaf
    return model


def _compared(mesh: ringattn.Mesh, source: str) -> Parity:
    return compare(load_model(source, shrink=True), mesh, DOCUMENTS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_users_config_passes_on_two_ranks(gloo: Workers, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    for parity in gloo.run(2, _compared, str(tmp_path)):
        assert parity.passed and parity.first is None, parity
        assert len(parity.layers) == 2 + (name == "gemma2") and parity.moved


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_that_ignores_its_mask_is_named(gloo: Workers, ranks: int) -> None:
    source = "tests.integrations.test_verify_model:broken"
    found = gloo.run(2, _compared, source) if ranks == 2 else [_compared(ringattn.init(), source)]
    for parity in found:
        assert not parity.passed and parity.first == "model.layers.1.self_attn", parity
        assert parity.layers["model.layers.0.self_attn"] < 1e-6 and parity.logits > 1e-3


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    options = ["verify", "--length", "40", "--shrink", "--model"]
    done = CliRunner().invoke(app, [*options, str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["passed"] and said["documents"] == [13, 1, 26] and said["first_layer_that_differs"] is None
    done = CliRunner().invoke(app, [*options, "tests.integrations.test_verify_model:broken"])
    assert done.exit_code == 1
    assert "The first attention layer that differs is model.layers.1.self_attn" in done.output


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere/config.json", "takes a config.json"),
        ("[]", "is no config"),
        ('{"model_type": "unheard"}', "is no config"),
        ('{"model_type": "vit"}', "no language model"),
        ("json:dumps", "failed: TypeError"),
        ("os:nothing", "has no 'nothing'"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(tmp_path: Path, source: str, said: str) -> None:
    if source.startswith(("[", "{")):
        (tmp_path / "config.json").write_text(source)
        source = str(tmp_path)
    done = CliRunner().invoke(app, ["verify", "--model", source])
    assert done.exit_code == 2, done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_model_that_makes_nothing_is_no_model() -> None:
    with pytest.raises(InputError, match="must make a transformers model"):
        load_model("torch:Size")
    assert torch.Size() is not None


def test_experts_round_and_do_not_leak() -> None:
    """Tokens of other documents are asked of the same expert at once, and their last bits move."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    kind: Any = transformers.AutoConfig
    model: Any = transformers.AutoModelForCausalLM
    mixtral = model.from_config(kind.for_model("mixtral", **sizes, **heads)).eval()
    for parity in ringattn.simulate(lambda mesh: compare(mixtral, mesh, DOCUMENTS), ring=2).results:
        assert parity.passed, parity
