"""Words, ids and the vocabulary file."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk import word_tokenize

from captioner.errors import UserError
from captioner.vocabulary import (
    END,
    MIN_COVERAGE,
    PAD,
    SPECIAL_WORDS,
    START,
    THRESHOLD,
    UNK,
    Vocabulary,
    choose_threshold,
    count_words,
    join_tokens,
    tokenize,
)

REAL_CAPTIONS = Path(__file__).resolve().parents[3] / "shared" / "data" / "captions" / "captions_145k.json.gz"
COUNTS = {"cat": 3, "a": 9, "dog": 3, "on": 2, ".": 9, "once": 1}

# What NLTK's rules look at: every ASCII sign, clitics, contractions; then what may stand in a `str` besides.
ASCII_PIECES = (
    *map(chr, range(ord(" "), ord("A"))),
    *("a", "S", *map(chr, range(ord("["), ord("a"))), *map(chr, range(ord("{"), 128))),
    *(
        "'s",
        "'m",
        "'d",
        "'ll",
        "'re",
        "'ve",
        "n't",
        "'t",
        "'n",
        "'em",
        "'tis",
        "'twas",
        "--",
        "...",
        "cat",
        "st.",
        "3,5",
    ),
    *("cannot", "gimme", "gonna", "gotta", "lemme", "wanna", "d'ye", "more'n"),
)
OTHER_PIECES = "\0\t\n\r\x0b\x1c\x85\xa0\u2009\u2028\u3000«»“”‘’„–—…éßİK٣\ud83d\ude00😀"
ascii_captions = st.lists(st.sampled_from(ASCII_PIECES) | st.sampled_from("  a.,:'\"-"), max_size=12).map("".join)
captions = ascii_captions | st.lists(ascii_captions | st.sampled_from(OTHER_PIECES)).map("".join) | st.text()
word_counts = st.dictionaries(st.text(min_size=1), st.integers(1, 9), max_size=30)


@pytest.fixture(scope="module")
def real_captions() -> list[str]:
    if not REAL_CAPTIONS.exists():
        pytest.skip(f"there is no {REAL_CAPTIONS}")
    annotations = json.loads(gzip.decompress(REAL_CAPTIONS.read_bytes()))["annotations"]
    return [annotation["caption"] for annotation in annotations]


def nltk_tokens(text: str) -> list[str]:
    return word_tokenize(text.lower(), preserve_line=True)


def vocabulary() -> Vocabulary:
    return Vocabulary.from_counts(COUNTS, threshold=2)


def test_special_words_come_first_then_the_most_frequent_with_ties_by_name() -> None:
    assert (PAD, START, END, UNK) == (0, 1, 2, 3)
    assert vocabulary().words == ("<pad>", "<start>", "<end>", "<unk>", ".", "a", "cat", "dog", "on")
    assert vocabulary().counts == (0, 0, 0, 0, 9, 9, 3, 3, 2)


@given(counts=word_counts, threshold=st.integers(1, 10), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_vocabulary_holds_what_reaches_the_threshold_in_any_order_of_counting(
    counts: dict[str, int], threshold: int, seed: int
) -> None:
    made = Vocabulary.from_counts(counts, threshold=threshold)
    assert set(made.words) == {*SPECIAL_WORDS, *(word for word in counts if counts[word] >= threshold)}
    shuffled = list(counts.items())
    Random(seed).shuffle(shuffled)
    assert Vocabulary.from_counts(dict(shuffled), threshold=threshold) == made


@given(counts=word_counts, ids=st.data())
@settings(deadline=None)
def test_tokens_survive_encoding(counts: dict[str, int], ids: st.DataObject) -> None:
    made = Vocabulary.from_counts(counts, threshold=1)
    words = made.words[len(SPECIAL_WORDS) :]
    tokens = ids.draw(st.lists(st.sampled_from(words))) if words else []
    encoded = made.encode(tokens)
    assert [made.words[index] for index in encoded] == tokens
    assert made.decode([START, *encoded, END, *encoded, PAD]) == join_tokens(tokens)


def test_a_special_word_in_the_captions_gets_no_second_id() -> None:
    made = Vocabulary.from_counts({"<end>": 9, "cat": 9}, threshold=1)
    assert made.words == (*SPECIAL_WORDS, "cat")


def test_unknown_words_become_unk_and_are_shown_as_such() -> None:
    assert vocabulary().encode(["a", "zebra", "once", "cat"]) == [5, UNK, UNK, 6]
    assert vocabulary().decode([5, UNK, END]) == "a <unk>"


@given(counts=word_counts, threshold=st.integers(1, 9))
@settings(deadline=None)
def test_a_vocabulary_survives_its_file(counts: dict[str, int], threshold: int) -> None:
    """Through bytes, since a word may hold half of a surrogate pair, as JSON caption files can."""
    made = Vocabulary.from_counts(counts | {"\ud83d": 9}, threshold=threshold)
    read = Vocabulary.from_json(made.to_json().encode().decode(), origin="v.json")
    assert read == made
    assert read.fingerprint == made.fingerprint


def test_the_fingerprint_depends_on_the_words_and_their_order() -> None:
    others = [
        Vocabulary.from_counts(COUNTS, threshold=1),
        Vocabulary.from_counts(COUNTS | {"dog": 4}, threshold=2),
    ]
    assert len({made.fingerprint for made in (vocabulary(), *others)}) == 3


@given(own=word_counts, others=word_counts, threshold=st.integers(1, 4))
@settings(deadline=None)
def test_more_words_leave_ids_and_lose_nothing(own: dict[str, int], others: dict[str, int], threshold: int) -> None:
    known = Vocabulary.from_counts(own, threshold=threshold)
    other = Vocabulary.from_counts(others, threshold=1)
    made = known.extended(other)
    assert made.words[: len(known)] == known.words
    assert sorted(made.words) == sorted({*known.words, *other.words})
    assert sum(made.counts) == sum(known.counts) + sum(other.counts)
    new = made.words[len(known) :]
    assert list(new) == sorted(new, key=lambda word: (-others[word], word))
    said = {word: count for word, count in others.items() if word not in SPECIAL_WORDS}  # those are never counted
    assert all(made.counts[made.ids[word]] >= count for word, count in said.items())
    assert (made.fingerprint == known.fingerprint) == (not new)
    assert made.extended(Vocabulary.from_counts({}, threshold=1)) == made
    if len(made) > len(SPECIAL_WORDS):
        assert Vocabulary.from_json(made.to_json(), origin="v.json") == made


@given(counts=word_counts)
@settings(deadline=None)
def test_the_chosen_threshold_is_the_greatest_that_covers_enough(counts: dict[str, int]) -> None:
    words = {word: count for word, count in counts.items() if word not in SPECIAL_WORDS}
    chosen = choose_threshold(words)
    assert 1 <= chosen <= THRESHOLD
    made, next_ones = (Vocabulary.from_counts(words, threshold=least) for least in (chosen, chosen + 1))
    assert not words or made.coverage(words) >= MIN_COVERAGE
    assert chosen == THRESHOLD or not words or next_ones.coverage(words) < MIN_COVERAGE


def test_large_data_keeps_the_books_threshold_and_small_data_lowers_it() -> None:
    assert choose_threshold({"a": 900, "cat": 4, "once": 1}) == 4
    assert choose_threshold({"a": 20, "cat": 3, "once": 1}) == 3
    assert choose_threshold({"a": 3, "cat": 1, "dog": 1}) == 1


def test_coco_like_data_keeps_the_books_threshold(real_captions: list[str]) -> None:
    assert choose_threshold(count_words(map(tokenize, real_captions))) == 4


def test_new_words_follow_by_count_then_name_and_counts_are_added() -> None:
    made = vocabulary().extended(Vocabulary.from_counts({"zebra": 2, "cat": 5, "emu": 2, "once": 9}, threshold=2))
    assert made.words == (*vocabulary().words, "once", "emu", "zebra")
    assert made.counts == (0, 0, 0, 0, 9, 9, 8, 3, 2, 9, 2, 2)
    assert made.threshold == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format 2"),
        ({"tokenizer": "spaces"}, "'spaces'"),
        ({"words": [*SPECIAL_WORDS, ".", "a", "cat", "cow", "on"]}, "edited"),
        ({"words": [*SPECIAL_WORDS, "a", ".", "cat", "dog", "on"]}, "edited"),
        ({"words": [*SPECIAL_WORDS, "a", "a"]}, "edited"),
        ({"words": [*SPECIAL_WORDS, ["a"]]}, "edited"),
        ({"words": ["a", *SPECIAL_WORDS]}, "edited"),
        ({"words": None}, "not a vocabulary"),
        ({"fingerprint": None}, "edited"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_in_one_line(change: dict[str, object], said: str) -> None:
    content = json.loads(vocabulary().to_json()) | change
    with pytest.raises(UserError, match=said) as caught:
        Vocabulary.from_json(json.dumps(content), origin="shards/vocabulary.json")
    assert "\n" not in str(caught.value)
    assert "shards/vocabulary.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "no JSON", "[1, 2]", "{}", "null", '{"format_version": 1}'])
def test_a_file_that_is_no_vocabulary_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"v\.json is not a vocabulary file") as caught:
        Vocabulary.from_json(text, origin="v.json")
    assert "\n" not in str(caught.value)


def test_tokens_are_lower_case_words_and_marks() -> None:
    assert tokenize("The cat, isn't (it) on St. Mary's mat.") == [
        *("the", "cat", ",", "is", "n't", "(", "it", ")", "on", "st.", "mary", "'s", "mat", ".")
    ]
    assert tokenize("  ") == []


@given(text=captions)
@settings(deadline=None, max_examples=400)
def test_tokens_are_nltks(text: str) -> None:
    assert tokenize(text) == nltk_tokens(text)


def test_tokens_of_any_two_neighbours_are_nltks() -> None:
    """Alone, so that they start and end the caption, and inside it."""
    pairs = [first + second for first, second in product(ASCII_PIECES, repeat=2)]
    texts = [text for pair in pairs for text in (pair, f"a{pair} b", f"a{pair}b c")]
    assert [text for text in texts if tokenize(text) != nltk_tokens(text)] == []


@pytest.mark.slow
def test_tokens_of_real_captions_are_nltks(real_captions: list[str]) -> None:
    assert [text for text in Random(1).sample(real_captions, 20_000) if tokenize(text) != nltk_tokens(text)] == []


@pytest.mark.slow
def test_tokens_come_eight_times_as_fast_as_nltks(real_captions: list[str]) -> None:
    """Measured 60 times; side by side, so that a busy machine slows both."""
    sample = Random(0).sample(real_captions, 4_000)

    def seconds(function: Callable[[str], list[str]]) -> float:
        start = process_time()
        for text in sample:
            function(text)
        return process_time() - start

    assert median(seconds(nltk_tokens) / seconds(tokenize) for _ in range(5)) >= 8


def test_tokens_are_joined_as_people_write() -> None:
    for text in ("the cat isn't here, is it?", "a man's dog (brown) runs.", "they've seen: one; we'd go!"):
        assert join_tokens(tokenize(text)) == text
    assert join_tokens(["a", "sign", "'dog", ".5", ":)"]) == "a sign 'dog .5 :)"


def test_words_are_counted_over_all_captions() -> None:
    assert count_words([["a", "cat"], ["a", "a"], []]) == Counter(a=3, cat=1)


def test_a_vocabulary_without_words_asks_for_a_smaller_threshold() -> None:
    empty = Vocabulary.from_counts({"a": 1}, threshold=2)
    with pytest.raises(UserError, match=r"v\.json holds no word .* smaller threshold"):
        Vocabulary.from_json(empty.to_json(), origin="v.json")
