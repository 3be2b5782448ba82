"""Joins the parts of a template so that an empty field leaves no trace.

Punctuation and symbols next to an empty field go, and quotes and brackets with nothing else inside. Words stay, and so
does what belongs to another field: `%` in "{confidence}% {place}", `#` in "{place} #{date}". Between two texts one
separator stays: what introduces the second one (`{alt} @ {place} & {date}` gives "&"), else the first one.
"""

import re
from collections.abc import Iterable
from itertools import groupby

import regex

MISSING = "\0"  # stands for an empty field; no literal contains it
TEXT, OPENING, CLOSING, BETWEEN = "text", "opening", "closing", "between"
Token = tuple[str, str]  # its role, and its text

OPENERS = "([{<«»‹›“„„”‘‚‚’\"'`*_~|（［｛「『【《〈〔"
CLOSERS = ")]}>»«›‹”“””’‘’’\"'`*_~|）］｝」』】》〉〕"
PAIRS = frozenset(zip(OPENERS, CLOSERS, strict=True))
TIGHT = "'‘’`*_~|"  # quotes only where they touch what they are around, and nothing on the other side
ENDS = ".!?。！？"
_SPACING = r"\s,;:/|·•–—_，、；：・／｜\-"
_SYMBOL = rf"[^{_SPACING}{ENDS}]"
_SYMBOLS = re.compile(f"{_SYMBOL}+")
_OF_TEXT_BEFORE = re.compile(rf"(?:[^{_SPACING}]+(?=[{_SPACING}]))?")
_OF_TEXT_BEHIND = re.compile(rf"(?:(?<=[{_SPACING}]){_SYMBOL}+)?$")
_OF_FIELD_BEFORE = re.compile(rf"^{_SYMBOL}+(?=[{_SPACING}{ENDS}])")
_END = re.compile(rf"(?:[{ENDS}]+(?!$))?")  # between two fields without a space it separates
_TOKENS = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*|([\"'`*_~|])\1*|.", regex.DOTALL)


def join(parts: Iterable[tuple[bool, str]]) -> str:
    """Literals (True) and values, joined. "" if all values are empty."""
    parts = list(parts)
    if not any(text for is_literal, text in parts if not is_literal):
        return ""
    tokens = _pair([token for is_literal, text in parts for token in _tokens(is_literal, text)])
    joined = ""
    opens = True  # at the start, and behind an opening bracket
    runs = [(role, "".join(text for _, text in run)) for role, run in groupby(tokens, key=lambda token: token[0])]
    for (role, text), (behind, _) in zip(runs, [*runs[1:], (CLOSING, "")], strict=True):
        is_tidied = role == BETWEEN and MISSING in text
        joined += _tidy(text, before=joined, opens=opens, closes=behind == CLOSING) if is_tidied else text
        opens = role == OPENING
    return joined.strip()


def _tokens(is_literal: bool, text: str) -> list[Token]:
    """A value as one token; a literal's words, and all its other characters."""
    if not is_literal:
        return [(TEXT, text) if text else (BETWEEN, MISSING)]
    return [(TEXT if word[0].isalnum() else BETWEEN, word) for found in _TOKENS.finditer(text) if (word := found[0])]


def _pair(tokens: list[Token]) -> list[Token]:
    """The tokens, in which quotes and brackets around a text have their roles; around empty fields alone they go."""
    opened: list[int] = []
    for number, (role, text) in enumerate(tokens):
        if role != BETWEEN:
            continue
        before, behind = (
            tokens[near] if 0 <= near < len(tokens) else (BETWEEN, " ") for near in (number - 1, number + 1)
        )
        start = next((start for start in reversed(opened) if _is_pair(tokens[start][1], text)), None)
        if start is not None and _may_be(text, inside=before, outside=behind, other=OPENERS):
            del opened[opened.index(start) :]
            inside = tokens[start + 1 : number]
            if any(role == TEXT for role, _ in inside):
                tokens[start], tokens[number] = (OPENING, tokens[start][1]), (CLOSING, text)
            elif any(text == MISSING for _, text in inside):
                tokens[start : number + 1] = [(BETWEEN, "")] * (number - start) + [(BETWEEN, MISSING)]
        elif text[0] in OPENERS and _may_be(text, inside=behind, outside=before, other=CLOSERS):
            opened.append(number)
    return tokens


def _is_pair(opener: str, closer: str) -> bool:
    return (opener[0], closer[0]) in PAIRS and len(opener) == len(closer)


def _may_be(text: str, *, inside: Token, outside: Token, other: str) -> bool:
    """Whether a character between these tokens may be an opener or a closer; `other` has those of the other kind."""
    if text[0] not in TIGHT:
        return True
    role, near = outside
    is_apart = role == BETWEEN and near != MISSING and (near[0] in "_|" or near[0] not in other)
    return is_apart and not inside[1].isspace()


def _tidy(literal: str, *, before: str, opens: bool, closes: bool) -> str:
    """What stays of punctuation with empty fields (MISSING) in it; `before` is the text before it.

    `opens`: nothing is before it, or an opening bracket; `closes`: nothing is behind it, or a closing one. A sentence
    has one full stop.
    """
    first, *others = literal.split(MISSING)
    if opens:
        return _OF_TEXT_BEHIND.search(others[-1])[0]  # type: ignore[index]
    own = _OF_TEXT_BEFORE.match(first)[0]  # type: ignore[index]
    ends = [_END.match(piece)[0] for piece in [*others[:-1], f"{others[-1]} "]]  # type: ignore[index]
    end = next(filter(None, ends), "")
    kept = own if own.endswith(tuple(ENDS)) else own + end
    kept = kept.lstrip(ENDS) if before.endswith(tuple(ENDS)) else kept
    if closes:
        return kept
    last = _OF_FIELD_BEFORE.sub("", others[-1].removeprefix(ends[-1]))
    if _SYMBOLS.search(last):
        return kept + last
    pieces = [last] if end else [first[len(own) :], *others[:-1], last]
    plain = (re.sub(r"(?<=\s)\s+", "", _SYMBOLS.sub("", piece)) for piece in pieces)
    return kept + (next(filter(None, plain), "") or next(filter(None, pieces), ""))
