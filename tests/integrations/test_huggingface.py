"""Hugging Face models on Gloo ranks against themselves in one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from transformers.trainer_pt_utils import LabelSmoother

import ringattn
from ringattn import Mesh
from ringattn.errors import InputError, RingAttentionError, UnsupportedError
from ringattn.integrations.architectures import reaches
from ringattn.integrations.huggingface import Repeated, attach, sharding_of
from ringattn.trainer.parity import relative
from ringattn.training import save_attention, sum_gradients, total
from tests.integrations.huggingface_models import CONFIGS, MORE, build, sample
from tests.workers import Workers

LIMIT = 1e-5
EXPERTS = ("deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe")
DOCUMENTS = (11, 1, 18, 7)


def reference(name: str, ids: Tensor, documents: tuple[int, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of a model that sees one document at a time: nothing is packed, no mask is asked."""
    model = build(name)
    logits = torch.cat([model(input_ids=part).logits for part in ids.split(documents, 1)], 1)
    loss = loss_of(logits, ids, documents, shift=name != "modernbert")
    loss.backward()
    return logits.detach(), loss.detach(), gradients(model)


def loss_of(logits: Tensor, ids: Tensor, documents: tuple[int, ...], *, shift: bool = True) -> Tensor:
    parts = ids.split(documents, 1)
    labels = torch.cat([functional.pad(part[:, 1:], (0, 1), value=-100) if shift else part for part in parts], 1)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(mesh: Mesh, name: str, ids: Tensor, lengths: tuple[int, ...] | None) -> dict[str, Any]:
    """Logits, loss and gradients of the sharded model, and what it generates before, attached and after."""
    model = build(name)
    generated = [_generated(model, ids)]
    attached = attach(model, mesh)
    batch = attached.batch(ids, labels=ids, document_lengths=lengths)
    out = model(**batch)
    out.loss.backward()
    sum_gradients(model, mesh)
    sharding = sharding_of(batch)
    generated.append(_generated(model, ids))
    attached.detach()
    generated.append(_generated(model, ids))
    return {
        "logits": sharding.join(out.logits.detach(), 1),
        "loss": total(out.loss, mesh),
        "gradients": gradients(model),
        "generated": generated,
        "implementation": model.config._attn_implementation,
    }


def _generated(model: Any, ids: Tensor) -> Tensor | None:
    """Of two prompts, the shorter one padded on its left."""
    if not model.can_generate():
        return None
    prompts, mask = ids[:, :12].reshape(2, 6).clone(), torch.ones(2, 6, dtype=torch.int64)
    prompts[1, :2] = mask[1, :2] = 0
    found: Tensor = model.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return found


EVERY = [(name, size, packed) for name in CONFIGS for size in (2, 3) for packed in (False, True)]


@pytest.mark.parametrize(("name", "size", "packed"), [*EVERY, *((name, 3, True) for name in MORE)])
def test_a_sharded_model_is_the_model(gloo: Workers, name: str, size: int, packed: bool) -> None:
    ids = sample(sum(DOCUMENTS))
    logits, loss, expected = reference(name, ids, DOCUMENTS if packed else (ids.shape[1],))
    for got in gloo.run(size, step, name, ids, DOCUMENTS if packed else None):
        assert relative(got["logits"], logits) <= LIMIT
        assert relative(got["loss"], loss) <= LIMIT
        assert got["gradients"].keys() == expected.keys()
        assert max(relative(got["gradients"][key], expected[key]) for key in expected) <= LIMIT
        before, during, after = got["generated"]
        assert before is None or (torch.equal(before, during) and torch.equal(before, after))
        assert not got["implementation"].startswith("ringattn")


