"""The integrations, which need the libraries that they integrate with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers

import ringattn
from ringattn.integrations import huggingface
from ringattn.integrations.deepspeed import DistributedAttention, initialize
from tests.fuzzing.kinds import FLAG, KERNELS, LAST, LAYOUTS, LENGTHS, MASK, MASKS, MESH, SCHEDULES, Call, Kind, integer

TOKENS = torch.arange(24).view(2, 12) % 5


def _llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model


def _attached(**arguments: Any) -> None:
    huggingface.attach(**arguments).detach()


def _rows(x: Any) -> bool:
    whole = isinstance(x, torch.Tensor) and x.dim() == 2 and not x.is_floating_point()
    return whole and not x.is_complex() and x.dtype != torch.bool


def _is_sequence(x: Any) -> bool:
    try:
        len(x), x.__getitem__
    except (AttributeError, TypeError):
        return False
    return True


def calls() -> list[Call]:
    """Their public functions."""
    return list(_calls())


def _calls() -> Iterator[Call]:
    mesh = Kind((MESH,), lambda x: isinstance(x, ringattn.Mesh))
    model = Kind((_llama(),), lambda x: isinstance(x, torch.nn.Module))
    members = {"layout": LAYOUTS, "schedule": SCHEDULES, "kernel": KERNELS}
    yield Call("attach", _attached, {"model": model, "mesh": mesh, **members})
    attached = huggingface.attach(_llama(), MESH)
    rows = Kind((TOKENS,), _rows)
    batch = {
        "labels": Kind((None, TOKENS), lambda x: x is None or _rows(x)),
        "document_lengths": Kind((None, [5, 7], [[12], [3, 9]]), LENGTHS.optional.may_be),
        "position_ids": Kind((None, torch.arange(12)[None]), lambda x: x is None or _rows(x)),
        "attention_mask": Kind((None, torch.ones(2, 12)), lambda x: x is None or isinstance(x, torch.Tensor)),
        "scatter": Kind((False, True), FLAG.may_be),
    }
    yield Call("batch", attached.batch, {"input_ids": rows, **batch})
    samples = Kind(([{"input_ids": [1, 2, 3]}],), lambda x: hasattr(x, "__iter__"))
    yield Call("collate", attached.collate, {"features": samples, "scatter": FLAG})
    made = Kind((attached.batch(TOKENS),), lambda x: isinstance(x, dict))
    yield Call("explain of a batch", attached.explain, {"batch": made})
    yield Call("sharding_of", huggingface.sharding_of, {"batch": made})
    data = Kind(([1, 2, 3],), _is_sequence)
    repeated = {"batch_size": integer(1, LAST, 1), "seed": integer(0, LAST, 0).optional}
    yield Call("Repeated", huggingface.Repeated, {"dataset": data, "mesh": mesh, **repeated})
    layer = {"schedule": SCHEDULES, "kernel": KERNELS}
    made_of = {"local_attention": MASKS, "sequence_process_group": mesh, **layer}
    yield Call("DistributedAttention", DistributedAttention, made_of)
    heads = Kind((torch.ones(1, 12, 2, 4),), lambda x: isinstance(x, torch.Tensor))
    tensors = {"query": heads, "key": heads, "value": heads}
    yield Call("DistributedAttention.forward", _forward, {**tensors, "batch_dim_idx": integer(0, 1, 0)})
    yield Call(
        "deepspeed.initialize",
        initialize,
        {name: Kind((None,), lambda x: False) for name in ("model", "mesh", "config")},
    )


def _forward(**arguments: Any) -> None:
    DistributedAttention(MESH, MASK)(**arguments)
