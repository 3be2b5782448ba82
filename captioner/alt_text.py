"""Alt text from raw captions: running text in sentence case, without what a screen reader need not say.

Imports no torch. The word lists were chosen with 145,000 captions by people: an ending that people hardly ever use is
taken for the place where a decoder stopped.
"""

import re

DETERMINER = (
    r"(?:an?|the|one|two|three|four|five|six|seven|eight|nine|ten|\d+|some|several|many|multiple|lots|people)\b"
)
PICTURE = r"(?:picture|photo|photograph|image|snapshot|pic)"
PRAISE = r"(?:(?:nice|good|great|beautiful|cute|clear|close|colou?r|colou?red|candid|blurry|very)\ )"
CLOSE_UP = r"(?:(?:very|extreme|extremely)\ )?(?:close[- ]?up|up[- ]close|zoomed[- ]in)"
OPENING = re.compile(
    rf"""
    ^(?:
      (?:there|here|this|it)(?:\ is|\ are|'s)(?=\ {DETERMINER})
    | (?:here\ we\ have|(?:i|we|you)(?:\ can)?\ see)(?=\ {DETERMINER})
    | in\ (?:this|the)\ {PICTURE}(?:,?\ there\ (?:is|are)|,?\ (?:i|we|you)(?:\ can)?\ see|,|(?=\ {DETERMINER}))
    | (?:this|the)\ {PICTURE}\ (?:is\ of|shows|depicts|features)
    | (?:(?:an?|the)\ )?{PRAISE}*
      (?: {CLOSE_UP}(?:\ (?:view|shot|look|{PICTURE}))?\ of
        | {PICTURE}\ (?:of|showing)(?!.*\b(?:hang\w*|hung|mounted)\b.*\bwall)  # that picture is an object
        | shot\ of(?=\ {DETERMINER})  # not one of whisky
      )
    )\ (?=["'(]*\w)
    """,
    re.VERBOSE | re.IGNORECASE,
)

# What ends no sentence: articles, conjunctions, prepositions that want their noun.
LOOSE_WORDS = (
    "a an the of and or with to at from for into onto his their its my your our is are was were being while as that "
    "which who whose he she they where when next between near against upon during than but under through across toward "
    "towards among beside without within until because very wearing holding containing featuring has have having"
).replace(" ", "|")
PLACING = (
    r"(?:s[ai]t|sits|sitting|seated|stand|stands|standing|stood|la?y|la?ys|laying|lies?|lying|placed|parked|perched"
)
PLACING += r"|rid(?:e|es|ing)|sleep(?:s|ing)?|rest(?:s|ing)?)"
MODIFIER = r"(?:red|blue|green|yellow|white|black|brown|pink|purple|gr[ae]y|large|small|big|long|tall|young|old|wooden)"
LOOSE_END = re.compile(
    rf"""
    \ (?:
      (?:in|on|at|to|near|by|along|with|from|over|down|inside)\ (?:(?:an?|the)\ )?[\w-]+\ of  # on (the) top of
    | an?\ (?:piece|bunch|couple|pair|lot|slice|number|bit)\ of
    | (?:next|close|about|trying|going|ready|attached)\ to
    | (?:made|full|because|instead)\ of
    | (?:filled|covered|surrounded|topped|along|together)\ (?:with|in|by)
    | an?\ (?:very\ )?{MODIFIER}
    | (?:with|and|of|by)\ (?:two|three|four|five|some|several|many|other|another)
    | (?<!he\ is\ )(?<!they\ are\ )(?:{LOOSE_WORDS})  # what he is holding
    )$
    """,
    re.VERBOSE | re.IGNORECASE,
)
PLACED_END = re.compile(rf" {PLACING} (?:on|in|by|over|behind)$", re.IGNORECASE)  # "people looking on" is complete
CUT_END = re.compile(  # what people do end with, but hardly where a text was cut
    r" (?:on|in|by|over|behind|off|above|below|around|about|along|past|her|some|a few|\S+'s)$", re.IGNORECASE
)
LONGEST_END = 60  # characters; to search only there is several times faster
DOUBLED_WORD = re.compile(r"\b(?!(?:bye|choo|pom|putt|tuk|yo)\b)(\w+)(?: \1\b)+", re.IGNORECASE)
DOUBLED_END = re.compile(r"(?<!\S)((?:\S+ ){1,7}\S+)(?:,|,? and|,? or)? \1$", re.IGNORECASE)
EDGES = " .,;:!?&/-([{"
EDGE_END = re.compile(r"[\s.,;:!?&/\-([{]+([\"')\]}]*)$")
SPACING = [  # what join_tokens leaves; each begins with what is rare
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'" ?([^"]*?) ?"', r'"\1"'),
        (r" '(?<=s ')(?= )", "'"),  # the boys' hats
        (r"&(?<=[^\W_] &) amp;", "&"),  # left by web pages
        (r"([$#(\[]) (?=\w)", r"\1"),
        (r"(\d) (?=%)", r"\1"),
        (r" (?=[.,;:!?)\]]+(?: |$))", ""),
        (r" ((?:not(?<=\bcan not)|na(?<=\bgon na|\bwan na)|ta(?<=\bgot ta)|me(?<=\bgim me|\blem me))\b)", r"\1"),
    )
]
PROPER_WORDS = (
    "I TV SUV BMX ATM DJ USA Christmas Halloween Easter Santa Asian African American Indian Chinese Japanese Korean "
    "Hispanic Mexican Canadian British English Scottish Irish German French Italian Spanish European Caucasian"
)
CAPITALS = {word.lower(): word for word in PROPER_WORDS.split()}
PROPER_WORD = re.compile(rf"\b(?:{'|'.join(CAPITALS)})\b(?<![.'-]\w)(?![.-]\w)")
SENTENCE_START = re.compile(r"[.!?](?<=\w\w.) \w")  # not after u.s.


