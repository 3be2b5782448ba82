"""Words and their ids: the tokenizer, the vocabulary, and its JSON file. Imports no torch.

The book's rule: lower-cased NLTK word tokens that the training captions hold at least `threshold` times, after
four special words. A full stop inside a caption stays glued to its word, as NLTK does with
`preserve_line=True`, which needs no downloaded sentence model.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import chain, takewhile

from captioner.errors import UserError
from captioner.files import storage

FORMAT_VERSION = 1
TOKENIZER = "nltk-word-tokenize-lower"
PAD, START, END, UNK = 0, 1, 2, 3
SPECIAL_WORDS = ("<pad>", "<start>", "<end>", "<unk>")
THRESHOLD = 4
MIN_COVERAGE = 0.9
PACK_AGAIN = "pack the training split again with sharding/make_shards.py"
GLUED_TOKENS = frozenset((".", ",", ";", ":", "!", "?", ")", "'s", "n't", "'re", "'ll", "'ve", "'m", "'d"))


# Contractions, and texts in which NLTK's successive substitutions affect each other.
# Every alternative starts with a literal, which keeps the search fast.
_LEFT_TO_NLTK = re.compile(r"""`|""|,[,:]|:[,:]|'\w{,2}'|cannot|d'ye|gimme|gonna|gotta|lemme|more'n|wanna""")
_OPENING_QUOTE = re.compile(r"""(?:^|(?<=[ (\[{<]))\"""")
# The set of all marks comes first, and the conditions look back at the mark, which keeps the search fast.
_MARK = re.compile(
    r"""
    ( [\[\](){}<>;@\#$%&?!*,:.-]
      (?: (?<![,:.-])                     # a token wherever it stands
        | (?<=[,:]) (?! \d )              # a comma or a colon, unless a digit follows
        | (?<=-) -                        # a double dash
        | (?<=\.) \.+                     # an ellipsis
        | (?<=\.) (?= [\])}>"' ]* $ )     # the full stop that ends the caption, perhaps inside brackets or quotes
      )
    )""",
    re.VERBOSE,
)
_APOSTROPHE = re.compile(
    r"""
      (?<= [^' ] ) (?: '[smd]? | 'll | 're | 've | n't ) (?= [ ] | $ )      # a clitic, or a closing quote
    | (?<! \w ) ' (?= \w ) (?! (?: re | ve | ll | m | t | s | d | n ) \b )    # an opening quote
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Lower-cased word tokens of a caption, in order; punctuation marks are tokens of their own.

    The tokens are `NLTKWordTokenizer`'s for every string, but come many times faster where the lower-cased caption
    is printable ASCII without certain rare combinations; other captions go to NLTK itself.
    """
    text = caption.lower()
    if not (text.isascii() and text.isprintable()) or _LEFT_TO_NLTK.search(text):
        return _nltk_tokenizer().tokenize(text)
    if '"' in text:
        text = _OPENING_QUOTE.sub(" `` ", text).replace('"', " '' ")
    text = " ".join(_MARK.split(text))
    if "'" in text:
        text = _APOSTROPHE.sub(r" \g<0> ", text)
    return text.split()


@lru_cache(maxsize=1)
def _nltk_tokenizer():
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Words in id order with their counts in the training captions; the four special words come first."""

    words: tuple[str, ...]
    counts: tuple[int, ...]
    threshold: int
    tokenizer: str = TOKENIZER
    tokenizer_version: str = ""

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], *, threshold: int) -> "Vocabulary":
        """The vocabulary of words counted at least `threshold` times: the most frequent first, ties by name."""
        kept = [word for word, count in counts.items() if count >= threshold and word not in SPECIAL_WORDS]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls(
            words=(*SPECIAL_WORDS, *kept),
            counts=(0,) * len(SPECIAL_WORDS) + tuple(counts[word] for word in kept),
            threshold=threshold,
            tokenizer_version=version("nltk"),
        )

    def coverage(self, counts: Mapping[str, int]) -> float:
        """The fraction of tokens, in captions with these counts, that the vocabulary holds."""
        known = sum(count for word, count in counts.items() if word in self.ids)
        return known / max(1, sum(counts.values()))

    def extended(self, other: "Vocabulary") -> "Vocabulary":
        """This vocabulary, followed by the words that only `other` has, in the order of `from_counts`.

        The counts of both are added. The threshold is this vocabulary's.
        """
        counts = Counter(dict(zip(self.words, self.counts, strict=True)))
        counts.update(dict(zip(other.words, other.counts, strict=True)))
        new = sorted(set(other.words) - set(self.words), key=lambda word: (-counts[word], word))
        words = (*self.words, *new)
        return replace(self, words=words, counts=tuple(counts[word] for word in words))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Word to id."""
        return {word: index for index, word in enumerate(self.words)}

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the tokenizer's name and the words in order, on which ids depend."""
        return hashlib.sha256(json.dumps([self.tokenizer, self.words]).encode()).hexdigest()

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Ids of tokens; unknown ones become `<unk>`. No `<start>` or `<end>` is added."""
        get = self.ids.get
        return [get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """The caption with these ids, up to the first `<end>`, without special words."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The tokens of `decode`, each with the space before it, if there is one."""
        words = takewhile(lambda index: index != END, ids)
        return spaced(self.words[index] for index in words if index not in (PAD, START))

    def to_json(self) -> str:
        """The text of `vocabulary.json`."""
        content = {
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer,
            "tokenizer_version": self.tokenizer_version,
            "threshold": self.threshold,
            "fingerprint": self.fingerprint,
            "words": self.words,
            "counts": self.counts,
        }
        return json.dumps(content, indent=0)  # ASCII: a caption file may hold halves of surrogate pairs

    @classmethod
    def from_json(cls, text: str | bytes, *, origin: str) -> "Vocabulary":
        """The vocabulary in `to_json`'s text; `origin` names the file in errors. Raises UserError if it is damaged."""
        try:
            content = json.loads(text)
            found = content["format_version"]
            if found != FORMAT_VERSION:
                raise UserError(
                    f"{origin} has vocabulary format {found}, this version reads {FORMAT_VERSION}: {PACK_AGAIN}"
                )
            vocabulary = cls(
                words=tuple(map(str, content["words"])),
                counts=tuple(content["counts"]),
                threshold=content["threshold"],
                tokenizer=content["tokenizer"],
                tokenizer_version=content["tokenizer_version"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{origin} is not a vocabulary file ({error!r}): {PACK_AGAIN}") from error
        if vocabulary.tokenizer != TOKENIZER:
            raise UserError(
                f"{origin} was made with tokenizer {vocabulary.tokenizer!r}, this version has {TOKENIZER!r}"
            )
        if content.get("fingerprint") != vocabulary.fingerprint:
            raise UserError(f"{origin} was edited by hand or damaged (its fingerprint differs): {PACK_AGAIN}")
        if len(vocabulary) == len(SPECIAL_WORDS):
            raise UserError(f"{origin} holds no word beside {SPECIAL_WORDS}: {PACK_AGAIN} with a smaller threshold")
        return vocabulary


def read_vocabulary(location: str, *, remedy: str) -> Vocabulary:
    """The vocabulary in a file or behind a URL. Raises UserError, ending with `remedy` if it cannot be read."""
    return Vocabulary.from_json(storage.read_required(location, remedy=remedy), origin=location)


def choose_threshold(counts: Mapping[str, int]) -> int:
    """THRESHOLD, or the greatest below it at which the vocabulary covers MIN_COVERAGE of the tokens.

    With small data THRESHOLD covers less: of 300 real captions it leaves a fifth of the words unknown.
    """
    wanted = MIN_COVERAGE * sum(counts.values())
    covered = {least: sum(n for n in counts.values() if n >= least) for least in range(THRESHOLD, 0, -1)}
    return next((least for least, known in covered.items() if known >= wanted), 1)


def count_words(tokenized_captions: Iterable[Sequence[str]]) -> Counter[str]:
    """How often each token occurs."""
    return Counter(chain.from_iterable(tokenized_captions))


def join_tokens(tokens: Iterable[str]) -> str:
    """Tokens as running text: no space before punctuation, clitics and closing brackets."""
    return "".join(spaced(tokens))


def spaced(tokens: Iterable[str]) -> list[str]:
    """The tokens of running text, each with the space before it, if there is one."""
    pieces: list[str] = []
    for token in tokens:
        is_glued = not pieces or token in GLUED_TOKENS or pieces[-1].endswith("(")
        pieces.append(token if is_glued else f" {token}")
    return pieces
