"""The onednn kernel: softmax on CPUs by oneDNN's matrix products, in two thirds of the time of PyTorch's flash kernel.

PyTorch's CPU flash kernel spends nine tenths of its time in MKL's products, which reach half of what oneDNN's do on
processors that are not Intel's; PyTorch holds both. Here a block of scores is one large product, a few passes in base
2, whose exponential is the fast one, and another product. The state is carried from block to block, so that nothing
is merged:

    S = q k^T        m' = max(m, rowmax S)        P = 2^(S - m')        l' = 2^(m - m') l + rowsum P
    O' = 2^(m - m') O + P v

(FlashAttention-2, arXiv 2307.08691, section 3.1; backward section 3.2.2, with S transposed, so that all products but
one read their operands as they lie). Scores and outputs are computed in float32, whatever the inputs.

Shapes: N equal rectangles, h key heads, G query heads to each, m query rows and n keys of a rectangle, D and Dv dims of
a head; P = N h, r rows and c keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch

from ringattn.kernels.base import Kernel
from ringattn.kernels.lowering import Launch, TileGroup, banded, launches
from ringattn.mechanisms.base import OutputGrad, Params, Problem, State
from ringattn.mechanisms.softmax import Softmax
from ringattn.plans.tiles import Tiles

COMPUTED = ("scale", "softcap", "sinks", "seed")
"""Fields of Softmax; sinks come in when all blocks are merged, seeds with dropout."""
MAX_ROWS = 4096
"""Of all rectangles of a group."""
LOG2_E = math.log2(math.e)

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of q, k and v, or of their gradients."""
Masked = tuple[slice, torch.Tensor]
"""Columns of a block that an edge of the band crosses, and which pairs of the block's rows and those it leaves out."""
RowBlocks = tuple[slice, list[tuple[slice, list[Masked]]]]
"""Rows of a rectangle, and blocks of the columns that the band leaves of them."""
BandMask = Callable[[int, int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class OneDNN(Kernel):
    """Matrix products and passes over blocks of scores.

    Attributes:
        rows, columns: queries, of all heads of a group, and keys of a block: 1 MiB of scores.
        min_block: rows and columns from which oneDNN's product is the faster one.
        multiple_of: oneDNN compiles a product for each shape it meets: so that they are few, its sides are multiples of
            this.
    """

    rows: int = 256
    columns: int = 1024
    min_block: int = 256
    multiple_of: int = 128

    def supports(self, problem: Problem) -> bool:
        return isinstance(problem.mechanism, Softmax) and problem.device.type == "cpu"

    def refusal(self, problem: Problem) -> str | None:
        mechanism = problem.mechanism
        if type(mechanism) is not Softmax:  # what is made of it may change anything
            return f"onednn computes Softmax itself; got {mechanism}"
        if problem.device.type != "cpu":
            return f"onednn runs on CPUs; got {problem.device}"
        if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
            return "onednn needs a PyTorch that was built with oneDNN"
        if problem.dtype == torch.float64:
            return "onednn computes in float32; got float64"
        if problem.allows is not None:
            return "onednn knows bands of pairs; the mask holds a predicate"
        for term in mechanism.beyond(COMPUTED):
            return f"onednn has no {term}: its scores are scaled products and their soft cap, in float32"
        return None

    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        state = problem.mechanism.empty(problem, q.shape[2]) if state is None else state
        scores = _Scores.from_problem(problem)
        for part in self._parts(problem, tiles):
            self._attend(part, scores, part.select(q, k, v), *map(part.queries, state))
        return state

    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output_grad: OutputGrad,
        tiles: Tiles,
        gradients: Triple,
        dparams: Params,
    ) -> None:
        wants = problem.wants("q"), problem.wants("k"), problem.wants("v")
        if not any(wants):
            return
        scores = _Scores.from_problem(problem)
        for part in self._parts(problem, tiles):
            output = output_grad.select(part.queries, problem.dtype)  # as they are
            self._attend_grad(part, scores, part.select(q, k, v), output, part.select(*gradients), wants)

    def _parts(self, problem: Problem, tiles: Tiles) -> list[_Part]:
        return tiles.memo(_lowered_parts, self, problem.heads // problem.kv_heads, problem.kv_heads, problem.batch)

    def _attend(self, part: _Part, scores: _Scores, inputs: Triple, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merges what the part's keys contribute into out ``[N, h, G, m, Dv]`` and lse ``[N, h, G, m]``."""
        q, k, v = inputs
        for rows, blocks in part.blocks:
            queries = _query_block(q, rows) * scores.factor
            running = _Running(_query_block(out, rows), _query_block(lse, rows))
            for columns, masked in blocks:
                by_onednn = self._by_onednn(queries, columns)
                block = _product(queries, _key_block(k, columns), by_onednn)
                scores.apply_softcap(block)
                _mask_fill(block.unflatten(1, (part.group, -1)), masked)
                running.add(block, _key_block(v, columns), by_onednn)
                del block  # its memory is the next one's
            for place, updated in zip((out[..., rows, :], lse[..., rows]), running.state(), strict=True):
                place.copy_(updated.view(place.shape))

    def _attend_grad(
        self,
        part: _Part,
        scores: _Scores,
        inputs: Triple,
        output_grad: OutputGrad,
        gradients: Triple,
        wants: tuple[bool, bool, bool],
    ) -> None:
        """Adds the part's contributions to the gradients of its queries, keys and values, of those that are wanted."""
        (q, k, v), (dq, dk, dv), (wants_q, wants_k, wants_v) = inputs, gradients, wants
        for rows, blocks in part.blocks:
            queries = _query_block(q, rows)
            output = _OutputRows.make(output_grad.select(functools.partial(_query_block, rows=rows), torch.float32))
            scaled, total = queries * scores.factor, torch.zeros_like(queries).transpose(1, 2)
            for columns, masked in blocks:
                by_onednn, keys = self._by_onednn(scaled, columns), _key_block(k, columns)
                weights = _product(keys, scaled, by_onednn)
                slope = scores.apply_softcap(weights)
                _mask_fill(weights.unflatten(2, (part.group, -1)).permute(0, 2, 3, 1), masked)
                torch.exp2(weights.sub_(output.lse), out=weights)
                # what is left are sums of products: their operands may be as narrow as the inputs are
                dtype, dscores = scores.product_dtype if by_onednn else torch.float32, None
                if wants_q or wants_k:
                    dscores = _product(_key_block(v, columns), output.dout, by_onednn).sub_(output.delta).mul_(weights)
                    dscores = (dscores if slope is None else dscores.mul_(slope)).to(dtype)
                if wants_v:
                    weights = weights.to(dtype)
                    _accumulate(dv, columns, _product(weights, output.dout.to(dtype).transpose(1, 2), by_onednn))
                if dscores is not None and wants_k:
                    part_k = _product(dscores, queries.to(dtype).transpose(1, 2), by_onednn)
                    _accumulate(dk, columns, part_k, scores.scale)
                if dscores is not None and wants_q:
                    total += _product(keys.to(dtype).transpose(1, 2), dscores.transpose(1, 2), by_onednn)
                del weights, dscores, slope  # their memory is the next ones'
            if wants_q:
                _accumulate(dq, rows, total.transpose(1, 2), scores.scale)

    def _by_onednn(self, queries: torch.Tensor, columns: slice) -> bool:
        """Whether a block of these queries and columns is one that oneDNN's product is for."""
        count, *sides = queries.shape[0], queries.shape[1], columns.stop - columns.start
        return count == 1 and all(side >= self.min_block and side % self.multiple_of == 0 for side in sides)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Rectangles of a launch, and key heads, that are computed together."""

    launch: Launch
    rectangles: slice
    heads: slice
    group: int
    blocks: list[RowBlocks]

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, h, G, m, …]``."""
        heads = slice(self.heads.start * self.group, self.heads.stop * self.group)
        taken: torch.Tensor = self.launch.queries(x)[self.rectangles, heads].unflatten(1, (-1, self.group))
        return taken

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, h, n, …]``."""
        return self.launch.keys(x)[self.rectangles, self.heads]

    def select(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Triple:
        """What is computed together of these, or of their gradients."""
        return self.queries(q), self.keys(k), self.keys(v)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """What makes scores of products, in base 2: the queries' factor, which is the scale's, and the soft cap.

    Gradients of bfloat16 inputs are sums of bfloat16 products where the processor has them, as in the flash kernel.
    """

    scale: float
    cap: float | None
    product_dtype: torch.dtype

    @staticmethod
    def from_problem(problem: Problem) -> _Scores:
        mechanism = problem.mechanism
        assert isinstance(mechanism, Softmax)
        cap = None if mechanism.softcap is None else mechanism.softcap * LOG2_E
        has_bfloat16 = problem.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return _Scores(mechanism.scale_for(problem), cap, torch.bfloat16 if has_bfloat16 else torch.float32)

    @property
    def factor(self) -> float:
        return self.scale * LOG2_E

    def apply_softcap(self, products: torch.Tensor) -> torch.Tensor | None:
        """The soft cap, in place. Returns its derivative, None where there is none to tell."""
        if self.cap is None:
            return None
        products.div_(self.cap).tanh_()
        slope = 1 - products * products
        products.mul_(self.cap)
        return slope


class _Running:
    """The softmax of some rows so far, in base 2, as at the top of this file: m, l and O, not divided by l."""

    def __init__(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        so_far = lse.double() * LOG2_E
        # finite, so that a row which sees no key of a block, or has not seen any yet, takes no -inf from -inf
        self._m = so_far.float().clamp_(min=torch.finfo(torch.float32).min)
        self._l = torch.exp2(so_far - self._m).float()  # 1 but for the rounding of m; 0 before any key
        self._out = out * self._l.unsqueeze(-1)

    def add(self, scores: torch.Tensor, v: torch.Tensor, by_onednn: bool) -> None:
        """Adds a block's keys. Its scores ``[P, G r, c]`` are overwritten."""
        m = torch.maximum(self._m, scores.amax(-1))
        weights = torch.exp2(scores.sub_(m.unsqueeze(-1)), out=scores)
        alpha = torch.exp2(self._m - m)
        self._l.mul_(alpha).add_(weights.sum(-1))
        self._out.mul_(alpha.unsqueeze(-1)).add_(_product(weights, v.transpose(1, 2), by_onednn))
        self._m = m

    def state(self) -> State:
        """Output and log-sum-exp."""
        l_exact = self._l.double()
        return self._out / self._l.unsqueeze(-1), (self._m + l_exact.log2_()) / LOG2_E


@dataclasses.dataclass(frozen=True)
class _OutputRows:
    """The output side of some rows, beside a block of weights ``[P, c, G r]``.

    Weights are taken from a log-sum-exp that is rounded in base 2. All that they are multiplied with, dout and
    ``delta = rowsum(dO o O) - dlse``, makes up for it.

    Attributes:
        dout: ``[P, G r, Dv]``.
        lse, delta: ``[P, 1, G r]``; lse in base 2.
    """

    dout: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor

    @staticmethod
    def make(output_grad: OutputGrad) -> _OutputRows:
        """Of rows ``[P, G r, …]``."""
        (out, lse), dlse = output_grad.saved, output_grad.grad_extras[0]
        exact = lse.double() * LOG2_E
        rounded = exact.float()
        correction = torch.exp2(rounded - exact).float()
        dout = output_grad.dout * correction.unsqueeze(-1)
        delta = (dout * out).sum(-1)
        if dlse is not None:
            delta -= dlse * correction
        return _OutputRows(dout, rounded.unsqueeze(1), delta.unsqueeze(1))


def _lowered_parts(tiles: Tiles, kernel: OneDNN, group: int, kv_heads: int, sequences: int) -> list[_Part]:
    """Large rectangles one by one and head by head, small ones as many at once as fill a block."""
    # rows of all heads of a group make a block
    rows = kernel.rows // group if kernel.rows % group == 0 else kernel.multiple_of

    @functools.cache
    def band_mask(sign: int, bound: int) -> torch.Tensor:
        """Pairs with ``sign (i - j) < bound``: the same few edges cross block after block."""
        return sign * (torch.arange(rows).unsqueeze(1) - torch.arange(rows + kernel.multiple_of)) < bound

    parts = []
    for band in banded(tiles, MAX_ROWS):
        blocks = list(_blocks(band, kernel, rows, band_mask))
        large = min(group * band.m, band.n) >= kernel.min_block
        size = group * band.m * band.n
        heads = 1 if large else max(1, min(kv_heads, kernel.rows * kernel.columns // (size * band.count)))
        count = band.count if band.count > 1 else sequences
        step = 1 if large else count
        parts += [
            _Part(launch, slice(first, first + step), slice(head, min(head + heads, kv_heads)), group, blocks)
            for launch in launches([band], sequences)
            for first in range(0, count, step)
            for head in range(0, kv_heads, heads)
        ]
    return parts


def _blocks(band: TileGroup, kernel: OneDNN, max_rows: int, band_mask: BandMask) -> Iterator[RowBlocks]:
    """What is left over of the rows comes first, where a causal band has the fewest keys."""
    for rows in _slices(0, band.m % max_rows, band.m, max_rows):
        start, stop = max(0, rows.start - band.high), min(band.n, rows.stop - band.low)
        if stop - start >= kernel.min_block:
            # keys beyond the band that make the columns a multiple cost less than a product of another shape
            stop = min(band.n, stop + (start - stop) % kernel.multiple_of)
            start = max(0, start - (start - stop) % kernel.multiple_of)
        large = stop - start >= kernel.min_block
        second = start + ((stop - start) % kernel.multiple_of if large else stop - start)
        cuts = _slices(start, second, stop, kernel.columns)
        yield rows, [(columns, _masked(band, rows, columns, band_mask)) for columns in cuts]


def _masked(band: TileGroup, rows: slice, columns: slice, band_mask: BandMask) -> list[Masked]:
    """What of a block lies beyond the band: pairs with i - j below its low, to the right, or above its high."""
    below = max(columns.start, rows.start - band.low + 1), columns.stop
    above = columns.start, min(columns.stop, rows.stop - 1 - band.high)
    out = []
    for sign, bound, (start, stop) in ((1, band.low, below), (-1, -band.high, above)):
        if start < stop:
            pairs = band_mask(sign, bound - sign * (rows.start - start))
            crossed = slice(start - columns.start, stop - columns.start)
            out.append((crossed, pairs[: rows.stop - rows.start, : stop - start]))
    return out


def _mask_fill(block: torch.Tensor, masked: list[Masked]) -> None:
    """Sets the scores ``[P, G, r, c]`` of pairs beyond the band to -inf."""
    for columns, pairs in masked:
        block[..., columns].masked_fill_(pairs, -math.inf)


def _product(x: torch.Tensor, y: torch.Tensor, by_onednn: bool) -> torch.Tensor:
    """``x y^T`` of ``[P, a, d]`` and ``[P, b, d]``."""
    return _linear(x[0], y[0]).unsqueeze(0) if by_onednn else torch.bmm(x, y.transpose(1, 2))


def _linear(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x y^T`` by oneDNN."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return product


def _query_block(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of ``[N, h, G, m, …]`` as ``[P, G r, …]`` in float32: those of one query head after another."""
    return x[:, :, :, rows].float().flatten(2, 3).flatten(0, 1)


def _key_block(x: torch.Tensor, columns: slice) -> torch.Tensor:
    """Keys of ``[N, h, n, D]`` as ``[P, c, D]`` in float32, one after another."""
    return x[:, :, columns].float().flatten(0, 1).contiguous()


def _accumulate(total: torch.Tensor, at: slice, part: torch.Tensor, factor: float = 1) -> None:
    """Adds ``[P, G r, D]`` to rows of ``[N, h, G, m, D]``, or ``[P, c, D]`` to keys of ``[N, h, n, D]``."""
    place = total[..., at, :]
    place.add_(part.reshape(place.shape), alpha=factor)


def _slices(start: int, second: int, stop: int, step: int) -> list[slice]:
    """From start to stop, cut at ``second`` and at every step after it."""
    cuts = sorted({start, *range(second, stop, step), stop})
    return [slice(*ends) for ends in itertools.pairwise(cuts)]
