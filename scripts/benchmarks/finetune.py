"""A Hugging Face model trained on long text over two replicas of two ranks with DeepSpeed's ZeRO-2, and on one rank.

The text is the source of Python's standard library, as bytes; both runs see the same samples, two a step. Their loss
curves are drawn into one picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM

import ringattn
from ringattn.integrations.huggingface import Attached, attach
from ringattn.trainer.data import Corpus, read_corpus
from ringattn.training import clip_grad_norm, total
from scripts.benchmarks.teams import Team, Worker

REPLICAS, RING = 2, 2
RATE = 2e-3
CLIP = 1.0
PICTURE = Path(__file__).parents[2] / ".pictures" / "finetune.png"


def prepare(worker: Worker, layers: int, width: int) -> tuple[int, dict[str, int]]:
    """The model, attached to this rank's mesh; its parameters and the mesh's axes."""
    mesh = ringattn.init() if worker.size == 1 else ringattn.init(ring=RING)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    worker.kept = {"attached": attach(model, mesh), "optimizer": optimizer, "corpus": Corpus(read_corpus(None)[0], 0)}
    if worker.size > 1:
        from ringattn.integrations.deepspeed import initialize

        settings = {
            "zero_optimization": {"stage": 2},
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        worker.kept["engine"] = initialize(model, mesh, settings, optimizer=optimizer)
    return sum(parameter.numel() for parameter in model.parameters()), mesh.axes


def step(worker: Worker, number: int, length: int) -> float:
    """One optimizer step on two samples; the mean loss over their labels."""
    attached: Attached = worker.kept["attached"]
    mesh, corpus = attached.mesh, worker.kept["corpus"]
    mine = range(number * REPLICAS + mesh.coordinates["data"], (number + 1) * REPLICAS, mesh.data)
    packs = [corpus.pack(i, length) for i in mine]
    given = [attached.batch(p.tokens, labels=p.tokens, document_lengths=p.documents) for p in packs]
    if worker.size > 1:
        engine, factor = worker.kept["engine"]
        (arguments,) = given
        loss = engine(**arguments).loss
        engine.backward(loss / factor)
        engine.step()
        return float(total(loss, mesh))
    return _alone(attached, worker.kept["optimizer"], given)


def _alone(attached: Attached, optimizer: torch.optim.Optimizer, given: list[dict[str, Any]]) -> float:
    """All samples of a step, one after the other, on one rank."""
    count, mean = sum(int(arguments["num_items_in_batch"]) for arguments in given), 0.0
    for arguments in given:
        loss = attached.model(**{**arguments, "num_items_in_batch": count}).loss
        loss.backward()
        mean += loss.item()
    clip_grad_norm(attached.model, CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return mean


def run(ranks: int, given: argparse.Namespace, console: Console) -> list[float]:
    """The losses of a run."""
    losses, threads = [], max(1, given.threads // ranks)
    with Team(ranks, threads) as team:
        size, axes = team.call(prepare, given.layers, given.width)[0]
        label = f"{ranks} ranks, {axes}" if ranks > 1 else "one rank"
        console.print(f"{label}: {size:,} parameters, {given.length:,} bytes a sample", highlight=False)
        started = time.perf_counter()
        with Progress(console=console, transient=True) as progress:
            for number in progress.track(range(given.steps), description=label):
                losses.append(team.call(step, number, given.length)[0])
        taken = (time.perf_counter() - started) / given.steps
        console.print(f"{label}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {taken:.1f} s a step", highlight=False)
    return losses


def draw(curves: dict[str, list[float]], length: int, path: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (label, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=label, linewidth=3 if style == "-" else 1.5)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=f"A Llama trained on {length:,}-byte samples, twice")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="bytes of a sample (default 8192)")
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps (default 25)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 64 (default 256)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all ranks together")
    parser.add_argument("--draw", type=Path, default=PICTURE, help="where to draw the curves (default: the README's)")
    given = parser.parse_args()

    console = Console()
    sharded = run(REPLICAS * RING, given, console)
    alone = run(1, given, console)
    draw({f"ZeRO-2, {REPLICAS} replicas of {RING} ranks": sharded, "one rank": alone}, given.length, given.draw)
    difference = max(abs(a - b) / b for a, b in zip(sharded, alone, strict=True))
    console.print(f"largest relative difference of the loss: {difference:.1e}; drawn in {given.draw}", highlight=False)


if __name__ == "__main__":
    main()
