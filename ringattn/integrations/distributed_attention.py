"""`DistributedAttention` of DeepSpeed-Ulysses, made and called the same way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from ringattn.checking import instance, shown
from ringattn.errors import InputError, UnsupportedError
from ringattn.functional import attention
from ringattn.integrations.exchanging import exchanged_attention
from ringattn.integrations.members import check_members
from ringattn.masks import Mask
from ringattn.mesh import Mesh
from ringattn.sharding import Sharding
from ringattn.transports.base import Transport
from ringattn.transports.torch_distributed import TorchDistributed

OPTIONS = {"mechanism", "schedule", "kernel", "deterministic"}


class DistributedAttention(nn.Module):
    """`deepspeed.sequence.layer.DistributedAttention`, made and called the same way.

    Heads are exchanged for sequence before a local attention of the caller's, which sees all tokens and some of the
    heads, and back after it. q, k and v travel in one message a rank. Heads need not divide, nor lengths be equal: the
    parts of the sequence lie behind one another in the order of the ranks. Key heads fewer than the ranks go to several
    of them, and are never repeated; each rank needs a query head.

    With a mask in place of a local attention `ringattn.attention` computes, by any schedule, any number of heads on any
    number of ranks, which hold equal parts of the sequence.

    Args:
        local_attention: called with q, k and v, and what `forward` gets beside; or a ringattn mask.
        sequence_process_group: the ranks that share a sequence: a process group, all of whose ranks make the layer, or
            a mesh. Layers of one mesh share its connections; those of a group have their own. (A mesh and a mask may
            come in either order.)
        scatter_idx, gather_idx: the dims of heads, 2, and of tokens, 0 or 1.
        sp_stream: None: there is one exchange, and no other beside which it could run.
        num_kv_heads: key heads before the exchange, where they are to be checked.
        options: with a mask, those of `ringattn.attention`: ``mechanism``, ``schedule``, ``kernel``, ``deterministic``.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor] | Mask | Mesh,
        sequence_process_group: dist.ProcessGroup | Mesh | Mask,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: None = None,
        num_kv_heads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.scatter_idx, self.gather_idx, self.num_kv_heads = scatter_idx, gather_idx, num_kv_heads
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise InputError(f"Heads are dim 2, and tokens 0 or 1; got {shown(scatter_idx)} and {shown(gather_idx)}.")
        if sp_stream is not None:
            raise UnsupportedError("sp_stream would run exchanges beside one another; here there is one. Leave it out.")
        given = local_attention, sequence_process_group
        if any(isinstance(x, Mask) for x in given):
            mesh, mask = given if isinstance(given[0], Mesh) else given[::-1]
            self.mesh = instance(mesh, Mesh, "sequence_process_group", "a mesh, where a mask says who attends to whom")
            self.mask: Mask | None = instance(mask, Mask, "mask", "a ringattn mask, such as Causal()")
            self._check(options)
            self.options, self._sharding = options, None
            return
        if options or not callable(local_attention):
            raise InputError(
                f"A local attention is called with q, k and v, and has no options here; got {shown(local_attention)} "
                f"and {', '.join(sorted(options)) or 'none'}."
            )
        self.mask, self.local_attn, self.spg = None, local_attention, cast("dist.ProcessGroup | Mesh", given[1])

    _sharding: Sharding | None

    @staticmethod
    def _check(options: dict[str, Any]) -> None:
        if unknown := options.keys() - OPTIONS:
            said = ", ".join(sorted(unknown))
            raise InputError(f"The options are mechanism, schedule, kernel and deterministic; got {said}.")
        check_members("contiguous", options.get("schedule", "auto"), options.get("kernel", "auto"))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int = 0,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``[B, S_local, Hq, Dv]``, of ``[B, S_local, Hq, D]`` and the same of Hkv heads.

        Args:
            batch_dim_idx: 1 for ``[S_local, B, H, D]``, in and out, and before the local attention.
            rotary_pos_emb: cosine and sine of the whole sequence, by which DeepSpeed's own function rotates the whole
                queries and keys. With a mask None: rotate the shard itself, at its positions.
            args, kwargs: of the local attention.
        """
        if not isinstance(batch_dim_idx, int) or isinstance(batch_dim_idx, bool) or batch_dim_idx not in (0, 1):
            raise InputError(f"batch_dim_idx is 0 for [B, S, H, D] or 1 for [S, B, H, D]; got {shown(batch_dim_idx)}.")
        if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (query, key, value)):
            said = ", ".join(str(x.dim()) if isinstance(x, Tensor) else shown(x) for x in (query, key, value))
            raise InputError(f"query, key and value are tensors of four dimensions; got {said}.")
        if self.num_kv_heads not in (None, key.shape[2]):
            raise InputError(f"The layer was made for {self.num_kv_heads} key heads; got {key.shape[2]}.")
        q, k, v = (x.transpose(0, batch_dim_idx) for x in (query, key, value))
        if self.mask is not None:
            if rotary_pos_emb is not None or args or kwargs:
                raise UnsupportedError(
                    "rotary_pos_emb is of the whole sequence, which no rank holds under a mask, and there is no local "
                    "attention to take other arguments. Rotate q and k."
                )
            return self._by_mask(q, k, v, self.mask).transpose(0, batch_dim_idx)
        if self.gather_idx == batch_dim_idx:
            raise InputError(f"Dim {batch_dim_idx} counts sequences, by batch_dim_idx, and tokens, by gather_idx.")

        def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, batch_dim_idx) for x in (q, k, v))
            if rotary_pos_emb is not None:
                q, k = _rotated(q, k, rotary_pos_emb)
            return self.local_attn(q, k, v, *args, **kwargs).transpose(0, batch_dim_idx)

        return exchanged_attention(local, q, k, v, self._transport).transpose(0, batch_dim_idx)

    @functools.cached_property
    def _transport(self) -> Transport:
        return self.spg.connected() if isinstance(self.spg, Mesh) else TorchDistributed(self.spg)

    def _by_mask(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        length = q.shape[1] * self.mesh.sequence_size
        if self._sharding is None or self._sharding.length != length:
            self._sharding = Sharding(length, self.mesh, layout="contiguous", mask=mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attention(q, k, v, mask, sharding=self._sharding, **self.options)
        assert isinstance(out, Tensor)  # without return_lse, which __init__ refuses
        return out.transpose(1, 2)


def _rotated(q: Tensor, k: Tensor, rotary_pos_emb: Any) -> tuple[Tensor, Tensor]:
    """As DeepSpeed does it."""
    from deepspeed.sequence.layer import apply_rotary_pos_emb

    cosine, sine = (x.permute(1, 0, 2, 3) for x in rotary_pos_emb[:2])
    return apply_rotary_pos_emb(q, cosine, sine), apply_rotary_pos_emb(k, cosine, sine)
