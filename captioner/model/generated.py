"""What searches return, and what all of them obey, in PyTorch and in NumPy. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from captioner.errors import UserError
from captioner.vocabulary import PAD, START, UNK

FORBIDDEN = [PAD, START, UNK]
DIVERSITY = 0.5
"""Penalty of a token, in log-probability, for each earlier caption of the image that has it at the same step."""
COPY_PENALTY = 1e4
"""Penalty for ending as a copy of an earlier caption: more than that of any word."""
MAX_LENGTH_PENALTY = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingDefaults:
    """How captions are generated unless the user says otherwise. Raises UserError for impossible values."""

    beam_size: int = 3
    max_tokens: int = 20
    length_penalty: float = 1.0
    no_repeat_trigram: bool = True

    def __post_init__(self) -> None:
        if min(self.beam_size, self.max_tokens) < 1 or not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise UserError(f"no captions with {self}: give at least 1 beam and 1 token, and a length penalty around 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedCaption:
    """Token ids without `<end>`, and each step's log-probability, that of `<end>` included.

    A caption cut at `max_tokens` has no `<end>`: one log-probability for each token. `attention` (T, R) is how much
    each step looked at each position of the image, row by row; None unless it was asked for.
    """

    tokens: list[int]
    token_scores: list[float]
    attention: np.ndarray | None = None

    @property
    def score(self) -> float:
        """Mean log-probability (natural) of a step."""
        return sum(self.token_scores) / len(self.token_scores)
