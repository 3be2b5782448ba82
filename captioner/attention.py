"""Where the decoder looked at each word of a caption: as JSON files hold it, and in words.

Shapes: T words, R positions of the encoder's grid, row by row.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from captioner.model.generated import GeneratedCaption
    from captioner.vocabulary import Vocabulary

REGIONS = (
    "upper left", "top", "upper right",
    "left", "centre", "right",
    "lower left", "bottom", "lower right",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """How much each word looked at each position: `weights_TR`, which sum to 1 for each word.

    `grid` is the number of rows and columns of the positions. `words` are the caption's tokens as it renders them, with
    the space before them: joined, they are the caption.
    """

    words: tuple[str, ...]
    grid: tuple[int, int]
    weights_TR: np.ndarray

    @classmethod
    def of(cls, caption: "GeneratedCaption", *, vocabulary: "Vocabulary", grid: tuple[int, int]) -> "Attention | None":
        """That of a generated caption's words, without its `<end>`; None if it was decoded without attention."""
        if caption.attention is None:
            return None
        words = tuple(vocabulary.pieces(caption.tokens))
        return cls(words=words, grid=grid, weights_TR=caption.attention[: len(words)])

    def to_json(self) -> dict[str, Any]:
        """The keys `grid`, `words` and `weights`: T x R bytes in base64, scaled so that each word's largest is 255."""
        scaled_TR = np.rint(255 * self.weights_TR / self.weights_TR.max(axis=1, keepdims=True)).astype(np.uint8)
        weights = base64.b64encode(scaled_TR.tobytes()).decode()
        return {"grid": list(self.grid), "words": list(self.words), "weights": weights}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Attention":
        """What `to_json` wrote; each weight is within 1/255 of its word's largest."""
        rows, columns = content["grid"]
        scaled_TR = np.frombuffer(base64.b64decode(content["weights"]), np.uint8).reshape(-1, rows * columns)
        weights_TR = scaled_TR / scaled_TR.sum(axis=1, keepdims=True)
        return cls(words=tuple(content["words"]), grid=(rows, columns), weights_TR=weights_TR)

    def heat_maps(self) -> list[Image.Image]:
        """An RGBA image for each word, a pixel for each position: clear orange where it looked most, dark elsewhere."""
        scaled_TR = self.weights_TR / self.weights_TR.max(axis=1, keepdims=True)
        colours = np.stack((255 * scaled_TR, 140 * scaled_TR, 0 * scaled_TR, 190 - 127 * scaled_TR), axis=-1)
        return [Image.fromarray(each.reshape(*self.grid, 4)) for each in colours.round().astype(np.uint8)]

    def over(self, view_PP3: np.ndarray) -> list[Image.Image]:
        """For each word the view (P, P, 3), uint8, that the model was given, under the word's heat map."""
        view = Image.fromarray(np.ascontiguousarray(view_PP3)).convert("RGBA")
        return [Image.alpha_composite(view, each.resize(view.size)).convert("RGB") for each in self.heat_maps()]

    def texts(self) -> list[str]:
        """For each word the ninth of the view (thirds of its sides) at which it looked most, and how much."""
        rows, columns = self.grid
        cells = self.weights_TR.reshape(-1, rows, columns).repeat(3, axis=1).repeat(3, axis=2) / 9
        ninths_T9 = cells.reshape(-1, 3, rows, 3, columns).sum(axis=(2, 4)).reshape(-1, 9)
        return [
            f"{word.strip()}: looks at the {REGIONS[ninths.argmax()]}, {100 * ninths.max():.0f} % of its attention"
            for word, ninths in zip(self.words, ninths_T9, strict=True)
        ]