def alt_text(caption: str, *, max_chars: int = 125) -> str:
    """A caption (lower-cased tokens, joined) as a sentence of at most `max_chars` characters, its full stop included.

    It is empty where the caption has no letter or digit. Alt text stays as it is. Raises ValueError where `max_chars`
    leaves no room for a word and a full stop.
    """
    if max_chars < 2:
        raise ValueError(f"max_chars {max_chars} must be at least 2")
    before, text = None, "".join(letter if letter.isprintable() else " " for letter in caption)
    while text != before:  # what one step takes away may uncover work for another
        before, text = text, _tidied(text, max_chars=max_chars)
    return text


def _tidied(text: str, *, max_chars: int) -> str:
    """One round of all that is done; a full stop at its end marks what has a word."""
    text = _without_edges(OPENING.sub("", _without_edges(_spaced(text))))
    text = _without_doubled_end(DOUBLED_WORD.sub(r"\1", text))
    cut = len(text) > max_chars - 1
    text = _without_loose_end(_shortened(text, room=max_chars - 1) if cut else text, cut=cut)
    return f"{_sentence_case(text)}." if _has_word(text) else ""


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def _spaced(text: str) -> str:
    """Single spaces, and none where the tokenizer put one inside what belongs together."""
    text = " ".join(text.replace("``", '"').replace("''", '"').split())
    for pattern, replacement in SPACING:
        text = pattern.sub(replacement, text)
    return text


def _without_edges(text: str) -> str:
    return EDGE_END.sub(r"\1", text.lstrip(EDGES))


def _without_doubled_end(text: str) -> str:
    """Of "a dog and a dog", or the like with up to eight words, the first."""
    end = " ".join(text.rsplit(" ", 2)[-2:])
    return DOUBLED_END.sub(r"\1", text) if text.lower().count(end.lower()) > 1 else text


def _shortened(text: str, *, room: int) -> str:
    """The words that fit into `room` characters; of a longer first word its beginning."""
    head = text[: room + 1].rpartition(" ")[0]
    if not _has_word(head):
        return text[next((place for place, letter in enumerate(text) if letter.isalnum()), 0) :][:room]
    if head.count('"') % 2:
        head = "".join(head.rsplit('"', 1))
    return _without_edges(head)


def _without_loose_end(text: str, *, cut: bool) -> str:
    """Ends where a person would: "a man next to a" is "a man". A text that has nothing else stays as it is.

    `cut` says that more is known to be missing, as it is once a loose end was found.
    """
    cut = cut or PLACED_END.search(text) is not None
    while True:
        place = max(0, len(text) - LONGEST_END)
        end = LOOSE_END.search(text, place) or (CUT_END.search(text, place) if cut else None)
        if end is None or not _has_word(text[: end.start()]):
            return text
        text, cut = _without_edges(text[: end.start()]), True


def _sentence_case(text: str) -> str:
    """A capital at the beginning, after a full stop, and for proper words."""
    text = PROPER_WORD.sub(lambda word: CAPITALS[word[0]], text)
    text = SENTENCE_START.sub(lambda start: start[0][:-1] + _capital(start[0][-1]), text)
    first = next(place for place, letter in enumerate(text) if letter.isalnum())
    return text[:first] + _capital(text[first]) + text[first + 1 :]


def _capital(letter: str) -> str:
    return letter.upper() if len(letter.upper()) == 1 else letter
