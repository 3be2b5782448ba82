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
        ("my dog and i , i 'm told , watch tv", "My dog and I, I'm told, watch TV."),
        ("an i-beam and an asian elephant", "An i-beam and an Asian elephant."),
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
    ("caption", "wanted"),
    [
        ("a picture of a man riding a wave on top of a surfboard .", "A man riding a wave on top of a surfboard."),
        ("a close up of a cat", "A cat."),
        ("a very close-up view of a clock", "A clock."),
        ("closeup photo of two dogs", "Two dogs."),
        ("there is a beautiful image of a horse", "A horse."),
        ("there are many people on a beach", "Many people on a beach."),
        ("in this photo, there are two boats", "Two boats."),
        ("this picture shows a kitchen", "A kitchen."),
        ("a shot of a tennis player", "A tennis player."),
    ],
)
def test_that_it_is_a_picture_goes_without_saying(caption: str, wanted: str) -> None:
    assert alt_text(caption) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "A picture hanging on a wall.",
        "A picture of a horse hanging on a wall.",
        "A black and white photo of a street.",
        "A man taking a picture of a dog.",
        "A shot of whisky.",
        "A view of a city.",
        "There is nothing.",
        "A picture.",
    ],
)
def test_other_beginnings_stay(text: str) -> None:
    assert alt_text(text.lower()) == text


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a man standing next to a", "A man standing."),
        ("a cat sitting on top of", "A cat sitting."),
        ("a cat sitting on top of .", "A cat sitting."),
        ("a dog runs on the", "A dog runs."),
        ("two people sit on", "Two people sit."),
        ("a woman holding a bunch of", "A woman."),
        ("a table with a bowl full of", "A table with a bowl."),
        ("a man in a red", "A man."),
        ("a man in red", "A man in red."),
        ("people looking on", "People looking on."),
        ("a woman with a hat on", "A woman with a hat on."),
        ("the toy he is holding", "The toy he is holding."),
        ("a couple of", "A couple."),
        ("of the", "Of."),
        ("the", "The."),
    ],
)
def test_it_ends_where_a_person_would(caption: str, wanted: str) -> None:
    assert alt_text(caption) == wanted


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a a man on the the the beach", "A man on the beach."),
        ("a cat and a dog and a dog", "A cat and a dog."),
        ("a dog and a dog and a", "A dog."),
        ("a tray with a fork , a fork , a fork", "A tray with a fork."),
        ("a red car in a field in a field", "A red car in a field."),
        ("a man on a tuk tuk goes over and over", "A man on a tuk tuk goes over and over."),
        ("dogs sit side by side", "Dogs sit side by side."),
    ],
)
def test_nothing_is_said_twice(caption: str, wanted: str) -> None:
    assert alt_text(join_tokens(caption.split())) == wanted


@pytest.mark.parametrize(
    ("caption", "max_chars", "wanted"),
    [
        ("a man in a hat rides a horse", 100, "A man in a hat rides a horse."),
        ("a man in a hat rides a horse", 29, "A man in a hat rides a horse."),
        ("a man in a hat rides a horse", 28, "A man in a hat rides."),
        ("a man in a hat rides a horse", 12, "A man."),
        ('a sign with "stop here" on it', 19, "A sign with stop."),
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
