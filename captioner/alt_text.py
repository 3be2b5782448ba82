"""Alt text from raw captions. Imports no torch."""

import re
import textwrap

EDGES = " .,;:!?&/-"
QUOTED = re.compile(r'" ?([^"]*?) ?"')
SPLIT_WORD = re.compile(  # which tokenize and join_tokens leave
    r"""
      \b(?:can\ not|gon\ na|wan\ na|got\ ta|gim\ me|lem\ me)\b
    | s\ '(?=\ )  # the boys' hats
    | [$\#(\[]\ (?=\w)
    | \d\ %
    | \ [.,;:!?)\]]
    """,
    re.VERBOSE,
)
SENTENCE_START = re.compile(r"(?:^|(?<=\w\w)[.!?] )\W*\w")  # not after u.s.


def alt_text(caption: str, *, max_chars: int = 125) -> str:
    """A caption (lower-cased tokens, joined) as a sentence of at most `max_chars` characters, full stop included.

    Empty where the caption has no letter or digit; alt text stays as it is. Raises ValueError where `max_chars` leaves
    no room for a word and a full stop.
    """
    if max_chars < 2:
        raise ValueError(f"max_chars {max_chars} must be at least 2")
    before, text = None, "".join(letter if letter.isprintable() else " " for letter in caption)
    while text != before:  # a space less may join the next two
        before, text = text, _sentence(text, max_chars=max_chars)
    return text


def _sentence(text: str, *, max_chars: int) -> str:
    text = " ".join(text.replace("``", '"').replace("''", '"').split())
    text = SPLIT_WORD.sub(lambda split: split[0].replace(" ", ""), QUOTED.sub(r'"\1"', text)).strip(EDGES)
    if not _has_word(text):
        return ""
    text = SENTENCE_START.sub(lambda start: start[0].upper(), text)
    return f"{_shortened(text, room=max_chars - 1)}."


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def _shortened(text: str, *, room: int) -> str:
    """The words that fit into `room` characters; of a longer first word its beginning."""
    head = textwrap.shorten(text, room, placeholder="", break_on_hyphens=False).rstrip(EDGES)
    if _has_word(head):
        return head
    return text[next(index for index, letter in enumerate(text) if letter.isalnum()) :][:room]