def probe(mesh: Mesh, name: str, ids: Tensor) -> Tensor:
    """Which tokens' logits change by any bit when a token of the first document does.

    Experts that take their tokens together round each by how many those are; here they take each by itself.
    """
    experts = {"experts_implementation": "batched_mm"} if name in EXPERTS else {}
    model: Any = build(name, **experts)
    attached = attach(model, mesh)
    found = []
    for token in (3, 4):
        ids[0, DOCUMENTS[0] // 2] = token
        batch = attached.batch(ids, document_lengths=DOCUMENTS)
        with torch.no_grad():
            logits = model(**batch).logits
        found.append(sharding_of(batch).join(logits, 1))
    changed: Tensor = found[0] != found[1]
    return changed.any(-1)[0]


def test_every_known_model_is_tested() -> None:
    with pytest.raises(UnsupportedError) as refusal:
        reaches(transformers.FalconConfig())
    known = re.findall(r"attaches to (.*); got", str(refusal.value))[0].split(", ")
    assert sorted(known) == sorted(CONFIGS | MORE)


@pytest.mark.parametrize("name", CONFIGS | MORE)
def test_no_bit_of_a_document_moves_with_another(gloo: Workers, name: str) -> None:
    for moved in gloo.run(3, probe, name, sample(sum(DOCUMENTS))):
        assert moved[DOCUMENTS[0] // 2]
        assert not moved[DOCUMENTS[0] :].any()


def ways_to_say_documents(mesh: Mesh) -> list[tuple[Tensor, Tensor]]:
    """Loss and tokens of the same two packed rows, told in three ways; each row's own documents are alike."""
    model, ids = build("llama"), sample(24, rows=2)
    attached = attach(model, mesh)
    positions = torch.cat([torch.arange(n) for n in (5, 19)])[None]
    told: list[dict[str, Any]] = [
        {"document_lengths": [5, 19]},
        {"position_ids": positions},
        {"document_lengths": [[5, 19]] * 2},
        {"document_lengths": [5, 19], "attention_mask": torch.ones_like(ids)},
    ]
    batches = [attached.batch(ids, labels=ids, **each) for each in told]
    return [(total(model(**batch).loss, mesh), batch["input_ids"]) for batch in batches]


def test_documents_are_told_by_lengths_or_positions(gloo: Workers) -> None:
    for found in gloo.run(2, ways_to_say_documents):
        losses, tokens = zip(*found, strict=True)
        assert all(relative(loss, losses[0]) <= 1e-6 for loss in losses)
        assert torch.equal(tokens[0], tokens[1]) and tokens[2].shape[0] == 1


def accumulated(mesh: Mesh) -> dict[str, Tensor]:
    """Gradients of two batches of other lengths, one mean over the tokens of both."""
    model, parts = build("llama"), sample(40).split([31, 9], 1)
    attached = attach(model, mesh)
    batches = [attached.batch(part, labels=part) for part in parts]
    count = sum(batch["num_items_in_batch"] for batch in batches)
    for batch in batches:
        model(**{**batch, "num_items_in_batch": count}).loss.backward()
    sum_gradients(model, mesh)
    return gradients(model)


def test_accumulated_batches_are_one_mean(gloo: Workers) -> None:
    _, _, expected = reference("llama", sample(40), (31, 9))
    for found in gloo.run(2, accumulated):
        assert max(relative(found[key], expected[key]) for key in expected) <= LIMIT


WAYS: list[dict[str, Any]] = [
    {"layout": "contiguous", "schedule": "ring"},
    {"layout": "striped", "schedule": "route"},
    {"layout": "zigzag", "kernel": "reference"},
    {"layout": ringattn.Explicit([[(0, 3), (9, 20)], [(3, 9)], [(20, 37)]])},
    {"layout": "zigzag", "schedule": ringattn.Ulysses("ring", slices=2)},
    {"schedule": "ulysses"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["gemma2", "llama4_text"])
def test_any_layout_schedule_and_kernel(name: str, way: dict[str, Any]) -> None:
    def run(mesh: Mesh) -> Tensor:
        model: Any = build(name)
        batch = attach(model, mesh, **way).batch(ids, document_lengths=DOCUMENTS)
        return sharding_of(batch).join(model(**batch).logits.detach(), 1)

    ids = sample(sum(DOCUMENTS))
    logits, _, _ = reference(name, ids, DOCUMENTS)
    two_axes = "ulysses" in str(way.get("schedule"))
    for found in ringattn.simulate(run, ring=2 if two_axes else 3, ulysses=2 if two_axes else 1).results:
        assert relative(found, logits) <= LIMIT


def rows(mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Logits and loss of two rows."""
    model, ids = build("gemma3_text"), sample(29, rows=2)
    batch = attach(model, mesh).batch(ids, labels=ids)
    out: Any = model(**batch)
    return sharding_of(batch).join(out.logits.detach(), 1), total(out.loss, mesh)


def test_rows_are_sequences_of_their_own(gloo: Workers) -> None:
    ids = sample(29, rows=2)
    out = build("gemma3_text")(input_ids=ids, labels=ids)
    for logits, loss in gloo.run(3, rows):
        assert relative(logits, out.logits.detach()) <= LIMIT
        assert relative(loss, out.loss.detach()) <= LIMIT


def two_meshes(mesh: Mesh) -> list[Tensor]:
    """Losses of two models in one process, one over all ranks and one over this rank alone, their steps interleaved."""
    ids = sample(30)
    wide, alone = attach(build("mistral"), mesh), attach(build("gemma2"), Mesh.local())
    losses = []
    for _ in range(2):
        for attached in (wide, alone):
            batch = attached.batch(ids, labels=ids, document_lengths=[12, 18])
            losses.append(total(attached.model(**batch).loss, attached.mesh))
    wide.detach()
    losses.append(total(alone.model(**alone.batch(ids, labels=ids, document_lengths=[12, 18])).loss, alone.mesh))
    return losses


def test_two_models_on_different_meshes(gloo: Workers) -> None:
    ids = sample(30)
    expected = [reference(name, ids, (12, 18))[1] for name in ("mistral", "gemma2")]
    for losses in gloo.run(2, two_meshes):
        assert all(
            relative(loss, right) <= LIMIT for loss, right in zip(losses, [*expected * 2, expected[1]], strict=True)
        )


def test_a_model_that_shares_the_config_is_not_attached() -> None:
    model, ids = build("llama"), sample(12)
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    expected = other(input_ids=ids, labels=ids).loss
    attached = attach(model, Mesh.local())
    assert torch.equal(other(input_ids=ids, labels=ids).loss, expected)
    with pytest.raises(InputError, match="already attached"):
        attach(other, Mesh.local())
    attached.detach()
    attach(other, Mesh.local()).detach()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_saved_models_do_not_know(tmp_path: Path, implementation: str) -> None:
    model = build("llama", attn_implementation=implementation)
    model.save_pretrained(tmp_path / "before")
    attached = attach(model, Mesh.local())
    model.save_pretrained(tmp_path / "attached")
    before, saved = ((tmp_path / folder / "config.json").read_text() for folder in ("before", "attached"))
    assert saved == before
    loaded = type(model).from_pretrained(tmp_path / "attached")
    assert not loaded.config._attn_implementation.startswith("ringattn")
    attached.detach()
    assert model.config._attn_implementation == implementation


def test_a_batch_for_an_attached_model_is_refused_by_others() -> None:
    for implementation in ("eager", "sdpa"):
        model = build("llama", attn_implementation=implementation)
        attached = attach(model, Mesh.local())
        batch = attached.batch(sample(12))
        attached.detach()
        with pytest.raises((AttributeError, TypeError), match="ShardedMask"):
            model(**batch)
        with pytest.raises(InputError, match="not attached"):
            attached.batch(sample(12))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "longest position"),
    "longrope": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 2.0,
                "rope_theta": 1e4,
                "long_factor": [1.0] * 4,
                "short_factor": [1.0] * 4,
                "original_max_position_embeddings": 32,
            }
        },
        "longest position",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_cannot_be_sharded(name: str) -> None:
    options, why = REFUSED[name]
    with pytest.raises(UnsupportedError, match=why):
        attach(build("llama", **options), Mesh.local())


def test_models_that_cannot_be_sharded() -> None:
    hf: Any = transformers
    sizes: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    bart = hf.BartForConditionalGeneration(hf.BartConfig(**sizes, max_position_embeddings=32))
    with pytest.raises(UnsupportedError, match=r"bart.*cross-attention"):
        attach(bart, Mesh.local())
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    falcon = hf.FalconForCausalLM(hf.FalconConfig(**small, num_hidden_layers=1))
    with pytest.raises(UnsupportedError, match=r"'falcon'.*nobody has tested"):
        attach(falcon, Mesh.local())
    for kind in (hf.LlamaForSequenceClassification, hf.LlamaForTokenClassification):
        with pytest.raises(UnsupportedError, match="whole sequences, or its loss is a mean"):
            attach(kind(build("llama").config), Mesh.local())
    model: Any = build("llama")
    model.loss_function = lambda *_, **__: None
    with pytest.raises(UnsupportedError, match="no loss that is a sum"):
        attach(model, Mesh.local()).batch(sample(8), labels=sample(8))
    with pytest.raises(InputError, match="got 'Linear'"):
        attach(torch.nn.Linear(1, 1), Mesh.local())
    with pytest.raises(UnsupportedError, match="router"):
        attach(build("gpt_oss", output_router_logits=True), Mesh.local())
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        attach(build("gemma3_text", use_bidirectional_attention=True), Mesh.local())


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # by transformers, for cache
def test_batches_that_cannot_be_sharded() -> None:
    attached, ids = attach(build("llama"), Mesh.local()), sample(12)
    padded = torch.ones_like(ids)
    padded[0, 8:] = 0
    with pytest.raises(UnsupportedError, match="padded"):
        attached.batch(ids, attention_mask=padded)
    with pytest.raises(UnsupportedError, match=r"\[1, 1, 12, 12\]"):
        attached.batch(ids, attention_mask=torch.ones(1, 1, 12, 12))
    with pytest.raises(InputError, match="got both"):
        attached.batch(ids, document_lengths=[12], position_ids=torch.arange(12)[None])
    for wrong in (torch.arange(12)[None] + 1, torch.arange(12).flip(0)[None], torch.zeros(1, 12).long().cumsum(1) + 3):
        with pytest.raises(InputError, match="must count"):
            attached.batch(ids, position_ids=wrong)
    with pytest.raises(UnsupportedError, match=r"colour=1.* Leave it out"):
        attached.model(**attached.batch(ids), colour=1)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        attached.model(**attached.batch(ids), output_attentions=True)
    out = attached.model(input_ids=ids, use_cache=True)
    name = "cache" if hasattr(out, "cache") else "past_key_values"  # by transformers' version
    with pytest.raises(UnsupportedError, match="cached keys"):
        attached.model(**{**attached.batch(ids), name: out[name]})


def test_layers_are_explained() -> None:
    attached = attach(build("gemma3_text"), Mesh.local())
    words = attached.explain(attached.batch(sample(30), document_lengths=[10, 20]))
    assert "2 layers, causal within 6 tokens:" in words and "2 layers, causal:" in words
    assert "rank 0 of 1" in words and "documents:10,20&window:6&causal" in words


def test_labels_cannot_be_shifted_again() -> None:
    model: Any = build("llama")
    batch = attach(model, Mesh.local()).batch(sample(12), labels=sample(12))
    assert torch.equal(batch["labels"][:, 1:], batch["shift_labels"])
    smoother: Any = LabelSmoother()
    with pytest.raises(RuntimeError, match="Size does not match"):
        smoother(model(**batch), batch["labels"], shift_labels=True, num_items_in_batch=batch["num_items_in_batch"])


def wrapped(mesh: Mesh, dtype: torch.dtype | None) -> list[Tensor]:
    """Losses of three steps of SGD under FSDP2, of which bfloat16 casts what each layer is given."""
    model: Any = build("gemma2")
    attached = attach(model, mesh)
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for layer in (*model.model.layers, model):
        fully_shard(layer, mp_policy=policy)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for seed in range(3):
        ids = sample(40, seed=seed)
        loss = model(**attached.batch(ids, labels=ids, document_lengths=[13, 27])).loss
        (loss * mesh.size).backward()  # FSDP2 averages
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total(loss, mesh))
    return losses


@pytest.mark.parametrize(("dtype", "limit"), [(None, LIMIT), (torch.bfloat16, 3e-3)])
def test_fsdp2(gloo: Workers, dtype: torch.dtype | None, limit: float) -> None:
    model: Any = build("gemma2")
    expected = []
    for seed in range(3):
        ids = sample(40, seed=seed)
        logits = torch.cat([model(input_ids=part).logits for part in ids.split((13, 27), 1)], 1)
        loss = loss_of(logits, ids, (13, 27))
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        expected.append(loss.detach())
    for losses in gloo.run(4, wrapped, dtype):
        assert all(relative(loss, right) <= limit for loss, right in zip(losses, expected, strict=True))


def autocast(mesh: Mesh) -> Tensor:
    model: Any = build("llama")
    batch = attach(model, mesh).batch(sample(40), labels=sample(40))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return total(loss, mesh)


def test_autocast() -> None:
    expected = build("llama")(input_ids=sample(40), labels=sample(40)).loss.detach()
    for loss in ringattn.simulate(autocast, ring=2).results:
        assert 0 < relative(loss, expected) <= 3e-3


def test_sharding_of_takes_a_sharded_batch() -> None:
    with pytest.raises(InputError, match="what Attached"):
        sharding_of({"attention_mask": None})


@pytest.mark.parametrize("scatter", [False, True])
def test_samples_that_cannot_be_collated(monkeypatch: pytest.MonkeyPatch, scatter: bool) -> None:
    good = {"input_ids": [3, 4, 5], "labels": torch.tensor([3, 4, 5])}
    wrong: list[dict[str, Any]] = [
        {**good, "position_ids": [0, 1, 2]},
        {"input_ids": [3, 4, 5]},
        {**good, "input_ids": ["a", "b", "c"]},
        {**good, "labels": [3]},
        {**good, "document_lengths": [2, 2]},
    ]

    def collated(mesh: Mesh, sample: dict[str, Any]) -> None:
        attach(build("llama"), mesh).collate([good, sample if mesh.rank else good], scatter=scatter)

    for each in wrong:
        with pytest.raises(RingAttentionError):
            ringattn.simulate(collated, each, ring=2)
    attached = attach(build("llama"), Mesh.local())
    with pytest.raises(InputError, match="remove_unused_columns"):
        attached.collate([wrong[0]])
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker's")
    with pytest.raises(InputError, match="num_workers=0"):
        attached.collate([good])


def test_samples_become_documents() -> None:
    def collated(mesh: Mesh) -> Tensor:
        samples: list[dict[str, Any]] = [
            {"input_ids": [3, 4, 5, 6, 7], "document_lengths": [2, 3]},
            {"input_ids": torch.tensor([8])},
        ]
        batch = attach(build("llama"), mesh).collate(samples[mesh.rank :])
        sharding = sharding_of(batch)
        return torch.stack([sharding.join(batch[name], 1)[0] for name in ("input_ids", "position_ids")])

    for found in ringattn.simulate(collated, ring=2).results:
        assert found.tolist() == [[3, 4, 5, 6, 7, 8, 8], [0, 1, 0, 1, 2, 0, 0]]


def test_repeated_samples() -> None:
    mesh, data = Mesh(ring=2, data=2), list(range(7))
    repeated = Repeated(data, mesh, batch_size=2, seed=None)
    batches = [[repeated[i * 2 + j] for j in range(2)] for i in range(len(repeated) // 2)]
    assert batches == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]  # of ranks 0 to 3, and 0 and 1 again
    shuffled = Repeated(data, mesh)
    first = [shuffled[i] for i in range(len(shuffled))]
    shuffled.set_epoch(1)
    second = [shuffled[i] for i in range(len(shuffled))]
    assert first != second and sorted(first) == sorted(second) == sorted(data * 2)
    assert first[::2] == first[1::2]


def test_an_empty_shard_is_refused_on_every_rank() -> None:
    def short(mesh: Mesh) -> str:
        with pytest.raises(UnsupportedError) as refusal:
            attach(build("llama"), mesh).batch(sample(2))
        return str(refusal.value)

    assert set(ringattn.simulate(short, ring=3).results) == {
        "2 tokens on 3 ranks leave some without any, which transformers' layers cannot take: pack more, or use fewer "
        "ranks."
    }


def test_what_one_rank_refuses_all_ranks_hear_of() -> None:
    def padded(mesh: Mesh) -> None:
        ids = sample(12)
        mask = torch.ones_like(ids)
        mask[0, 9:] = mesh.rank != 1
        attach(build("llama"), mesh).batch(ids, attention_mask=mask)

    with pytest.raises(RingAttentionError, match="padded"):
        ringattn.simulate(padded, ring=3)


def checkpointed(mesh: Mesh, way: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients with attention dropout, by transformers' own switch for checkpointing."""
    model: Any = build("llama", attention_dropout=0.2).train()
    attached = attach(model, mesh)
    if way != "none":
        more = {"context_fn": save_attention()} if way == "attention saved" else {}
        name = "activation_checkpointing_enable"  # in transformers before 5.23 under the other name
        getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False, **more})
    ids = sample(40)
    loss = model(**attached.batch(ids, labels=ids, document_lengths=[13, 27])).loss
    loss.backward()
    return loss.detach(), gradients(model)


def test_checkpointing_repeats_nothing_where_attention_is_saved() -> None:
    done = {way: ringattn.simulate(checkpointed, way, ring=2) for way in ("none", "everything", "attention saved")}
    for run in done.values():
        for (loss, found), (right, expected) in zip(run.results, done["none"].results, strict=True):
            assert torch.equal(loss, right)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    sent = {way: [(each.messages, each.sent_bytes) for each in run.traffic] for way, run in done.items()}
    assert sent["attention saved"] == sent["none"]
    assert sent["everything"][0][0] > sent["none"][0][0]


PACKS = ([40], [13, 27], [1, 39], [10, 10, 20], [5, 35], [39, 1], [20, 20], [7, 7, 7, 19])


def compiled(mesh: Mesh, name: str) -> tuple[int, list[tuple[Tensor, Tensor]], float]:
    """Graphs, losses eager and compiled, and the largest difference of gradients, over packed batches."""
    torch.compiler.reset()
    model: Any = build(name)
    attached, counter = attach(model, mesh), CompileCounter()
    graph = torch.compile(model, fullgraph=True, backend=counter)
    losses, worst = [], 0.0
    for seed, pack in enumerate(PACKS):
        ids = sample(40, seed=seed)
        batch = attached.batch(ids, labels=ids, document_lengths=pack)
        found = []
        for each in (model, graph):
            model.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            found.append((total(loss, mesh), gradients(model)))
        losses.append((found[0][0], found[1][0]))
        worst = max(worst, *(relative(found[1][1][key], found[0][1][key]) for key in found[0][1]))
    return counter.frame_count, losses, worst


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_for_all_packs(name: str) -> None:
    graphs, losses, worst = compiled(Mesh.local(), name)
    assert graphs == 1 and worst <= 1e-6
    assert all(torch.equal(eager, graph) for eager, graph in losses)


def test_compiled_on_two_ranks(gloo: Workers) -> None:
    for graphs, losses, worst in gloo.run(2, compiled, "llama"):
        assert graphs == 1 and worst <= 1e-6
        assert all(torch.equal(eager, graph) for eager, graph in losses)
