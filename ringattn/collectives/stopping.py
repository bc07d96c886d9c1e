"""Decoding by hard monotonic attention: where the searches stop."""

from __future__ import annotations

import torch

from ringattn.checking import instance
from ringattn.errors import InputError
from ringattn.functional import attention
from ringattn.masks import Full
from ringattn.mechanisms.mocha import MoChA
from ringattn.mechanisms.monotonic import Monotonic
from ringattn.mechanisms.ordered import Ordered
from ringattn.runtime import agreement
from ringattn.runtime.arguments import check_tensors
from ringattn.runtime.transforms import outside_graphs
from ringattn.sharding import Sharding


@outside_graphs
def monotonic_stops(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    sharding: Sharding,
    kv_sharding: Sharding | None = None,
    mechanism: Ordered = Monotonic(),  # noqa: B008 (an immutable value)
) -> torch.Tensor:
    """The key at which the search of each query stops when it is decoded. Every rank calls it.

    The rule of test time (Raffel et al., arXiv 1704.00784, section 2.2): the first key, from that of the query before
    on, whose energy is above 0, its probability above one half. A search that finds none ends behind the last key, and
    so do those of all queries after it. The output there, for MoChA softmax over the window that ends there, is
    ``ringattn.attention`` by the mechanism with ``hard=True``.

    Args:
        q, k: as in `ringattn.attention`: this rank's parts, both contiguous.
        sharding: who holds the queries.
        kv_sharding: who holds the keys; None for the same.
        mechanism: `Monotonic` or `MoChA`, whose scale, bias and dims count.

    Returns:
        Global positions of keys, int64 ``[B, Hq, S_local]``; -1 where a search found none.

    Raises:
        InputError: an argument is wrong; nothing was sent.
        AgreementError: the ranks' arguments differ.
    """
    instance(sharding, Sharding, "sharding", "a ringattn.Sharding")
    kv = sharding if kv_sharding is None else instance(kv_sharding, Sharding, "kv_sharding", "a ringattn.Sharding")
    with agreement.telling(sharding.mesh.connected(), "ringattn.monotonic_stops", q, k):
        instance(mechanism, Ordered, "mechanism", "ringattn.Monotonic or ringattn.MoChA")
        check_tensors(q, k, k, f"q {list(q.shape)}, k {list(k.shape)}")
        if k.shape[2] != kv.count:
            raise InputError(f"k must have this rank's {kv.count} of {kv.length} keys; got {list(k.shape)}.")
    others = mechanism.chunk_dim if isinstance(mechanism, MoChA) else 0
    searching = Monotonic(scale=mechanism.scale, bias=mechanism.bias, hard=True)
    with torch.no_grad():
        q, k = (x.double()[..., : x.shape[-1] - others] for x in (q, k))
        counted = (kv.positions + 1).to(k.device, torch.float64).reshape(1, 1, -1, 1)  # 0 stays for none
        values = counted.expand(*k.shape[:2], -1, -1)
        found: torch.Tensor = attention(
            q, k, values, Full(), sharding=sharding, kv_sharding=kv_sharding, mechanism=searching
        )
    return found.squeeze(-1).round().long() - 1
