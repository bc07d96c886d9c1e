"""Gradients of replicated parameters, summed over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ringattn.errors import UnsupportedError
from ringattn.mesh import Mesh
from ringattn.transports.base import Transport


def sum_gradients(model: nn.Module, loss: Tensor, mesh: Mesh) -> Tensor:
    """Adds every rank's gradients, in place, and returns every rank's loss added.

    Each rank's loss is its share of one sum, so its gradients are shares too: they are added, never averaged.
    All of them travel in one flat float32 bucket, the loss at its end. A rank without tokens takes part like
    any other.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    bucket = torch.cat([*(gradient.flatten() for gradient in gradients), loss.reshape(1)])
    sum_over_ranks(bucket, mesh)
    sums: tuple[Tensor, ...] = bucket[:-1].split([gradient.numel() for gradient in gradients])
    for gradient, added in zip(gradients, sums, strict=True):
        gradient.copy_(added.view_as(gradient))
    return bucket[-1]


def sum_over_ranks(x: Tensor, mesh: Mesh) -> None:
    """Replaces x, one flat tensor, by the sum over all ranks of the mesh, the same bits on each of them."""
    if mesh.axes["data"] > 1:  # the mesh's transport joins the ranks of one sequence; replicas meet in the world
        world = torch.distributed.get_world_size()
        if world != mesh.size:
            raise UnsupportedError(f"Replicas are summed over the world: it has {world} ranks, the mesh {mesh.size}.")
        torch.distributed.all_reduce(x)
    elif mesh.size > 1:
        _all_reduce(x, mesh.connected())


def _all_reduce(x: Tensor, transport: Transport) -> None:
    """Reduce-scatter, then all-gather: each rank adds up its part of x, in rank order, and hands it to the
    others.

    2 (P - 1) / P of x is sent by each of P ranks, the least there is. It runs on any transport, simulator
    included.
    """
    me, parts = transport.rank, x.tensor_split(transport.size)
    peers = [rank for rank in range(transport.size) if rank != me]
    received = {peer: torch.empty_like(parts[me]) for peer in peers}
    theirs = [(peer, parts[peer]) for peer in peers]
    transport.exchange(theirs, list(received.items()), label="gradients, reduce-scatter").wait()
    received[me] = parts[me].clone()
    parts[me].zero_()
    for rank in range(transport.size):
        parts[me].add_(received[rank])
    mine = [(peer, parts[me]) for peer in peers]
    transport.exchange(mine, theirs, label="gradients, all-gather").wait()
