"""What a call must satisfy, and the calls to try: used by the tests of every schedule, layout, kernel and transport.

The measure is ‖error‖ / ‖A‖, A being the float64 formula with every factor absolute (`ringattn.reference`): rounding
errors are proportional to it however much of a gradient cancels. A relative norm of the gradient itself would reject
correct code on one-key rows, and an absolute tolerance would accept wrong gradients that are small.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ringattn
from ringattn import reference
from ringattn.layouts import Layout
from ringattn.masks import Causal, Documents, Full, Mask, Prefix, SinkTokens, Window
from ringattn.schedules.base import Schedule

LAYOUTS: tuple[Layout, ...] = (ringattn.Contiguous(), ringattn.Zigzag(), ringattn.Striped())
SCHEDULES: tuple[Schedule, ...] = (
    ringattn.Ring(),
    ringattn.Route(),
    ringattn.Ring(lookahead=0),
    ringattn.Route(lookahead=0),
)
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call. ``heads`` counts query heads, ``groups`` the query heads of a key head."""

    length: int
    mask: Mask
    ranks: int = 1
    batch: int = 1
    kv_heads: int = 1
    groups: int = 1
    dim: int = 8
    value_dim: int = 8
    layout: Layout | str = "auto"
    schedule: Schedule | str = "auto"
    kernel: str = "auto"
    dtype: torch.dtype = torch.float32
    use_lse: bool = False
    seed: int = 0

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, dout, dlse of the whole sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.groups
        shapes = [
            (heads, self.dim),
            (self.kv_heads, self.dim),
            (self.kv_heads, self.value_dim),
            (heads, self.value_dim),
        ]
        made = [torch.randn(self.batch, h, self.length, d, generator=generator) for h, d in shapes]
        made.append(torch.randn(self.batch, heads, self.length, generator=generator) * self.use_lse)
        return tuple(x.to(self.dtype) for x in made)


def lengths_of_documents(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Document lengths that sum to ``length``; one-token and empty documents included."""

    def cut(edges: list[int]) -> tuple[int, ...]:
        inner = sorted(edge % (length + 1) for edge in edges)
        return tuple(b - a for a, b in zip([0, *inner], [*inner, length], strict=True))

    return st.lists(st.integers(0, 300), max_size=6).map(cut)


def masks(length: int) -> st.SearchStrategy[Mask]:
    """Every class of mask and random combinations of them."""
    size = st.integers(0, max(length, 1))
    simple = st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.builds(Window, size, size),
        st.builds(Documents, lengths_of_documents(length)),
        st.builds(Prefix, size),
        st.builds(SinkTokens, size),
    )
    return st.recursive(
        simple,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            inner.map(lambda a: ~a),
        ),
        max_leaves=4,
    )


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Case:
    """Any call."""
    length = draw(st.one_of(st.integers(0, 40), st.integers(0, 257)))
    dim = draw(st.sampled_from((1, 4, 8, 16)))
    return Case(
        length=length,
        mask=draw(masks(length)),
        ranks=draw(st.integers(1, 9)),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        dim=dim,
        value_dim=draw(st.sampled_from((dim, dim, 3, 12))),
        layout=draw(st.one_of(st.sampled_from(("auto", "balanced")), st.sampled_from(LAYOUTS))),
        schedule=draw(st.one_of(st.just("auto"), st.sampled_from(SCHEDULES))),
        kernel=draw(st.sampled_from(("auto", "reference"))),
        dtype=draw(st.sampled_from(dtypes)),
        use_lse=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def local_run(mesh: ringattn.Mesh, case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One rank's part: its positions, and its output, log-sum-exp and gradients."""
    sharding = ringattn.Sharding(case.length, mesh, case.layout, case.mask)
    *inputs, dout, dlse = (sharding.split(x, 2) for x in case.inputs())
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    out, lse = ringattn.attention(
        q, k, v, case.mask, sharding=sharding, schedule=case.schedule, kernel=case.kernel, return_lse=True
    )
    loss = (out * dout).sum()
    if case.use_lse:
        reachable = lse.isfinite()
        loss = loss + (lse.masked_fill(~reachable, 0) * dlse).sum()
    loss.backward()
    found = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    assert all(x is not None for x in found.values())
    return sharding.positions, {name: x.detach() for name, x in found.items() if x is not None}


def gathered(case: Case, parts: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The ranks' parts, put together in order of position."""
    positions = torch.cat([where for where, _ in parts])
    assert sorted(positions.tolist()) == list(range(case.length))
    order = positions.argsort()
    return {name: torch.cat([found[name] for _, found in parts], dim=2).index_select(2, order) for name in NAMES}


def oracle(case: Case) -> reference.Evaluation:
    """The float64 answer, from the inputs as rounded to the case's dtype."""
    q, k, v, dout, dlse = (x.double().numpy() for x in case.inputs())
    where = torch.arange(case.length)
    return reference.evaluate(q, k, v, case.mask.dense(where, where).numpy(), dout, dlse)


def errors(found: dict[str, torch.Tensor], expected: reference.Evaluation) -> dict[str, float]:
    """‖error‖ / ‖A‖ of the output and every gradient; of the log-sum-exp, relative to 1 + |lse|."""
    gradients, sizes = expected.gradients, expected.magnitudes
    pairs: dict[str, tuple[Any, Any]] = {
        "out": (expected.out, sizes.out),
        "lse": (expected.lse, 1 + abs(expected.lse)),
        "dq": (gradients.dq, sizes.dq),
        "dk": (gradients.dk, sizes.dk),
        "dv": (gradients.dv, sizes.dv),
    }
    return {name: reference.error(found[name].double().numpy(), *pair) for name, pair in pairs.items()}


def simulated(case: Case) -> dict[str, torch.Tensor]:
    """The case on virtual ranks."""
    return gathered(case, ringattn.simulate(local_run, case, ring=case.ranks).results)


def single_device(case: Case) -> dict[str, torch.Tensor]:
    """PyTorch's own attention in the case's dtype, for what low precision can be asked of. Needs reachable rows."""
    *inputs, dout, _ = case.inputs()
    q, k, v = (x.requires_grad_() for x in inputs)
    allowed = case.mask.dense(torch.arange(case.length), torch.arange(case.length))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
    (out * dout).sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
