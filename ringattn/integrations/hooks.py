"""The attention and mask functions that `ringattn.integrations.huggingface` has transformers call.

A sharded batch brings a `ShardedMask` where transformers expects an attention mask. The mask function gives each layer
its `LayerMask`, and the attention function calls `ringattn.attention` with it. Without one both do what the model's own
implementation does. They hold nothing of any model: all that a call needs comes with its batch, so that two models
attached to different meshes never meet, and recomputation of a checkpointed layer sees what its first run has seen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ringattn.checking import shown
from ringattn.errors import InputError, UnsupportedError
from ringattn.functional import attention
from ringattn.integrations.architectures import Reach
from ringattn.kernels import Kernel
from ringattn.masks import Mask
from ringattn.mechanisms.softmax import Softmax
from ringattn.schedules.base import Scheme
from ringattn.sharding import Sharding

PREFIX = "ringattn_"
"""Of the name of an attention implementation that runs another where no sharded batch is given."""

ABOUT_THE_MODEL = (
    *("deterministic", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("position_ids", "return_dict", "shift_labels", "use_cache"),
)
"""Keyword arguments that transformers passes down to every layer, and that change nothing in an attention layer."""


class LayerMask:
    """What one kind of layer attends to in a sharded batch, and how.

    No dataclass: FSDP2 takes those in a layer's arguments apart when it casts their tensors.
    """

    def __init__(
        self,
        reach: Reach,
        mask: Mask,
        sharding: Sharding,
        schedule: Scheme | str,
        kernel: Kernel | str,
        seed: int,
    ) -> None:
        self.reach, self.mask, self.sharding = reach, mask, sharding
        self.schedule, self.kernel, self.seed = schedule, kernel, seed


class ShardedMask:
    """Stands where transformers expects the attention mask of a batch, and says that the batch is sharded.

    Implementations of attention that do not know it fail: a sharded batch given to a model that is not attached is
    never taken for a whole one.
    """

    ndim = 1  # neither a padding mask, which has two dimensions, nor a prepared one, which has four

    def __init__(self, layers: Mapping[Reach, LayerMask], shape: tuple[int, int]) -> None:
        self.layers = layers
        self.shape = shape

    def __repr__(self) -> str:
        return f"ShardedMask({', '.join(map(str, self.layers))}): a batch for models that ringattn is attached to"


def installed(implementation: str) -> str:
    """The name of the implementation that is this one but for sharded batches, known to transformers from now on."""
    name = PREFIX + implementation
    if implementation not in AttentionMaskInterface._global_mapping:
        raise UnsupportedError(
            f"The attention implementation {implementation!r} makes no masks that could be sharded. Load the model "
            f"with attn_implementation='sdpa' or 'eager'."
        )
    AttentionInterface.register(name, functools.partial(attend, original=implementation))
    AttentionMaskInterface.register(name, functools.partial(mask_of, original=implementation))
    return name


def mask_of(*, mask_function: Callable[..., Any], attention_mask: Any = None, original: str, **arguments: Any) -> Any:
    """A mask function of transformers: the layers' mask of a sharded batch, or what the original makes."""
    if not isinstance(attention_mask, ShardedMask):
        make: Any = AttentionMaskInterface._global_mapping[original]
        return make(mask_function=mask_function, attention_mask=attention_mask, **arguments)
    # Compiled code cannot look into closures; what the mask function is told besides them says the same.
    reach = reach_told(**arguments) if torch.compiler.is_compiling() else reach_of(mask_function)
    if reach not in attention_mask.layers:
        raise UnsupportedError(
            f"The model asks for a mask that is {reach}; by its config its layers are "
            f"{', '.join(map(str, attention_mask.layers))}."
        )
    if arguments["q_length"] != arguments["kv_length"]:
        raise UnsupportedError(
            f"A sharded batch goes without cached keys; got {arguments['q_length']} tokens and "
            f"{arguments['kv_length']} keys. Pass no cache."
        )
    return attention_mask.layers[reach]


