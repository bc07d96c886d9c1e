"""What test_trainer.py launches: the same training on one process without ringattn, and on as many as torchrun starts.

python trainer_script.py FILE
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

import ringattn
from ringattn.integrations.huggingface import Repeated, attach
from tests.integrations.huggingface_models import build, sample

STEPS = 10
LENGTH = 23
LAUNCHED = "RANK" in os.environ


def dataset() -> list[dict[str, Tensor]]:
    """Samples of one length, so that the plain Trainer needs no padding, with labels on some of their tokens."""
    rows = sample(LENGTH, rows=48, seed=5)
    return [
        {"input_ids": row, "labels": torch.where(torch.arange(LENGTH) % (2 + i % 3) == 0, -100, row)}
        for i, row in enumerate(rows)
    ]


def train(
    mesh: ringattn.Mesh, *, lora: bool = False, accumulate: int = 1, repeated: bool = False, zero: int | None = None
) -> list[dict[str, float]]:
    """What the stock Trainer logs."""
    model, data = _model(lora), dataset()
    more: dict[str, Any] = {"train_dataset": data, "eval_dataset": data[:4]}
    if repeated:
        more = {name: Repeated(each, mesh) for name, each in more.items()}
    together = 1 if repeated else 2  # samples of a batch, on all ranks
    if LAUNCHED:
        attached = attach(model, mesh)
        more["data_collator"] = functools.partial(attached.collate, scatter=not repeated)
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": max(1, together // mesh.size),
        "per_device_eval_batch_size": max(1, together // mesh.size),
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential" if repeated else "random",
        "prediction_loss_only": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if zero is not None and LAUNCHED:
        arguments["deepspeed"] = _deepspeed(zero)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(output_dir=folder, **arguments)
        trainer: Any = transformers.Trainer(model=model, args=args, **more)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
    logs = [{key: log[key] for key in ("loss", "grad_norm")} for log in trainer.state.log_history if "loss" in log]
    return [*logs, {"evaluated": evaluated}]


def _deepspeed(stage: int) -> dict[str, Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and is of no use here
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {**dict.fromkeys(auto, "auto"), **own, "zero_optimization": {"stage": stage}}


def _model(lora: bool) -> Any:
    model: Any = build("llama")
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def accelerated(mesh: ringattn.Mesh) -> list[dict[str, float]]:
    """A loop of one's own with Accelerate, which averages gradients over processes."""
    accelerator, model = Accelerator(cpu=True), _model(lora=False)
    attached = attach(model, mesh)
    size = max(1, 2 // mesh.size)
    data: Any = dataset()
    loader: Any = torch.utils.data.DataLoader(data, batch_size=size, collate_fn=attached.collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    logs = []
    for batch, _ in zip(loader, range(STEPS), strict=False):
        optimizer.zero_grad()
        loss = model(**batch).loss  # this rank's share
        accelerator.backward(loss * accelerator.num_processes)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        logs.append({"loss": float(accelerator.reduce(loss.detach(), "sum")), "grad_norm": float(norm)})
    return logs


def main(file: str) -> None:
    torch.set_num_threads(1)
    mesh = ringattn.init()
    found = {
        "the Trainer": train(mesh),
        "LoRA, accumulated": train(mesh, lora=True, accumulate=3),
        "the same sample": train(mesh, repeated=True),
        "Accelerate": accelerated(mesh),
        "ZeRO-3, accumulated": train(mesh, accumulate=2, zero=3),
    }
    if mesh.rank == 0:
        torch.save(found, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
