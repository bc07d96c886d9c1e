"""What a call must satisfy, and the calls to try: used by the tests of every schedule, layout, kernel and transport.

The measure is ‖error‖ / ‖A‖, A being the float64 formula with every factor absolute (`ringattn.reference`): rounding
errors are proportional to it however much of a gradient cancels. A relative norm of the gradient itself would reject
correct code on one-key rows, and an absolute tolerance would accept wrong gradients that are small.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import ringattn
from ringattn import reference
from ringattn.kernels.base import Kernel
from ringattn.kernels.onednn import OneDNN
from ringattn.kernels.reference import Reference
from ringattn.kernels.sdpa import Sdpa
from ringattn.layouts import Layout
from ringattn.masks import Blocks, Causal, Documents, Full, Mask, Predicate, Prefix, SinkTokens, Window
from ringattn.mechanisms.base import Mechanism, Problem, State
from ringattn.schedules.base import Schedule

LAYOUTS: tuple[Layout, ...] = (ringattn.Contiguous(), ringattn.Zigzag(), ringattn.Striped())
SCHEDULES: tuple[Schedule, ...] = (
    ringattn.Ring(),
    ringattn.Route(),
    ringattn.Ring(lookahead=0),
    ringattn.Route(lookahead=0),
)
FEATURES = ("softcap", "sinks", "alibi", "relative", "bias", "dropout")


@dataclasses.dataclass(frozen=True)
class Preferred(Kernel):
    """A kernel where it can compute the problem, the reference kernel elsewhere."""

    kernel: Kernel

    def supports(self, problem: Problem) -> bool:
        return True

    def refusal(self, problem: Problem) -> str | None:
        return None

    def _taken(self, problem: Problem) -> Kernel:
        return Reference() if self.kernel.refusal(problem) else self.kernel

    def forward(self, problem: Problem, *rest: Any) -> State:
        return self._taken(problem).forward(problem, *rest)

    def backward(self, problem: Problem, *rest: Any) -> None:
        self._taken(problem).backward(problem, *rest)

    def __str__(self) -> str:
        return f"{self.kernel} or reference"


KERNELS: tuple[Kernel | str, ...] = (
    "auto",
    "reference",
    Preferred(Sdpa()),
    Preferred(OneDNN(rows=8, columns=12, least=8, grain=4)),  # of which short sequences have many blocks
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call. ``groups`` counts the query heads of a key head; ``kv_length`` makes it cross-attention."""

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
    kernel: Kernel | str = "auto"
    dtype: torch.dtype = torch.float32
    use_lse: bool = False
    seed: int = 0
    mechanism: str = "softmax"
    features: frozenset[str] = frozenset()
    scale: float | None = None
    kv_length: int | None = None
    kv_layout: Layout | str = "contiguous"

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.groups

    @property
    def keys(self) -> int:
        """Keys of the whole sequence."""
        return self.length if self.kv_length is None else self.kv_length

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, dout, dlse of the whole sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [
            (self.heads, self.length, self.dim),
            (self.kv_heads, self.keys, self.dim),
            (self.kv_heads, self.keys, self.value_dim),
            (self.heads, self.length, self.value_dim),
        ]
        made = [torch.randn(self.batch, *shape, generator=generator) for shape in shapes]
        made.append(torch.randn(self.batch, self.heads, self.length, generator=generator) * self.use_lse)
        return tuple(x.to(self.dtype) for x in made)

    def tables(self) -> dict[str, torch.Tensor]:
        """The learned tensors of the features, of the whole sequence."""
        g = torch.Generator().manual_seed(self.seed + 1)
        made = {
            "sinks": torch.randn(self.heads, generator=g),
            "alibi": torch.rand(self.heads, generator=g),
            "relative": torch.randn(self.heads, 9, generator=g),
            "bias": torch.randn(self.heads, self.length, self.keys, generator=g),
        }
        return {name: x.to(self.dtype) for name, x in made.items() if name in self.features}

    def scalars(self) -> dict[str, Any]:
        """The features that are numbers, and the scale."""
        made = {"scale": self.scale, "softcap": 1.5 if "softcap" in self.features else None}
        return {**made, "dropout": 0.3 if "dropout" in self.features else 0.0, "seed": self.seed}

    def allowed(self) -> torch.Tensor:
        """The mask, dense."""
        return self.mask.dense(range(self.length), range(self.keys))


