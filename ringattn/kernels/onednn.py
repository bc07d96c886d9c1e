"""The onednn kernel: softmax on CPUs by oneDNN's matrix products, in two thirds of the time of PyTorch's flash kernel.

PyTorch's CPU flash kernel spends nine tenths of its time in MKL's products, which reach half of what oneDNN's do on
processors that are not Intel's; PyTorch holds both. Here a block of scores is one large product, a few passes in base
2, whose exponential is the fast one, and another product. The state is carried from block to block, so that nothing
is merged:

    S = q k^T        m' = max(m, rowmax S)        P = 2^(S - m')        l' = 2^(m - m') l + rowsum P
    O' = 2^(m - m') O + P v

(FlashAttention-2, arXiv 2307.08691, section 3.1; backward section 3.2.2, with S transposed, so that all products but
one read their operands as they lie). The arithmetic is float32, whatever the inputs, so that in bfloat16 results are
more exact than the flash kernel's.

Shapes: N pieces that are alike, h key heads, G query heads to each, m query rows and n keys of a piece, D and Dv dims
of a head; P = N h, r rows and c keys of a block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch

from ringattn.kernels.base import Kernel
from ringattn.kernels.lowering import Batch, Place, banded, places
from ringattn.mechanisms.base import Arriving, Params, Problem, State
from ringattn.mechanisms.softmax import Softmax
from ringattn.tiles import Tiles

MOST = 4096  # rows of all pieces of a batch
LOG2_E = math.log2(math.e)

Hidden = tuple[slice, torch.Tensor]
"""Columns of a block that an edge of the band crosses, and which pairs of the block's rows and those it leaves out."""


