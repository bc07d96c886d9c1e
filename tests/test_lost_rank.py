"""A rank that ends in the middle of a ring: the others end too, with an error that says whom they lost."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import destroy_process_group, init_process_group

import ringattn

SIZE, LOST, TIMEOUT = 3, 1, 15.0


def _serve(rank: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    init_process_group("gloo", store=TCPStore("127.0.0.1", port), rank=rank, world_size=SIZE)
    mesh = ringattn.init(timeout=TIMEOUT)
    transport, exchange, exchanges = mesh.connected(), mesh.connected().exchange, 0

    def counted(*arguments: Any, control: bool = False, **options: Any) -> Any:
        nonlocal exchanges
        exchanges += not control
        if rank == LOST and exchanges == 2:  # it has relayed nothing yet of what it received
            os._exit(1)
        return exchange(*arguments, control=control, **options)

    transport.exchange = counted  # type: ignore[method-assign]
    sharding = ringattn.Sharding(60, mesh)
    q = torch.randn(1, 2, sharding.count, 8, requires_grad=True)
    started = time.monotonic()
    try:
        ringattn.attention(q, q, q, ringattn.Full(), sharding=sharding, schedule="ring").sum().backward()
        said = "no error"
    except ringattn.TransportError as error:
        said = str(error)
    pipe.send((said, time.monotonic() - started))
    destroy_process_group()


def test_the_others_end_within_the_timeout_and_say_whom_they_lost() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(SIZE):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(rank, store.port, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        for rank in (0, 2):
            assert pipes[rank].poll(120), f"rank {rank} waits still"
            said, seconds = pipes[rank].recv()
            assert said.startswith(f"Rank {rank} of {SIZE} lost rank "), said
            assert "lost rank 1 during" in said or "lost rank 0, 1 during" in said or "lost rank 1, 2 during" in said, (
                said
            )
            assert seconds < TIMEOUT + 5
    finally:
        for process in processes:
            process.kill()
