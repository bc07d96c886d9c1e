"""Train a language model on long text, its attention sharded over ranks: exactly the model of one rank.

    python launch/train.py                                        four ranks on this machine, 16,384 tokens
    python launch/train.py --help                                 every option
    torchrun --nproc-per-node 8 launch/train.py --length 131072   or any launcher, on any number of nodes

This file is meant to be copied. `main` starts the ranks, `train` is an ordinary training loop, and the five
things that sequence parallelism asks of it are marked (1) to (5). Model, data and bookkeeping are in
`ringattn/trainer`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ringattn
from ringattn.rendezvous import Launch
from ringattn.trainer.config import Config, launched, run_command
from ringattn.trainer.data import Corpus, read_corpus
from ringattn.trainer.launcher import cores, end_with_launcher, start_ranks
from ringattn.trainer.meter import Meter
from ringattn.trainer.model import Decoder
from ringattn.trainer.parity import TOLERANCE, Trace, compare
from ringattn.trainer.recorder import Recorder
from ringattn.trainer.run_folder import RunFolder, load
from ringattn.trainer.sampling import generate
from ringattn.trainer.stopping import Stop
from ringattn.trainer.wrapping import Plain, wrap
from ringattn.training import Batch, Sample, accumulate, check_finite, checkpoint, token_loss, total

CHECK_RATE = 0.1  # of SGD: enough to move every parameter within a few steps
UNCLIPPED = 1e30
KEPT = 2  # checkpoints


def main(config: Config, arguments: Sequence[str]) -> int:
    """The exit code: 0, or 1 when --check finds a difference. Bad input has been refused before this."""
    if config.sample is not None:
        return sample(config)
    # Data is read before anything is started or connected: if it is missing, nobody waits for this rank.
    train_files, held_out_files = read_corpus(config.data)
    if config.world > 1 and not launched():
        return start_ranks(Path(__file__), config.world, arguments)

    corpus, held_out = Corpus(train_files, config.seed), Corpus(held_out_files, 0)
    mesh, device = connect(config)
    try:
        folder = train(config, mesh, device, corpus, held_out) if config.steps else None
        code = check(config, mesh, device, corpus) if config.check else 0
        if folder is not None:
            print(f"Metrics, loss.png and weights are in {folder.path}; for text from these weights:")
            print(f"    ringattn train --sample 'def ' --folder {folder.path}")
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def connect(config: Config) -> tuple[ringattn.Mesh, torch.device]:
    """(1) The mesh: which ranks share a sequence, and how they talk. One process needs no launcher."""
    launch = Launch.found(os.environ)
    if launch.launcher in ("torchrun", "deepspeed"):  # which leave their ranks behind when they are killed
        end_with_launcher()
    on_gpu = torch.cuda.device_count() >= launch.local_world
    if not launch.started:
        mesh = ringattn.init(transport="local", profile=config.profile)
    else:
        # Gloo, though there are GPUs, fewer than ranks: NCCL wants one each. And where mpirun starts wrappers, which
        # are torch.distributed's: MPI is what auto takes there.
        of_torch = not on_gpu and (torch.cuda.is_available() or config.wrap != "none")
        transport: Literal["auto", "gloo"] = "gloo" if of_torch else "auto"
        mesh = ringattn.init(
            config.ring, config.ulysses, transport=transport, timeout=config.timeout, profile=config.profile
        )
    return mesh, torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def shard_loss(model: Callable[..., Tensor], batch: Batch, config: Config) -> Tensor:
    """This rank's share of the mean token loss; 0 where it has no labels or no tokens."""
    # (3) Attention looks over the whole sequence. All other layers work on the tokens they are given.
    attend = partial(batch.attend, schedule=config.schedule, kernel=config.kernel)
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        logits = model(batch.tokens, batch.positions, attend)
    # (4) A share of the mean over the labels of the whole batch. A mean over a shard would weigh shards instead of
    # tokens, and have no value on a shard without labels.
    return token_loss(logits, batch)


def gradients(model: Plain, packs: list[Sample], config: Config, asked: bool = False) -> tuple[Tensor, bool]:
    """Leaves the gradient of the mean loss over all labels in the model; returns that loss, on every rank.

    And whether any rank was asked to stop: the sum of the losses has room for that, and so all stop after one step.
    """
    batches = sharded(packs, model.mesh, config)
    share = torch.tensor([0.0, asked], device=batches[0].tokens.device)
    for batch in batches:
        loss = shard_loss(model, batch, config)
        # (5) Every rank has the gradient of its share of the loss: the gradient is their sum, not their average.
        # Wrappers average; `ringattn/trainer/wrapping.py` has what makes each of them right.
        model.backward(loss, last=batch is batches[-1])
        share[0] += loss.detach()
    whole, stopping = total(share, model.mesh)
    return whole, bool(stopping)


@torch.no_grad()
def evaluate(model: Plain, packs: list[Sample], config: Config) -> float:
    """The mean loss over all labels, the same on every rank."""
    batches = sharded(packs, model.mesh, config)
    share = torch.zeros((), device=batches[0].tokens.device)
    for batch in batches:
        share += shard_loss(model, batch, config)
    return float(total(share, model.mesh))


def sharded(packs: list[Sample], mesh: ringattn.Mesh, config: Config) -> list[Batch]:
    """(2) This rank's part of tokens and labels. Labels are shifted in the full pack, and counted over all ranks.

    Ranks that share a sequence get the same packs, replicas different ones.
    """
    mine = packs[mesh.coordinates["data"] :: mesh.axes["data"]]
    return accumulate(Batch(pack, mesh, layout=config.layout, positions=config.positions) for pack in mine)