@dataclasses.dataclass(frozen=True)
class OneDNN(Kernel):
    """Matrix products and passes over blocks of scores.

    Attributes:
        rows, columns: queries, of all heads of a group, and keys of a block: 1 MiB of scores.
        least: rows and columns from which oneDNN's product is the faster one.
        grain: oneDNN compiles a product for each shape it meets: its sides are multiples of this, so that they are few.
    """

    rows: int = 256
    columns: int = 1024
    least: int = 256
    grain: int = 128

    def serves(self, problem: Problem) -> bool:
        return isinstance(problem.mechanism, Softmax) and problem.device.type == "cpu"

    def refuses(self, problem: Problem) -> str | None:
        mechanism = problem.mechanism
        if not isinstance(mechanism, Softmax):
            return f"onednn computes Softmax; got {mechanism}"
        if problem.device.type != "cpu":
            return f"onednn runs on CPUs; got {problem.device}"
        if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
            return "onednn needs a PyTorch that was built with oneDNN"
        if problem.dtype == torch.float64:
            return "onednn computes in float32; got float64"
        if problem.allows is not None:
            return "onednn knows bands of pairs; the mask holds a predicate"
        names = {"alibi": "ALiBi", "relative": "relative position bias", "bias": "additive bias"}
        for field, name in names.items():
            if getattr(mechanism, field) is not None:
                return f"onednn has no {name}: scores with position terms are float64"
        return "onednn has no dropout that can be replayed from global positions" if mechanism.dropout else None

    def forward(
        self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, state: State | None
    ) -> State:
        state = problem.mechanism.empty(problem, q.shape[2]) if state is None else state
        scores = _Scores.of(problem)
        for part in self._parts(problem, tiles):
            self._attend(part, scores, part.queries(q), part.keys(k), part.keys(v), *map(part.queries, state))
        return state

    def backward(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        arriving: Arriving,
        tiles: Tiles,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dparams: Params,
    ) -> None:
        scores = _Scores.of(problem)
        for part in self._parts(problem, tiles):
            inputs, output = (part.queries(q), part.keys(k), part.keys(v)), arriving.of(part.queries, torch.float32)
            places = part.queries, part.keys, part.keys
            self._attend_grad(part, scores, *inputs, output, *(at(x) for at, x in zip(places, gradients, strict=True)))

    def _parts(self, problem: Problem, tiles: Tiles) -> Iterator[_Part]:
        """Large pieces one by one and head by head, small ones as many at once as fill a block."""
        group = problem.heads // problem.kv_heads
        for batch in tiles.derive(banded, MOST):
            size = group * batch.m * batch.n
            large = min(group * batch.m, batch.n) >= self.least
            heads = 1 if large else max(1, min(problem.kv_heads, self.rows * self.columns // (size * batch.count)))
            count = batch.count if batch.count > 1 else problem.batch
            step = 1 if large else count
            for place in places(batch, problem.batch):
                for piece in range(0, count, step):
                    for head in range(0, problem.kv_heads, heads):
                        upto = min(head + heads, problem.kv_heads)
                        yield _Part(batch, place, slice(piece, piece + step), slice(head, upto), group)

    def _blocks(self, part: _Part) -> Iterator[tuple[slice, list[tuple[slice, list[Hidden]]]]]:
        """Rows, and blocks of the columns that the band leaves of them."""
        band = part.batch
        # rows of all heads of a group make a block; what is left over comes where a causal band has the fewest keys
        most = self.rows // part.group if self.rows % part.group == 0 else self.grain
        for rows in _slices(0, band.m % most, band.m, most):
            start, stop = max(0, rows.start - band.high), min(band.n, rows.stop - band.low)
            if stop - start >= self.least:
                # keys beyond the band that make the columns whole grains cost less than a product of another shape
                stop = min(band.n, stop + (start - stop) % self.grain)
                start = max(0, start - (start - stop) % self.grain)
            second = start + ((stop - start) % self.grain if stop - start >= self.least else stop - start)
            yield rows, [(cut, part.hidden(rows, cut)) for cut in _slices(start, second, stop, self.columns)]

    def _attend(
        self,
        part: _Part,
        scores: _Scores,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Merges what the part's keys contribute into out ``[N, h, G, m, Dv]`` and lse ``[N, h, G, m]``."""
        for rows, blocks in self._blocks(part):
            queries = _rows(q, rows) * scores.factor
            so_far = _rows(lse, rows).double() * LOG2_E
            # finite, so that a row which sees no key of a block, or has not seen any yet, takes no -inf from -inf
            peak = so_far.float().clamp_(min=torch.finfo(torch.float32).min)
            total = torch.exp2(so_far - peak).float()  # 1 but for the rounding of peak; 0 where no key was seen
            values = _rows(out, rows) * total.unsqueeze(-1)
            for columns, hidden in blocks:
                block = self._product(queries, _columns(k, columns))
                scores.bend(block)
                for crossed, outside in hidden:
                    block.unflatten(1, (part.group, -1))[..., crossed].masked_fill_(outside, -math.inf)
                higher = torch.maximum(peak, block.amax(-1))
                weights = torch.exp2(block.sub_(higher.unsqueeze(-1)), out=block)
                shrink = torch.exp2(peak - higher)
                total.mul_(shrink).add_(weights.sum(-1))
                values.mul_(shrink.unsqueeze(-1)).add_(self._product(weights, _columns(v, columns).transpose(1, 2)))
                peak = higher
            values /= total.unsqueeze(-1)
            total = (peak.double() + total.double().log2_()) / LOG2_E
            for whole, rest in ((out[..., rows, :], values), (lse[..., rows], total)):
                whole.copy_(rest.view(whole.shape))

    def _attend_grad(
        self,
        part: _Part,
        scores: _Scores,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        arriving: Arriving,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> None:
        """Adds the part's contributions to the gradients of its queries, keys and values."""
        (out, lse), dout, dlse = arriving.saved, arriving.dout, arriving.dextras[0]
        for rows, blocks in self._blocks(part):
            queries = _rows(q, rows) * scores.factor
            exact = _rows(lse, rows).double() * LOG2_E
            level = exact.float()
            # weights are taken from a rounded log-sum-exp; what they are multiplied with makes up for it
            rounding = torch.exp2(level - exact).float()
            given = _rows(dout, rows) * rounding.unsqueeze(-1)
            delta = (given * _rows(out, rows)).sum(-1)
            if dlse is not None:
                delta -= _rows(dlse, rows) * rounding
            total = torch.zeros_like(queries).transpose(1, 2)
            for columns, hidden in blocks:
                keys = _columns(k, columns)
                block = self._product(keys, queries)
                slope = scores.bend(block)
                for crossed, outside in hidden:
                    block.unflatten(2, (part.group, -1))[:, crossed].masked_fill_(outside.t().unsqueeze(1), -math.inf)
                weights = torch.exp2(block.sub_(level.unsqueeze(1)), out=block)
                _add(dv, columns, self._product(weights, given.transpose(1, 2)))
                dscores = self._product(_columns(v, columns), given).sub_(delta.unsqueeze(1)).mul_(weights)
                if slope is not None:
                    dscores *= slope
                # scores are in base 2: what their factor has to do with that is taken back
                _add(dk, columns, self._product(dscores, queries.transpose(1, 2)), 1 / LOG2_E)
                total += self._product(keys.transpose(1, 2), dscores.transpose(1, 2))
            _add(dq, rows, total.transpose(1, 2), scores.factor / LOG2_E)

    def _product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``x y^T`` of ``[P, a, d]`` and ``[P, b, d]``."""
        if x.shape[0] > 1:
            return torch.bmm(x, y.transpose(1, 2))
        _, *sides = sorted((x.shape[1], y.shape[1], x.shape[2]))
        whole = sides[0] >= self.least and all(side % self.grain == 0 for side in sides)
        return (_linear if whole else torch.nn.functional.linear)(x[0], y[0]).unsqueeze(0)

    def __str__(self) -> str:
        return "onednn"


@dataclasses.dataclass(frozen=True)
class _Part:
    """Pieces and key heads of a batch that are computed together."""

    batch: Batch
    places: tuple[Place, Place]
    pieces: slice
    heads: slice
    group: int

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, h, G, m, …]``."""
        heads = slice(self.heads.start * self.group, self.heads.stop * self.group)
        taken: torch.Tensor = self.places[0](x)[self.pieces, heads].unflatten(1, (-1, self.group))
        return taken

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, h, n, …]``."""
        return self.places[1](x)[self.pieces, self.heads]

    def hidden(self, rows: slice, columns: slice) -> list[Hidden]:
        """What of a block lies beyond the band: pairs with i - j below its low, to the right, or above its high."""
        beyond = (
            (max(columns.start, rows.start - self.batch.low + 1), columns.stop),
            (columns.start, min(columns.stop, rows.stop - 1 - self.batch.high)),
        )
        out = []
        for side, (start, stop) in enumerate(beyond):
            if start < stop:
                offset = torch.arange(rows.start, rows.stop).unsqueeze(1) - torch.arange(start, stop)
                outside = offset > self.batch.high if side else offset < self.batch.low
                out.append((slice(start - columns.start, stop - columns.start), outside))
        return out


@dataclasses.dataclass(frozen=True)
class _Scores:
    """What makes scores of products, in base 2: the queries' factor, and the soft cap."""

    factor: float
    cap: float | None

    @staticmethod
    def of(problem: Problem) -> _Scores:
        mechanism = problem.mechanism
        assert isinstance(mechanism, Softmax)
        cap = None if mechanism.softcap is None else mechanism.softcap * LOG2_E
        return _Scores(mechanism.scale_for(problem) * LOG2_E, cap)

    def bend(self, products: torch.Tensor) -> torch.Tensor | None:
        """The soft cap, in place. Returns its derivative, None where there is none to tell."""
        if self.cap is None:
            return None
        products.div_(self.cap).tanh_()
        slope = 1 - products * products
        products.mul_(self.cap)
        return slope


def _linear(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x y^T`` by oneDNN."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return product


def _rows(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of ``[N, h, G, m, …]`` as ``[P, G r, …]`` in float32: those of one query head after another."""
    return x[:, :, :, rows].float().flatten(2, 3).flatten(0, 1)


def _columns(x: torch.Tensor, columns: slice) -> torch.Tensor:
    """Keys of ``[N, h, n, D]`` as ``[P, c, D]`` in float32, one after another."""
    return x[:, :, columns].float().flatten(0, 1).contiguous()


def _add(total: torch.Tensor, at: slice, part: torch.Tensor, factor: float = 1) -> None:
    """Adds ``[P, G r, D]`` to rows of ``[N, h, G, m, D]``, or ``[P, c, D]`` to keys of ``[N, h, n, D]``."""
    place = total[..., at, :]
    place.add_(part.reshape(place.shape), alpha=factor)


def _slices(start: int, second: int, stop: int, step: int) -> list[slice]:
    """From start to stop, cut at ``second`` and at every step after it."""
    cuts = sorted({start, *range(second, stop, step), stop})
    return [slice(*ends) for ends in itertools.pairwise(cuts)]
