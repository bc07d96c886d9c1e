"""The functions of `ringattn.training`, and the kinds of their arguments."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import ringattn
from ringattn import training
from ringattn.training import checkpoint
from tests.fuzzing.kinds import (
    FLAG,
    LAST,
    LAYOUTS,
    LENGTH,
    LENGTHS,
    MASKS,
    MESH,
    SCHEDULES,
    TENSOR,
    Call,
    Kind,
    instance_of,
    integer,
    real,
    word,
)


def calls_of_training() -> Iterator[Call]:
    def rows(x: Any) -> bool:
        whole = isinstance(x, torch.Tensor) and x.dim() == 2 and not x.is_floating_point()
        return whole and not x.is_complex() and x.dtype != torch.bool

    tokens, mesh = torch.arange(24).view(2, 12) % 5, Kind((MESH,), lambda x: isinstance(x, ringattn.Mesh))
    layers = [ringattn.Causal(), ringattn.Window(3)]
    sample = {
        "tokens": Kind((tokens,), rows),
        "documents": Kind((None, [5, 7], [[12], [3, 9]], torch.tensor([12])), LENGTHS.optional.may_be),
        "labels": Kind((None, tokens), lambda x: x is None or rows(x)),
        "mask": Kind((None, ringattn.Causal(), layers), lambda x: x is None or x is layers or MASKS.may_be(x)),
        "shift": FLAG,
    }
    layout = Kind(("auto", "zigzag", ringattn.Striped()), LAYOUTS.may_be)
    more = {"mesh": mesh, "layout": layout, "scatter": FLAG, "positions": word("document")}
    yield Call("Batch", training.Batch, {**sample, **more})
    yield Call("Sample.of", training.Sample.of, {**sample, "joined": FLAG})
    batch = training.Batch(tokens, MESH)
    batches = Kind(([batch],), lambda x: isinstance(x, (list, tuple)) and bool(x))
    yield Call("accumulate", training.accumulate, {"batches": batches})
    weights = {"label_smoothing": real(0, 1, 0.0, 0.1), "z_loss": real(0, 1e308, 0.0, 0.1)}
    of_batch = {"batch": instance_of(training.Batch, batch)}
    hidden, weight = torch.randn(2, 12, 4), torch.randn(5, 4)
    yield Call(
        "token_loss",
        training.token_loss,
        {"logits": instance_of(torch.Tensor, hidden @ weight.T), **of_batch, **weights},
    )
    head = {
        "hidden": instance_of(torch.Tensor, hidden),
        "weight": instance_of(torch.Tensor, weight),
        "bias": Kind((None, torch.zeros(5)), lambda x: x is None or isinstance(x, torch.Tensor)),
        "softcap": real(0, 1e308, 0.0, 2.0),
        "chunk": integer(1, LAST, 100),
    }
    yield Call("linear_cross_entropy", training.linear_cross_entropy, {**head, **of_batch, **weights})
    model = Kind((torch.nn.Linear(2, 2),), lambda x: isinstance(x, torch.nn.Module))
    yield Call(
        "tiled",
        training.tiled,
        {"module": Kind((torch.nn.Linear(2, 2),), model.may_be), "tokens": integer(1, LAST, 3)},
    )
    yield Call("sum_gradients", training.sum_gradients, {"model": model, "mesh": mesh})
    yield Call(
        "check_finite",
        _looked_at,
        {"mesh": mesh, "step": LENGTH, "model": Kind((None, model.right[0]), lambda x: x is None or model.may_be(x))},
    )
    yield Call("total", training.total, {"share": TENSOR, "mesh": mesh})
    yield Call("gradient_factor", training.gradient_factor, {"step": Kind((_backward,), callable), "mesh": mesh})
    held = Kind((torch.nn.Linear(2, 2),), lambda x: isinstance(x, torch.nn.Module) or hasattr(x, "__iter__"))
    yield Call("scale_gradients", training.scale_gradients, {"parameters": held, "factor": real(1e-300, 1e308, 0.5)})
    norm = {"max_norm": real(1e-300, 1e308, 1.0), "factor": real(1e-300, 1e308, 1.0)}
    yield Call("clip_grad_norm", training.clip_grad_norm, {"parameters": held, **norm})
    data: Any = list(tokens)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    yield Call(
        "Loader",
        training.Loader,
        {
            "loader": instance_of(torch.utils.data.DataLoader, loader),
            "mesh": mesh,
            "seed": LENGTH,
            "prepare": Kind((None,), lambda x: x is None or callable(x)),
            "mask": sample["mask"],
            "layout": layout,
            "schedule": SCHEDULES,
            "scatter": FLAG,
            "positions": word("document"),
            "shift": FLAG,
        },
    )


def calls_of_checkpoints() -> Iterator[Call]:
    def as_json(x: Any) -> bool:
        try:
            json.dumps(x)
        except (TypeError, ValueError):
            return False
        return True

    folder = tempfile.mkdtemp(prefix="ringattn-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    kinds = {
        "folder": Kind((f"{folder}/saved",), lambda x: isinstance(x, str)),
        "model": Kind((linear,), lambda x: isinstance(x, torch.nn.Module)),
        "mesh": Kind((MESH,), lambda x: isinstance(x, ringattn.Mesh)),
        "optimizer": Kind((None, optimizer), lambda x: x is None or isinstance(x, torch.optim.Optimizer)),
    }
    more = {"data": Kind((None, {"epoch": 1}), as_json), "keep": integer(1, LAST, 1).optional, "background": FLAG}
    step = integer(0, LAST, 3, 4)

    def save(inside: Any, folder: Any, **arguments: Any) -> None:
        if isinstance(folder, str) and not folder.startswith(str(inside)):
            folder = f"{inside}/x{folder}"
        checkpoint.save(folder, **arguments).wait()

    yield Call("checkpoint.save", partial(save, folder), {**kinds, "step": step, **more})
    yield Call("checkpoint.load", partial(_loaded, folder), {**kinds, "step": step.optional})
    yield Call("checkpoint.last", checkpoint.last, {name: kinds[name] for name in ("folder", "mesh")})


def _loaded(inside: str, folder: Any, step: Any, **arguments: Any) -> None:
    checkpoint.save(f"{inside}/saved", model=torch.nn.Linear(2, 2), step=3, mesh=MESH)
    checkpoint.load(folder, step=step, **arguments)


def _looked_at(**arguments: Any) -> None:
    with training.check_finite(**arguments):
        pass


def _backward(probe: torch.nn.Module, x: torch.Tensor) -> None:
    probe(x).backward()
