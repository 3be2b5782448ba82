"""How captions read: each measure by cases, and what it does not depend on."""

import pytest

from captioner.fluency import fluency


@pytest.mark.parametrize(
    ("caption", "repeats", "dangles"),
    [
        ("A man with a", False, True),
        ("a dog on a beach with", False, True),
        ("A dog and a cat and.", False, True),
        ("a dog looks on", False, False),
        ("a bus and a bus", False, False),
        ("a bus and a bus and", True, True),
        ("a red bus next to A RED BUS.", True, False),
        ("red red red red", True, False),
        ("with", False, True),
        ("", False, False),
    ],
)
def test_a_caption_repeats_a_trigram_or_dangles(caption: str, repeats: bool, dangles: bool) -> None:
    found = fluency([caption])
    assert (found["repeated_trigrams"], found["dangling_ends"]) == (repeats, dangles)


def test_measures_are_of_all_captions() -> None:
    captions = ["A dog.", "a dog", "a red bus near a red bus", "a cat with"]
    assert fluency(captions) == {
        "repeated_trigrams": 1 / 4,
        "dangling_ends": 1 / 4,
        "different_captions": 3,
        "mean_tokens": 14 / 4,
    }