def lengths_of_documents(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Document lengths that sum to ``length``; one-token and empty documents included."""

    def cut(edges: list[int]) -> tuple[int, ...]:
        inner = sorted(edge % (length + 1) for edge in edges)
        return tuple(b - a for a, b in zip([0, *inner], [*inner, length], strict=True))

    return st.lists(st.integers(0, 300), max_size=6).map(cut)


def bitmaps(length: int, size: int, seed: int) -> Blocks:
    """Some blocks of this many tokens."""
    side = -(-length // size)
    return Blocks(torch.rand(side, side, generator=torch.Generator().manual_seed(seed)) < 0.5, size)


def sparse(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Pairs without an order that bands could see."""
    return (q * 7 + k * 3) % 5 < 2


def dilated(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Every eighth key to either side."""
    return (q - k).abs() % 8 == 0


def everything(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A predicate that bands could say."""
    return (q >= 0) & (k >= 0)


PREDICATES = tuple(map(Predicate, (sparse, dilated, everything)))


def masks(length: int, predicates: bool = True) -> st.SearchStrategy[Mask]:
    """Every class of mask and random combinations of them."""
    size = st.integers(0, max(length, 1))
    simple = st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.builds(Window, size, size),
        st.builds(Documents, lengths_of_documents(length)),
        st.builds(Prefix, size),
        st.builds(SinkTokens, size),
        st.builds(bitmaps, st.just(length), st.integers(1, 64), st.integers(0, 999)),
        *([st.sampled_from(PREDICATES)] if predicates else []),
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


def layouts(length: int, ranks: int) -> st.SearchStrategy[Layout | str]:
    """Every layout; of the explicit ones, runs dealt at random."""

    def dealt(owners: list[int]) -> Layout:
        edges = [length * i // len(owners) for i in range(len(owners) + 1)]
        runs: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        for owner, run in zip(owners, itertools.pairwise(edges), strict=True):
            if run[0] < run[1]:
                runs[owner].append(run)
        return ringattn.Explicit(runs)

    explicit = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=9).map(dealt)
    return st.one_of(st.sampled_from(("auto", "balanced")), st.sampled_from(LAYOUTS), explicit)


HEADS = ((8, 1), (2, 4), (1, 8), (3, 2), (5, 1), (1, 7), (1, 1))  # key heads and their query heads


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Case:
    """Any call."""
    length = draw(st.one_of(st.integers(0, 40), st.integers(0, 257)))
    ranks = draw(st.sampled_from((1, 2, 3, 4, 6, 7, 8)))
    dim = draw(st.sampled_from((1, 4, 8, 16)))
    kv_heads, groups = draw(st.sampled_from(HEADS))
    mechanism = draw(st.sampled_from(("softmax", "softmax", "softmax", "hard", "linear")))
    softmax = mechanism == "softmax"
    return Case(
        length=length,
        mask=draw(masks(length)),
        ranks=ranks,
        batch=draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        groups=groups,
        dim=dim,
        value_dim=draw(st.sampled_from((dim, dim, 3, 12))),
        layout=draw(layouts(length, ranks)),
        schedule=draw(st.one_of(st.just("auto"), st.sampled_from(SCHEDULES))),
        kernel=draw(st.sampled_from(KERNELS)),
        dtype=draw(st.sampled_from(dtypes)),
        use_lse=softmax and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        mechanism=mechanism,
        features=draw(st.frozensets(st.sampled_from(FEATURES))) if softmax and draw(st.booleans()) else frozenset(),
        scale=draw(st.sampled_from((None, None, 0.3))) if mechanism != "linear" else None,
    )


def cross_masks(length: int, kv_length: int) -> st.SearchStrategy[Mask]:
    """Masks of a query and a key sequence, packed documents of both among them."""

    def packed(cuts: list[tuple[int, int]]) -> Mask:
        lengths = [
            [b - a for a, b in itertools.pairwise([0, *sorted(cut[side] % (n + 1) for cut in cuts), n])]
            for side, n in enumerate((length, kv_length))
        ]
        return Documents(*lengths)

    both = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=4).map(packed)
    window = st.builds(Window, st.integers(0, 9), st.integers(0, 9))
    return st.one_of(
        both,
        window,
        st.builds(lambda a, b: a & b, both, window),
        st.builds(lambda a, n: a | Prefix(n), window, st.integers(0, 9)),
        window.map(lambda a: ~a),
        st.sampled_from((Causal(), Full(), SinkTokens(2), PREDICATES[0], PREDICATES[1] & Causal())),
    )


@st.composite
def cross_cases(draw: st.DrawFn) -> Case:
    """Any call of queries with the keys of another sequence; strides of the two layouts need not be equal."""
    case = draw(cases())
    length, kv_length = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    return dataclasses.replace(
        case,
        length=length,
        kv_length=kv_length,
        mask=draw(cross_masks(length, kv_length)),
        layout=draw(st.sampled_from(LAYOUTS)),
        kv_layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from((None, 0.3, 0.0, -0.7))) if case.mechanism == "softmax" else case.scale,
    )


