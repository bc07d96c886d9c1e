"""Masks from text, as the command line takes them."""

from __future__ import annotations

import re

from ringattn.errors import InputError
from ringattn.masks.banded import Causal, Documents, Full, Prefix, SinkTokens, Window
from ringattn.masks.base import Mask
from ringattn.masks.blockwise import Blocks


def parse(text: str) -> Mask:
    """The mask written in ``text``: names with numbers, combined by ``&``, ``|``, ``~`` and parentheses.

    >>> str(parse("documents:1500,1,1498 & causal"))
    'documents:1500,1,1498&causal'
    >>> parse("(window:4096|sinks:4)&causal")
    And(left=Or(left=Window(left=4096, right=0), right=SinkTokens(n=4)), right=Causal())
    """
    tokens = re.findall(r"[&|~()]|[^&|~()\s]+", text)
    mask, rest = _parse_or(tokens, text)
    if rest:
        raise InputError(f"A mask ends where {''.join(rest)!r} begins in {text!r}. Combine masks with & or |.")
    return mask


def _parse_or(tokens: list[str], text: str) -> tuple[Mask, list[str]]:
    mask, tokens = _parse_and(tokens, text)
    while tokens[:1] == ["|"]:
        right, tokens = _parse_and(tokens[1:], text)
        mask = mask | right
    return mask, tokens


def _parse_and(tokens: list[str], text: str) -> tuple[Mask, list[str]]:
    mask, tokens = _parse_one(tokens, text)
    while tokens[:1] == ["&"]:
        right, tokens = _parse_one(tokens[1:], text)
        mask = mask & right
    return mask, tokens


def _parse_one(tokens: list[str], text: str) -> tuple[Mask, list[str]]:
    if not tokens:
        raise InputError(f"A mask is missing at the end of {text!r}. {_SPELLINGS}")
    head, rest = tokens[0], tokens[1:]
    if head == "~":
        mask, rest = _parse_one(rest, text)
        return ~mask, rest
    if head == "(":
        mask, rest = _parse_or(rest, text)
        if rest[:1] != [")"]:
            raise InputError(f"A parenthesis is not closed in {text!r}.")
        return mask, rest[1:]
    return _parse_atom(head), rest


_SPELLINGS = (
    "Masks are full, causal, window:LEFT[,RIGHT], documents:N,N,…[/KV,KV,…], prefix:N, sinks:N, "
    "blocks:SIZE/ROW/ROW/… of 0s and 1s, "
    "combined by &, |, ~ and parentheses."
)


def _parse_atom(word: str) -> Mask:
    name, _, argument = word.partition(":")
    try:
        if name == "blocks":
            size, *rows = argument.split("/")
            return Blocks([[int(cell) for cell in row] for row in rows], int(size))
        groups = [[int(n) for n in group.split(",")] for group in argument.split("/")] if argument else []
        match name, [len(group) for group in groups]:
            case "full", []:
                return Full()
            case "causal", []:
                return Causal()
            case "window", [1 | 2]:
                return Window(*groups[0])
            case "documents", [] | [_] | [_, _]:
                return Documents(*groups) if groups else Documents([])
            case "prefix", [1]:
                return Prefix(*groups[0])
            case "sinks", [1]:
                return SinkTokens(*groups[0])
    except InputError:
        raise
    except ValueError:
        pass
    raise InputError(f"{word!r} is not a mask. {_SPELLINGS}")
