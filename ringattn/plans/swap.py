"""Swaps: heads for sequence among the ranks of a group, and back.

Ranks that are neighbours on the ulysses axis are a *group*, which holds what its *members* hold. For every slice of
heads there are two all-to-alls among the members. Outward, each gives every other its tokens of that one's heads, q, k
and v in one message. Homeward, each gives every other that one's tokens of its own heads. Backward it is the same with
the gradient of the output outward and those of q, k and v homeward, where those of key heads that several members have
read are added up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ringattn import layouts
from ringattn.bands import Array
from ringattn.declared import Collective
from ringattn.errors import PlanError
from ringattn.plans.deal import Deal, Part, is_shared
from ringattn.plans.shape import GradientWire, Shape

INPUTS, OUTPUT, RESULTS, OUTPUT_GRAD, INPUT_GRADS = ("q", "kv"), ("out",), ("out", "kept"), ("dout",), ("dq", "dkv")
"""What travels in one message, as `Swap.bytes` knows it."""


class Message(NamedTuple):
    """What goes to a member, or comes from it, in one all-to-all.

    Attributes:
        peer: the member's rank of the sequence.
        tokens, key_tokens: how many queries and keys.
        parts: of which heads.
    """

    peer: int
    tokens: int
    key_tokens: int
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Swap:
    """One rank's part in the all-to-alls of a call.

    Attributes:
        rank: of the sequence.
        dealt: the parts of the heads, by slice, of every member.
        q_rows, k_rows: where the members' queries and keys lie among the group's: runs of rows ``(rank, own row, the
            group's row, count)``, sorted by rank.
        keep: whether what came outward is kept for the backward pass; otherwise it is exchanged again.
        gradient_wire: the dtype of gradients that are added up at home.
    """

    rank: int
    dealt: Deal
    q_rows: Array
    k_rows: Array
    keep: bool
    gradient_wire: GradientWire

    @property
    def members(self) -> range:
        """The ranks of this one's group."""
        first = self.rank - self.rank % len(self.dealt)
        return range(first, first + len(self.dealt))

    @property
    def place(self) -> int:
        """This rank's, in its group."""
        return self.rank % len(self.dealt)

    @property
    def slices(self) -> int:
        """Into how many slices heads are cut."""
        return len(self.dealt[0])

    def share(self, parts: Sequence[Part]) -> float:
        """How many heads these have, of those of the rank that has most."""
        most = max(sum(part.heads for parts in own for part in parts) for own in self.dealt)
        return sum(part.heads for part in parts) / most

    @property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """This rank's parts of the heads, by slice."""
        return self.dealt[self.place]

    @functools.cached_property
    def group(self) -> int:
        """How many query heads read one key head."""
        last = self.dealt[-1][-1][-1] if self.dealt[-1][-1] else self.dealt[-1][0][-1]
        return last.stop // last.kv_stop

    @property
    def adds_up(self) -> bool:
        """Whether gradients of key heads are added up at home."""
        return any(is_shared(part, self.group) for own in self.dealt for parts in own for part in parts)

    def outward(self, nth: int) -> tuple[list[Message], list[Message]]:
        """What this rank gives and gets in the all-to-all before a slice."""
        own = self.counts(self.place)
        others = [(at, peer) for at, peer in enumerate(self.members) if at != self.place]
        given = [Message(peer, *own, self.dealt[at][nth]) for at, peer in others]
        return given, [Message(peer, *self.counts(at), self.parts[nth]) for at, peer in others]

    def homeward(self, nth: int) -> tuple[list[Message], list[Message]]:
        """What this rank gives and gets in the all-to-all after a slice: what `outward` says, turned round."""
        given, got = self.outward(nth)
        return got, given

    def collective(self, nth: int) -> Collective | None:
        """What both all-to-alls of a slice are declared to be; nothing where some member has nothing to give or get.

        Every member has tokens, of queries and of keys, and heads of the slice: no message is empty, whatever it holds.
        """
        complete = all(own[nth] for own in self.dealt) and all(map(all, self._tokens))
        return "all_to_all" if complete else None

    def counts(self, place: int) -> tuple[int, int]:
        """How many queries and keys a member holds."""
        return self._tokens[0][place], self._tokens[1][place]

    @property
    def all_tokens(self) -> tuple[int, int]:
        """Queries and keys of the group."""
        return sum(self._tokens[0]), sum(self._tokens[1])

    @functools.cached_property
    def _tokens(self) -> list[list[int]]:
        """Queries of each member, and keys."""
        found = []
        for rows in (self.q_rows, self.k_rows):
            held = np.bincount(rows[:, 0] - self.members.start, weights=rows[:, 3], minlength=len(self.members))
            found.append([int(x) for x in held])
        return found

    def runs(self, rank: int, of_keys: bool) -> list[tuple[int, int, int]]:
        """Where one member's rows lie among the group's: ``(own row, the group's row, count)``."""
        return self._runs[of_keys][rank]

    @functools.cached_property
    def _runs(self) -> list[dict[int, list[tuple[int, int, int]]]]:
        """Of queries, and of keys: those of each member."""
        found: list[dict[int, list[tuple[int, int, int]]]] = []
        for rows in (self.q_rows, self.k_rows):
            found.append({rank: [] for rank in self.members})
            for rank, own, there, length in rows.tolist():
                found[-1][rank].append((own, there, length))
        return found

    def bytes(self, shape: Shape, message: Message, what: Sequence[str]) -> int:
        """Bytes of one message that holds these."""
        return sum(self._part_bytes(shape, message, part, what) for part in message.parts)

    def _part_bytes(self, shape: Shape, message: Message, part: Part, what: Sequence[str]) -> int:
        queries, keys = message.tokens * part.heads, message.key_tokens * part.kv_heads
        summed = self.gradient_wire == "float32" and is_shared(part, self.group)
        sizes = {
            "q": queries * shape.dim * shape.itemsize,
            "kv": keys * (shape.dim + shape.value_dim) * shape.itemsize,
            "out": queries * shape.value_dim * shape.itemsize,
            "kept": queries * shape.kept,
            "dout": queries * shape.value_dim * shape.itemsize,
            "dq": queries * shape.dim * shape.itemsize,
            "dkv": keys * (shape.dim + shape.value_dim) * (shape.accumulator if summed else shape.itemsize),
        }
        return shape.batch * sum(sizes[name] for name in what)

    def verify(self, queries: Array, keys: Array, q_spans: Array, k_spans: Array, heads: int | None) -> None:
        """Checks that all heads are dealt once, and that all tokens of the group have one row each.

        Args:
            queries, keys: the positions of the group's rows.
            q_spans, k_spans: who holds which queries and keys.
            heads: query heads, where they are known.

        Raises:
            PlanError: says what is wrong.
        """
        dealt = [part for own in self.dealt for parts in own for part in parts]
        given = [head for part in dealt for head in range(part.first, part.stop)]
        if given != list(range(len(given))) or (heads is not None and len(given) != heads):
            raise PlanError(f"Rank {self.rank}: query heads are not dealt once each, in order; got {given}.")
        for part in dealt:
            each = part.heads // part.kv_heads
            read = [head // self.group for head in range(part.first, part.stop)]
            if read != [part.kv_first + head // each for head in range(part.heads)]:
                raise PlanError(f"Rank {self.rank}: the query heads of {part} do not read its key heads.")
        self._verify_rows(False, q_spans, queries)
        self._verify_rows(True, k_spans, keys)

    def _verify_rows(self, of_keys: bool, spans: Array, group: Array) -> None:
        """Every row of the group is one member's, and every member's row has the position of one of the group's."""
        taken = np.zeros(len(group), dtype=np.int64)
        for member in self.members:
            own = layouts.positions(spans, member)
            found = np.full(len(own), -1, dtype=np.int64)
            for start, there, length in self.runs(member, of_keys):
                found[start : start + length] = group[there : there + length]
                taken[there : there + length] += 1
            if not np.array_equal(found, own):
                raise PlanError(f"Rank {self.rank}: not every row of rank {member} has one place in the group.")
        if (taken != 1).any():
            raise PlanError(f"Rank {self.rank}: the members' rows are not the {len(group)} of the group, once each.")

    def verify_alike(self, other: Swap) -> None:
        """Checks that another rank, of this group or another, deals and places alike.

        All members then do the same exchanges in the same order, and those of a ring, which are of ranks at one place
        in their groups, compute as many slices: matched exchanges cannot wait for each other in a circle unless those
        along the ring do.

        Raises:
            PlanError: says what is not alike.
        """
        if (self.dealt, self.keep, self.gradient_wire) != (other.dealt, other.keep, other.gradient_wire):
            raise PlanError(f"Rank {self.rank} and rank {other.rank} have not dealt the heads alike.")
        alike = np.array_equal(self.q_rows, other.q_rows) and np.array_equal(self.k_rows, other.k_rows)
        if self.members == other.members and not alike:
            raise PlanError(f"Rank {self.rank} and rank {other.rank} of its group place their tokens in other rows.")

    @property
    def described(self) -> str:
        """What is exchanged, in words."""
        heads = [f"{p.first} to {p.stop - 1}" if p.heads > 1 else f"{p.first}" for parts in self.parts for p in parts]
        slices = "at once" if self.slices == 1 else f"in {self.slices} slices"
        words = {self.collective(nth) for nth in range(self.slices)}
        slices += ", as all-to-alls" if words == {"all_to_all"} else ""
        return (
            f"exchanges heads for sequence with ranks {[r for r in self.members if r != self.rank]}, {slices}; "
            f"computes query heads {', '.join(heads) or 'none'}; keeps what was exchanged{'' if self.keep else ' not'}"
        )
