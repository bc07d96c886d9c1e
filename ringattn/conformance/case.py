"""A case: one attention call with random inputs, small enough to be compared with the dense oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ringattn.checking import MAX_RANKS, dtype, flag, instance, integer, number, shown, tokens
from ringattn.errors import InputError
from ringattn.kernels.base import Kernel
from ringattn.layouts import Layout
from ringattn.masks import Mask, checked
from ringattn.mechanisms import MEMBERS, Entmax, Gated, Mechanism, Sampled, Softmax
from ringattn.mechanisms.ordered import Ordered
from ringattn.naming import named
from ringattn.schedules.base import Scheme

FEATURES = ("softcap", "sinks", "alibi", "relative", "bias", "dropout", "additive", "centres", "alpha")
"""What may change the scores and weights of softmax and entmax, as far as they have it, and a case can draw."""
MOST = 1 << 32  # numbers of all inputs: 16 GB of them
SIZES = ("ranks", "ulysses", "batch", "kv_heads", "groups", "dim", "value_dim")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call over a whole sequence. Sizes are as for `ringattn.attention`, members instances or names.

    Attributes:
        length: queries, and keys too unless ``kv_length`` makes it cross-attention, with a layout of its own.
        groups: query heads of each key head.
        features: those of `FEATURES` that are drawn, where the mechanism is softmax or entmax and has them; ``bias``
            for mechanisms that walk the keys in order.
        scale: of the scores, where the mechanism has one; None leaves it as it is.
        use_lse: whether the log-sum-exp gets a gradient too.
        backward: whether gradients are computed.
        deterministic: whether the call asks for the same bits on any ranks; learned tensors get no gradients then.
        ulysses: of the ranks, those along the ulysses axis, a divisor of all; 1 leaves a mesh that is given as it is.
    """

    length: int
    mask: Mask
    ranks: int = 1
    batch: int = 1
    kv_heads: int = 1
    groups: int = 1
    dim: int = 8
    value_dim: int = 8
    layout: Layout | str = "auto"
    schedule: Scheme | str = "auto"
    kernel: Kernel | str = "auto"
    dtype: torch.dtype = torch.float32
    use_lse: bool = False
    seed: int = 0
    mechanism: Mechanism | str = "softmax"
    features: frozenset[str] = frozenset()
    scale: float | None = None
    kv_length: int | None = None
    kv_layout: Layout | str = "contiguous"
    backward: bool = True
    deterministic: bool = False
    ulysses: int = 1

    def __post_init__(self) -> None:
        """Raises InputError where a size is none; layouts, schedules, kernels and mechanisms are looked up in use."""
        checked(self.mask)
        keys = None if self.kv_length is None else tokens(self.kv_length, "kv_length")
        sizes = {name: integer(getattr(self, name), name, least=1, below=MAX_RANKS + 1) for name in SIZES}
        seed = integer(self.seed, "seed", below=1 << 63)
        found = {"length": tokens(self.length, "length"), "kv_length": keys, "seed": seed, "dtype": dtype(self.dtype)}
        for name, value in {**sizes, **found}.items():
            object.__setattr__(self, name, value)
        for name in ("use_lse", "backward", "deterministic"):
            flag(getattr(self, name), name)
        if not isinstance(self.features, frozenset) or not self.features <= {*FEATURES}:
            raise InputError(f"features are a frozenset of {', '.join(FEATURES)}; got {shown(self.features)}.")
        if self.scale is not None:
            number(self.scale, "scale")
        if self.ranks % self.ulysses:
            raise InputError(f"ulysses is a divisor of the ranks; got {self.ulysses} of {self.ranks}.")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.groups

    @property
    def keys(self) -> int:
        """Keys of the whole sequence."""
        return self.length if self.kv_length is None else self.kv_length

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, and the gradients of the output and the log-sum-exp, of the whole sequence: one seed, one draw."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [
            (self.heads, self.length, self.dim),
            (self.kv_heads, self.keys, self.dim),
            (self.kv_heads, self.keys, self.value_dim),
            (self.heads, self.length, self.value_dim),
        ]
        if (count := self.batch * sum(map(math.prod, shapes))) > MOST:
            raise InputError(f"A case holds up to {MOST:,} numbers; got {count:,}. Take a shorter one, or fewer heads.")
        # drawn in float32, so that all dtypes see the same numbers up to rounding
        made = [torch.randn(self.batch, *shape, generator=generator) for shape in shapes]
        made.append(torch.randn(self.batch, self.heads, self.length, generator=generator) * self.use_lse)
        return tuple(x.to(self.dtype) for x in made)

    @property
    def attends(self) -> Mechanism:
        """The mechanism, with the learned tensors of the whole sequence."""
        mechanism = named("mechanism", self.mechanism, Mechanism, MEMBERS)
        drawn: dict[str, Any] = {}
        if isinstance(mechanism, (Softmax, Entmax)):
            drawn = {name: x for name, x in self._drawn().items() if hasattr(mechanism, name)}
        if isinstance(mechanism, Gated) and self.kv_length is None:
            drawn = {"log_decay": self._decays()}
        if isinstance(mechanism, Sampled) and mechanism.seed is None:
            drawn["seed"] = self.seed
        if isinstance(mechanism, Ordered) and "bias" in self.features:
            bias = torch.randn(self.heads, generator=torch.Generator().manual_seed(self.seed + 1))
            drawn["bias"] = bias.to(self.dtype)
        if self.scale is not None:
            drawn["scale"] = self.scale
        try:
            return dataclasses.replace(mechanism, **drawn) if drawn else mechanism
        except TypeError as error:
            raise InputError(f"{mechanism} has no scale; leave it out.") from error

    def _drawn(self) -> dict[str, Any]:
        """The features' values; random numbers are drawn by the case's seed."""
        g = torch.Generator().manual_seed(self.seed + 1)
        drawn: dict[str, Any] = {
            "sinks": torch.randn(self.heads, generator=g),
            "alibi": torch.rand(self.heads, generator=g),
            "relative": torch.randn(self.heads, 9, generator=g),
            "additive": torch.randn(self.heads, self.dim, generator=g),
            "centres": torch.rand(self.batch, self.heads, self.length, generator=g) * self.keys,
            "alpha": 1.1 + 0.4 * torch.rand(self.heads, generator=g),
        }
        if "bias" in self.features:
            drawn["bias"] = torch.randn(self.heads, self.length, self.keys, generator=g)
        drawn = {name: x.to(self.dtype) for name, x in drawn.items()}
        drawn |= {"softcap": 1.5, "dropout": 0.3, "seed": self.seed}
        drawn = {name: x for name, x in drawn.items() if name in self.features or name == "seed"}
        return drawn | {"width": 7.3} if "centres" in drawn else drawn

    def _decays(self) -> torch.Tensor:
        """Log decays of every size, 0 and -inf among them."""
        g = torch.Generator().manual_seed(self.seed + 1)
        shape = self.batch, self.kv_heads, self.length
        drawn = -torch.exp(2 * torch.randn(*shape, generator=g) - 3)
        kind = torch.rand(*shape, generator=g)
        return drawn.masked_fill(kind < 0.05, 0).masked_fill(kind > 0.99, -math.inf).to(self.dtype)

    def allowed(self) -> torch.Tensor:
        """The mask, dense: bool ``[length, keys]``."""
        return self.mask.dense(range(self.length), range(self.keys))

    def rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Rows of the dense mask, for sequences too long for all of it."""
        return self.mask.dense(range(start, stop), range(self.keys)).numpy()


def checked_case(value: object) -> Case:
    """The case, or an InputError where something else was given."""
    return instance(value, Case, "case", "a ringattn.conformance.Case")
