"""Alt text: what a person would have written, whatever the decoder said."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.alt_text import alt_text
from captioner.vocabulary import join_tokens, tokenize

WORDS = (
    "a an the man dog and of in on picture close up there is with two , . '' `` ( ) 's n't i tv next to u.s. st. 3 %"
)
SPOKEN = st.lists(st.sampled_from(WORDS.split()), max_size=30).map(join_tokens)
CAPTIONS = SPOKEN | st.text(max_size=60)
GREATEST = st.integers(min_value=2, max_value=150)


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a man riding a wave .", "A man riding a wave."),
        ("a man riding a wave", "A man riding a wave."),
        ("is that a dog ?", "Is that a dog."),
        ("he was late . the bus left", "He was late. The bus left."),
        ("a u.s. flag", "A u.s. flag."),
    ],
)
def test_sentence_case_and_one_full_stop(caption: str, wanted: str) -> None:
    assert alt_text(join_tokens(caption.split())) == wanted


@pytest.mark.parametrize(
    "text",
    [
        'A sign that says "stop" in red.',
        "The boys' hats don't fit.",
        "A shirt for $10 with 50% off (two of them).",
        "A man cannot lift player #7.",
        "A girl is gonna jump.",
    ],
)
def test_what_the_tokenizer_took_apart_is_whole_again(text: str) -> None:
    assert alt_text(join_tokens(tokenize(text))) == text


@pytest.mark.parametrize(
    ("caption", "max_chars", "wanted"),
    [
        ("a man in a hat rides a horse", 100, "A man in a hat rides a horse."),
        ("a man in a hat rides a horse", 29, "A man in a hat rides a horse."),
        ("a man in a hat rides a horse", 28, "A man in a hat rides a."),
        ("a man in a hat rides a horse", 12, "A man in a."),
        ("incomprehensibilities", 8, "Incompr."),
    ],
)
def test_it_is_cut_at_a_word(caption: str, max_chars: int, wanted: str) -> None:
    assert alt_text(caption, max_chars=max_chars) == wanted


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="max_chars 1 "):
        alt_text("a dog", max_chars=1)


@given(CAPTIONS, GREATEST)
def test_any_caption_becomes_one_clean_sentence(caption: str, max_chars: int) -> None:
    text = alt_text(caption, max_chars=max_chars)
    has_word = any(letter.isalnum() for letter in caption)
    assert bool(text) == has_word
    assert len(text) <= max_chars
    assert text.isprintable()
    assert text == text.strip()
    assert "  " not in text
    if has_word:
        assert re.fullmatch(r".*[^.]\.", text)


@given(CAPTIONS, GREATEST)
def test_alt_text_stays_as_it_is(caption: str, max_chars: int) -> None:
    once = alt_text(caption, max_chars=max_chars)
    assert alt_text(once, max_chars=max_chars) == once


@given(st.lists(st.sampled_from(["man", "dog", "sees", "red", "beach", "seven"]), min_size=1, unique=True))
def test_a_good_caption_keeps_all_its_words(words: list[str]) -> None:
    assert alt_text(" ".join(words)).lower() == " ".join(words) + "."


def test_torch_is_not_needed() -> None:
    code = "import sys, captioner.alt_text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