def batch_of(corpus: Corpus, step: int, config: Config) -> list[Sample]:
    """The packs of a step, a function of the step alone: nothing to communicate, nothing to remember."""
    return [corpus.pack(step * config.batch + i, config.length) for i in range(config.batch)]


def train(
    config: Config, mesh: ringattn.Mesh, device: torch.device, corpus: Corpus, held_out: Corpus
) -> RunFolder | None:
    """An ordinary training loop; every rank runs it in step with the others. Returns rank 0's run folder."""
    model = wrapped(mesh, device, config, partial(build_optimizer, config=config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(model.optimizer, partial(learning_rate, config=config))
    # Replicas take packs in turn, and all of them as many.
    count = math.ceil(config.eval_packs / mesh.data) * mesh.data
    held_out_packs = [held_out.pack(i, config.length) for i in range(count)]
    start = resumed(model, scheduler, config)
    held_out_loss = evaluate(model, held_out_packs, config)  # now every rank has seen that the folder is free
    folder = RunFolder(config.folder, dataclasses.asdict(config), start) if mesh.rank == 0 else None
    meter = Meter(mesh, device)

    with Recorder(folder, config.steps) as recorder, Stop(heeded=config.save_every > 0) as stop:
        size = sum(parameter.numel() for parameter in Decoder(config.shape, 0).parameters())
        recorder.say(f"{mesh.size} ranks on {device.type}, {config.length:,} tokens of context, {size:,} parameters")
        if start == 0:
            recorder.held_out(0, held_out_loss, model.weights())
        for step in range(start + 1, config.steps + 1):
            meter.restart()
            with check_finite(mesh, step, model.module) if config.check_finite else nullcontext():
                loss, stopping = gradients(model, batch_of(corpus, step, config), config, stop.asked)
            rate, norm = float(scheduler.get_last_lr()[0]), model.step()
            scheduler.step()
            measured = {"loss": float(loss), "gradient_norm": norm, "learning_rate": rate, "ranks": mesh.size}
            recorder.step(step, config.batch * config.length, meter.lap(), **measured)
            if step % config.eval_every == 0 or step == config.steps:
                recorder.held_out(step, evaluate(model, held_out_packs, config), model.weights())
            if config.save_every and (step % config.save_every == 0 or step == config.steps or stopping):
                state = scheduler.state_dict()
                checkpoint.save(config.checkpoints, **model.saved, step=step, data=state, mesh=mesh, keep=KEPT)
            if stopping:
                recorder.say(f"step {step:>4}  saved, and stopped by SIGTERM; --resume auto goes on")
                sys.exit(stop.exit_code())
    return folder


def resumed(model: Plain, scheduler: torch.optim.lr_scheduler.LambdaLR, config: Config) -> int:
    """Loads the checkpoint of --resume, of any number of ranks and wrapper; its step, or 0 to begin."""
    source = config.source
    if source is None or (config.resume == "auto" and checkpoint.last(source, model.mesh) is None):
        return 0
    state = checkpoint.load(source, **model.saved, mesh=model.mesh)
    scheduler.load_state_dict(state.data)
    return state.step


def wrapped(
    mesh: ringattn.Mesh, device: torch.device, config: Config, optimize: Callable[[nn.Module], torch.optim.Optimizer]
) -> Plain:
    """The model with what --wrap puts around it."""
    model = Decoder(config.shape, config.seed, config.checkpoint_activations).to(device)
    if config.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    return wrap(model, mesh, config, optimize)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr)
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1)


def learning_rate(step: int, config: Config) -> float:
    """The factor of the peak rate: linear warm-up, then half a cosine down to a tenth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def check(config: Config, mesh: ringattn.Mesh, device: torch.device, corpus: Corpus) -> int:
    """Repeats the first steps on all ranks and on one; compares losses, gradients and parameters.

    Adam would hide a wrong scale of the gradients: it divides by their size. Plain SGD shows it.
    """
    sharded = sgd_steps(config, mesh, device, corpus)
    failed = torch.zeros((), device=device)
    if mesh.rank == 0:
        torch.set_num_threads(cores())  # the other ranks only wait
        alone = sgd_steps(dataclasses.replace(config, wrap="none"), ringattn.init(transport="local"), device, corpus)
        difference = compare(sharded, alone)
        verdict = "equal" if difference.largest <= TOLERANCE else "NOT EQUAL"
        print(difference.table())
        print(
            f"check: {config.check} SGD steps of {config.length:,} tokens on {mesh.size} ranks and on 1 are "
            f"{verdict} (tolerance {TOLERANCE:g}). Largest relative differences: loss {difference.loss:.1e}, "
            f"gradients {max(difference.gradients.values()):.1e}, "
            f"parameters {max(difference.parameters.values()):.1e}"
        )
        failed += difference.largest > TOLERANCE
    return int(total(failed, mesh))  # one verdict, and nobody leaves while rank 0 is at work


def sgd_steps(config: Config, mesh: ringattn.Mesh, device: torch.device, corpus: Corpus) -> Trace:
    """The first --check steps of plain SGD from the initial weights, unclipped: the same code on any mesh."""
    model, trace = wrapped(mesh, device, dataclasses.replace(config, clip=UNCLIPPED), sgd), Trace()
    for step in range(1, config.check + 1):
        loss, _ = gradients(model, batch_of(corpus, step, config), config)
        trace.add(loss, model.gradients())
        model.step()
    trace.close(model.weights())
    return trace


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=CHECK_RATE)


def sample(config: Config) -> int:
    """Prints text from a run's weights. One process is enough, and the model does not know the difference."""
    assert config.folder is not None and config.sample is not None  # validated
    model, length = load(config.folder)
    text = generate(
        model,
        config.sample.encode(),
        config.sample_bytes,
        context=length,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    print(config.sample + text.decode(errors="replace"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