Part = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def mechanism_of(case: Case, tables: dict[str, torch.Tensor]) -> Mechanism:
    """The case's mechanism with these tensors."""
    match case.mechanism:
        case "hard":
            return ringattn.Hard(case.scale)
        case "linear":
            return ringattn.Linear()
    given: dict[str, Any] = {**case.scalars(), **tables}
    return ringattn.Softmax(**given)


def local_run(mesh: ringattn.Mesh, case: Case) -> Part:
    """One rank's part: the positions of its queries and keys, and its output, log-sum-exp and gradients."""
    own = ringattn.Sharding(case.length, mesh, case.layout, case.mask if case.kv_length is None else None)
    kv = own if case.kv_length is None else ringattn.Sharding(case.kv_length, mesh, case.kv_layout)
    inputs = zip((own, kv, kv, own, own), case.inputs(), strict=True)
    q, k, v, dout, dlse = (s.split(x, 2).clone() for s, x in inputs)
    tables = {name: (own.split(x, 1) if name == "bias" else x).clone() for name, x in case.tables().items()}
    leaves = {"q": q, "k": k, "v": v, **tables}
    for leaf in leaves.values():
        leaf.requires_grad_()
    call: dict[str, Any] = {"sharding": own, "kv_sharding": kv, "schedule": case.schedule, "kernel": case.kernel}
    mechanism = mechanism_of(case, tables)
    found: dict[str, torch.Tensor] = {}
    if "lse" in mechanism.extras:
        out, found["lse"] = ringattn.attention(q, k, v, case.mask, mechanism=mechanism, return_lse=True, **call)
    else:
        out = ringattn.attention(q, k, v, case.mask, mechanism=mechanism, **call)
    found["out"] = out
    loss = (out * dout).sum()
    if case.use_lse:
        loss = loss + (found["lse"].masked_fill(~found["lse"].isfinite(), 0) * dlse).sum()
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        found[f"d{name}"] = leaf.grad
    return own.positions, kv.positions, {name: x.detach() for name, x in found.items()}


def gathered(case: Case, parts: list[Part]) -> dict[str, torch.Tensor]:
    """The ranks' parts: put together in order of position, and of replicated tensors summed."""
    orders = []
    sides = [part[0] for part in parts], [part[1] for part in parts]
    for side, length in zip(sides, (case.length, case.keys), strict=True):
        positions = torch.cat(side)
        assert sorted(positions.tolist()) == list(range(length))
        orders.append(positions.argsort())
    out = {}
    for name in parts[0][2]:
        every = [part[2][name] for part in parts]
        if name in ("dsinks", "dalibi", "drelative"):
            out[name] = torch.stack([x.double() for x in every]).sum(dim=0)
        else:
            dim = 1 if name == "dbias" else 2
            out[name] = torch.cat(every, dim=dim).index_select(dim, orders[name in ("dk", "dv")])
    return out


def oracle(case: Case) -> reference.Evaluation:
    """The float64 answer, from the inputs as rounded to the case's dtype."""
    q, k, v, dout, dlse = (x.double().numpy() for x in case.inputs())
    allowed = case.allowed().numpy()
    match case.mechanism:
        case "hard":
            return reference.hard(q, k, v, allowed, dout, scale=case.scale)
        case "linear":
            return reference.linear(q, k, v, allowed, dout)
    tables = {name: x.double().numpy() for name, x in case.tables().items()}
    return reference.evaluate(q, k, v, allowed, dout, dlse, **case.scalars(), **tables)


def errors(found: dict[str, torch.Tensor], expected: reference.Evaluation) -> dict[str, float]:
    """‖error‖ / ‖A‖ of the output and every gradient; of the log-sum-exp, relative to 1 + |lse|."""
    gradients, sizes = expected.gradients, expected.magnitudes
    pairs: dict[str, tuple[Any, Any]] = {
        "out": (expected.out, sizes.out),
        "lse": (expected.lse, 1 + abs(expected.lse)),
        "dq": (gradients.dq, sizes.dq),
        "dk": (gradients.dk, sizes.dk),
        "dv": (gradients.dv, sizes.dv),
        **{f"d{name}": (x, sizes.params[name]) for name, x in gradients.params.items()},
    }
    return {name: reference.error(x.double().numpy(), *pairs[name]) for name, x in found.items()}


def simulated(case: Case) -> dict[str, torch.Tensor]:
    """The case on virtual ranks."""
    return gathered(case, ringattn.simulate(local_run, case, ring=case.ranks).results)


def single_device(case: Case) -> dict[str, torch.Tensor]:
    """PyTorch's own attention in the case's dtype, for what low precision can be asked of. Needs reachable rows."""
    *inputs, dout, _ = case.inputs()
    q, k, v = (x.requires_grad_() for x in inputs)
    allowed = case.allowed()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
    (out * dout).sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