def reach_of(mask_function: Callable[..., Any]) -> Reach:
    """What a mask function of transformers allows, told by which of its own closures it is made of.

    Raises:
        UnsupportedError: it has a part that is not known.
    """
    name = mask_function.__qualname__.partition(".")[0]
    inside = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    if name == "and_masks":
        parts = [reach_of(part) for part in inside[0]]
        return Reach(
            causal=any(part.causal for part in parts),
            window=next((part.window for part in parts if part.window is not None), None),
            chunk=next((part.chunk for part in parts if part.chunk is not None), None),
        )
    if name == "causal_mask_function":
        return Reach()
    if name == "bidirectional_mask_function":
        return Reach(causal=False)
    if name == "sliding_window_overlay":
        return Reach(causal=False, window=inside[0] - 1)
    if name == "sliding_window_bidirectional_overlay":
        return Reach(causal=False, window=inside[0])
    if name == "chunked_overlay":
        return Reach(causal=False, chunk=inside[0])
    raise UnsupportedError(
        f"The model makes a mask by {mask_function.__qualname__}, which ringattn does not know: images, custom "
        f"overlays and padding cannot be sharded."
    )


def reach_told(
    *, local_size: int | None = None, use_vmap: bool = False, allow_is_causal_skip: bool = True, **others: Any
) -> Reach:
    """What a mask function of transformers is to allow, told by its other arguments.

    Raises:
        UnsupportedError: something is laid over the mask.
    """
    causal = "allow_is_bidirectional_skip" not in others
    if use_vmap or (causal and not allow_is_causal_skip):
        raise UnsupportedError("The model lays something over its causal mask, which cannot be sharded.")
    return Reach(causal, None if local_size is None else local_size - causal)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    original: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: sharded attention for a sharded batch, or the original.

    Args:
        query: ``[B, Hq, S_local, D]``.
        key, value: ``[B, Hkv, S_local, D]``.

    Returns:
        ``[B, S_local, Hq, D]``, and the weights where the original returns them.

    Raises:
        UnsupportedError: the model passes an option that cannot be sharded; says which.
    """
    if isinstance(attention_mask, ShardedMask):
        raise UnsupportedError(f"{type(module).__name__} makes no masks that could be sharded.")
    if not isinstance(attention_mask, LayerMask):
        run = _implementation(module, original)
        given = {} if scaling is None else {"scaling": scaling}
        answer: tuple[Tensor, Tensor | None]
        answer = run(module, query, key, value, attention_mask, dropout=dropout, **given, **options)
        return answer
    softcap, sinks = _checked(attention_mask.reach, **options)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    seed = None if not dropout else attention_mask.seed + getattr(module, "layer_idx", 0)
    mechanism = Softmax(scale=scaling, softcap=softcap, sinks=sinks, dropout=dropout, seed=seed)
    out = attention(
        query,
        key,
        value,
        attention_mask.mask,
        sharding=attention_mask.sharding,
        mechanism=mechanism,
        schedule=attention_mask.schedule,
        kernel=attention_mask.kernel,
    )
    return out.transpose(1, 2).contiguous(), None


def _checked(
    reach: Reach,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[float | None, Tensor | None]:
    """The soft cap and sinks of a layer, none of whose options is dropped without a word."""
    for name, value in others.items():
        if name not in ABOUT_THE_MODEL and value is not None and value is not False:
            raise UnsupportedError(
                f"The model passes {name}={shown(value)} to its attention, which ringattn does not know. Leave it out."
            )
    if others.get("output_attentions"):
        raise UnsupportedError("Sharded attention has no matrix of weights: set output_attentions to False.")
    if sliding_window is not None and sliding_window - 1 != reach.window:
        raise InputError(f"A layer passes sliding_window={sliding_window} to attention, but its mask is {reach}.")
    if is_causal is not None and is_causal != reach.causal:
        raise InputError(f"A layer passes is_causal={is_causal} to attention, but its mask is {reach}.")
    return softcap, s_aux


def _implementation(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    """The model's own attention function of this name; ``eager`` is in the file that defines its layers."""
    registered: Any = AttentionInterface._global_mapping
    if name != "eager":
        given: Callable[..., Any] = registered[name]
        return given
    files = (sys.modules.get(each.__module__) for each in type(module).__mro__)
    found: list[Callable[..., Any] | None] = [getattr(file, "eager_attention_forward", None) for file in files]
    return next(each for each in found if each is not None)
