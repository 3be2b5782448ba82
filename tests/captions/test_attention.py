"""Attention as files hold it, and as words tell it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.attention import REGIONS, Attention


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    words = tuple(draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=5)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    concentration = draw(st.sampled_from((0.05, 1.0, 50.0)))
    weights_TR = generator.dirichlet([concentration] * (rows * columns), size=len(words)).astype(np.float32)
    return Attention(words=words, grid=(rows, columns), weights_TR=weights_TR)


def point_at(row: int, column: int, *, grid: tuple[int, int]) -> Attention:
    """A word that looks at one position."""
    weights = np.zeros(grid, np.float32)
    weights[row, column] = 1.0
    return Attention(words=(" dog",), grid=grid, weights_TR=weights.reshape(1, -1))


@given(attentions())
def test_json_keeps_words_grid_and_weights(attention: Attention) -> None:
    found = Attention.from_json(json.loads(json.dumps(attention.to_json())))
    assert (found.words, found.grid) == (attention.words, attention.grid)
    assert found.weights_TR.sum(axis=1) == pytest.approx(1)
    scaled_TR, wanted_TR = (each.weights_TR / each.weights_TR.max(axis=1)[:, None] for each in (found, attention))
    assert np.abs(scaled_TR - wanted_TR).max() < 0.51 / 255


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("side", [3, 7, 14])
def test_each_ninth_has_its_name(side: int, number: int) -> None:
    row, column = (side // 2 * third if third < 2 else side - 1 for third in divmod(number, 3))
    (text,) = point_at(row, column, grid=(side, side)).texts()
    assert text == f"dog: looks at the {REGIONS[number]}, 100 % of its attention"


def test_a_position_on_the_line_between_ninths_is_divided() -> None:
    """Of four columns the second one is a third to the left and two thirds in the middle."""
    (text,) = point_at(0, 1, grid=(3, 4)).texts()
    assert text == "dog: looks at the top, 67 % of its attention"
    (text,) = Attention(words=("sky",), grid=(7, 7), weights_TR=np.full((1, 49), 1 / 49)).texts()
    assert text.endswith(", 11 % of its attention")


@given(attentions())
def test_a_mirrored_image_has_the_same_amounts(attention: Attention) -> None:
    def amounts(found: Attention) -> list[str]:
        return [text.rpartition(", ")[2] for text in found.texts()]

    rows, columns = attention.grid
    mirrored_TR = attention.weights_TR.reshape(-1, rows, columns)[:, ::-1, ::-1].reshape(len(attention.words), -1)
    mirrored = Attention(words=attention.words, grid=attention.grid, weights_TR=mirrored_TR)
    assert amounts(mirrored) == amounts(attention)
