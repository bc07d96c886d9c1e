"""Masks from text, as the command line takes them."""

from __future__ import annotations

import re
from collections import deque

from ringattn.checking import instance, shown
from ringattn.errors import InputError
from ringattn.masks.banded import Causal, Documents, Full, Prefix, SinkTokens, Window
from ringattn.masks.base import MAX_DEPTH, Mask
from ringattn.masks.blockwise import Blocks, Predicate
from ringattn.naming import by_name, imported

MEMBERS: tuple[type[Mask], ...] = (Full, Causal, Window, Documents, Prefix, SinkTokens, Blocks, Predicate)
"""Every class of masks, simpler ones first."""


def spellings() -> str:
    """How masks are written, in a sentence of names and arguments."""
    texts = (f"{member.spelled}:{member.arguments}".rstrip(":") for member in MEMBERS if member.spelled)
    return (
        f"{', '.join(texts)}, or module:Name[:ARGUMENTS] of a class or mask outside the package, combined by &, |, ~ "
        f"and parentheses"
    )


def parse(text: str) -> Mask:
    """The mask written in ``text``: names with numbers, combined by ``&``, ``|``, ``~`` and parentheses.

    Raises:
        InputError: it is not the text of a mask, or masks are nested too deep.

    >>> str(parse("documents:1500,1,1498 & causal"))
    'documents:1500,1,1498&causal'
    >>> parse("(window:4096|sinks:4)&causal")
    And(left=Or(left=Window(left=4096, right=0), right=SinkTokens(n=4)), right=Causal())
    >>> parse("ringattn:Window:4,4")
    Window(left=4, right=4)
    """
    words = re.findall(r"[&|~()]|[^&|~()\s]+", instance(text, str, "A mask's text", "a string"))
    parser = _Parser(deque(words), shown(text, 200))
    mask = parser.union(0)
    if parser.words:
        raise InputError(
            f"A mask ends where {shown(''.join(parser.words))} begins in {parser.text}. Combine masks with & or |."
        )
    return mask


class _Parser:
    """Takes words off the front; each method reads what binds more tightly than the one before."""

    def __init__(self, words: deque[str], text: str) -> None:
        self.words = words
        self.text = text

    def union(self, depth: int) -> Mask:
        mask = self._intersection(depth)
        while self._taken("|"):
            mask = mask | self._intersection(depth)
        return mask

    def _intersection(self, depth: int) -> Mask:
        mask = self._operand(depth)
        while self._taken("&"):
            mask = mask & self._operand(depth)
        return mask

    def _operand(self, depth: int) -> Mask:
        if depth > MAX_DEPTH:
            raise InputError(f"A mask's text may be nested {MAX_DEPTH} deep; {self.text} goes deeper.")
        if not self.words:
            raise InputError(f"A mask is missing at the end of {self.text}. Masks are {spellings()}.")
        word = self.words.popleft()
        if word == "~":
            return ~self._operand(depth + 1)
        if word == "(":
            mask = self.union(depth + 1)
            if not self._taken(")"):
                raise InputError(f"A parenthesis is not closed in {self.text}.")
            return mask
        return _atom(word)

    def _taken(self, word: str) -> bool:
        if not self.words or self.words[0] != word:
            return False
        self.words.popleft()
        return True


def _atom(word: str) -> Mask:
    """One mask: a member's name or ``module:Name``, and its arguments."""
    members = by_name(member for member in MEMBERS if member.spelled)
    name, _, arguments = word.partition(":")
    found: object = members.get(name)
    if found is None and ":" in word:
        outside, _, arguments = arguments.partition(":")
        found = imported("mask", f"{name}:{outside}")
    if isinstance(found, Mask) and not arguments:
        return found
    try:
        if isinstance(found, type) and issubclass(found, Mask):
            return found.from_text(arguments)
    except InputError:
        raise
    except (ValueError, TypeError):
        pass
    raise InputError(f"{shown(word)} is not a mask. Masks are {spellings()}.")
