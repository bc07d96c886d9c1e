"""Findings: what an examination says, judged: which rank or link is unlike the others, in words."""

from __future__ import annotations

import collections
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator

from ringattn.diagnosis.examination import Examination
from ringattn.readable import readable_bytes, readable_seconds

SLOW_RANK = 0.67  # of the median rank's rate, below which a rank is slow
LATE = 5.0  # times the median latency of links of its kind
FAR = 1e-3  # seconds: what is less is late for nobody
NARROW = 0.4  # of the median bandwidth of links of its kind
FAR_APART = 2e-3  # seconds between hosts, which are less than a tenth of it apart where they share a room
SHORT = 8192  # tokens of a rank, which should hide what it receives
SKEW = 0.5  # seconds
SHOWN = 8  # links by name

Pair = tuple[int, int]
Table = tuple[tuple[float, ...], ...]


def findings(found: Examination) -> list[str]:
    """A sentence each; none where all ranks and links are alike."""
    return [*_ranks(found), *_links(found), *_clocks(found), *_versions(found), *_threads(found)]


def kinds(found: Examination) -> dict[str, list[Pair]]:
    """The pairs of ranks, those within a host and those between hosts."""
    pairs: dict[str, list[Pair]] = {"within a host": [], "between hosts": []}
    for first, second in itertools.combinations(range(found.size), 2):
        same = found.facts[first].host == found.facts[second].host
        pairs["within a host" if same else "between hosts"].append((first, second))
    return {kind: members for kind, members in pairs.items() if members}


def _ranks(found: Examination) -> Iterator[str]:
    for rank, speed in enumerate(found.speeds):
        others = [x for other, x in enumerate(found.speeds) if other != rank]
        typical = statistics.median(others) if others else 0.0
        if typical and speed < SLOW_RANK * typical:
            yield (
                f"rank {rank} computes at {speed / typical:.2g} of the others' rate ({speed:.3g} against {typical:.3g} "
                f"GFLOP/s): all wait for it. Look for other work on {found.facts[rank].host}, fewer threads, or heat."
            )


def _links(found: Examination) -> Iterator[str]:
    named: list[str] = []
    for kind, pairs in kinds(found).items():
        usual = statistics.median_low(_values(found.latency, pairs))  # of two the better one
        late = [x for x, seconds in zip(pairs, _values(found.latency, pairs), strict=True) if _is_late(seconds, usual)]
        named += _named(found, late, pairs, kind, functools.partial(_latency_words, found))
        usual = statistics.median_high(_values(found.bandwidth, pairs))
        narrow = [x for x, rate in zip(pairs, _values(found.bandwidth, pairs), strict=True) if rate < NARROW * usual]
        named += _named(found, narrow, pairs, kind, functools.partial(_bandwidth_words, found))
    yield from named
    latency = typical(found.latency, kinds(found).get("between hosts", [(0, 0)]))
    if latency > FAR_APART:
        yield (
            f"links between hosts have {readable_seconds(latency)} one way, the median: they are far apart, and every "
            f"message of every call takes that long. Ask for hosts in one place."
        )
    if not named and (found.hidden_from or 0) > SHORT:
        yield (
            f"links are slow for what these ranks compute: a ring's messages hide behind it only from some "
            f"{found.hidden_from} tokens a rank. Take longer sequences, fewer ranks, or faster links."
        )


def _named(
    found: Examination, slow: list[Pair], pairs: list[Pair], kind: str, words: Callable[[list[Pair], list[Pair]], str]
) -> Iterator[str]:
    """The links that are unlike the rest of their kind; those of one rank are laid to it."""
    links, of_them = collections.Counter(itertools.chain(*pairs)), collections.Counter(itertools.chain(*slow))
    guilty = {rank for rank, count in of_them.items() if 1 < count == links[rank]} if len(slow) < len(pairs) else set()
    for rank in sorted(guilty):
        own = [pair for pair in pairs if rank in pair]
        yield f"all links of rank {rank} {words(own, pairs)}: look at {found.facts[rank].host}'s network."
    left = [pair for pair in slow if not guilty & {*pair}]
    for first, second in left[:SHOWN]:
        where = f"{found.facts[first].host} and {found.facts[second].host}"
        yield f"the link {first}-{second} {words([(first, second)], pairs)}, {kind} ({where})."
    if len(left) > SHOWN:
        yield f"and {len(left) - SHOWN} more links like these, {kind}."


def typical(table: Table, pairs: list[Pair]) -> float:
    """The median of a table over some pairs."""
    return statistics.median(_values(table, pairs))


def _values(table: Table, pairs: list[Pair]) -> list[float]:
    return [table[first][second] for first, second in pairs]


def _is_late(seconds: float, usual: float) -> bool:
    return seconds > FAR and seconds > LATE * usual


def _latency_words(found: Examination, some: list[Pair], pairs: list[Pair]) -> str:
    here, there = (readable_seconds(typical(found.latency, each)) for each in (some, _others(some, pairs)))
    return f"{'has' if len(some) == 1 else 'have'} {here} against {there} elsewhere"


def _bandwidth_words(found: Examination, some: list[Pair], pairs: list[Pair]) -> str:
    here, there = (readable_bytes(typical(found.bandwidth, each)) for each in (some, _others(some, pairs)))
    return f"{'carries' if len(some) == 1 else 'carry'} {here}/s against {there}/s elsewhere"


def _others(some: list[Pair], pairs: list[Pair]) -> list[Pair]:
    without = {*some}
    return [pair for pair in pairs if pair not in without]


def _clocks(found: Examination) -> Iterator[str]:
    seen = {found.facts[0].host}
    for rank, offset in enumerate(found.offsets):
        host = found.facts[rank].host
        if abs(offset) > SKEW and host not in seen:
            way = "ahead of" if offset > 0 else "behind"
            yield f"the clock of {host} is {abs(offset):.2f} s {way} that of {found.facts[0].host}: logs mislead."
        seen.add(host)


def _versions(found: Examination) -> Iterator[str]:
    for name in sorted({name for each in found.facts for name in each.versions}):
        has: dict[str, list[int]] = {}
        for rank, each in enumerate(found.facts):
            has.setdefault(each.versions.get(name, "missing"), []).append(rank)
        if len(has) > 1:
            words = "; ".join(f"{version} on rank {_listed(ranks)}" for version, ranks in has.items())
            yield f"{name} differs: {words}."


def _threads(found: Examination) -> Iterator[str]:
    for host in dict.fromkeys(each.host for each in found.facts):
        here = [each for each in found.facts if each.host == host]
        threads, cores = sum(each.threads for each in here), max(each.cores for each in here)
        if here[0].device != "cpu" or threads <= cores:
            continue
        if len(here) > cores:
            yield f"{len(here)} ranks share the {cores} cores of {host}, and wait for each other's."
        elif len(here) > 1:
            yield (
                f"{len(here)} ranks on {host} start {threads} threads for its {cores} cores, and wait for each "
                f"other's: set OMP_NUM_THREADS={cores // len(here)}."
            )


def _listed(ranks: list[int]) -> str:
    words = ", ".join(map(str, ranks[:SHOWN]))
    return words if len(ranks) <= SHOWN else f"{words} and {len(ranks) - SHOWN} more"
