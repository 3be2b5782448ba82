"""Captions from image embeddings: batched greedy and beam search.

Shapes: B images, K beams an image, N captions under way, S ways to go on, T generated tokens, E embedding width,
V vocabulary. Both searches stop as soon as every caption has ended, never produce `<pad>`, `<start>` or `<unk>`, and
never an empty caption.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.model import CaptionModel, LSTMState
from captioner.vocabulary import END, PAD, START, UNK

NEVER_SAID = [PAD, START, UNK]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """A generated caption: token ids without `<end>`, and each step's log-probability, that of `<end>` included.

    A caption cut at the greatest length has no `<end>`, so as many log-probabilities as tokens.
    """

    tokens: list[int]
    token_scores: list[float]

    @property
    def score(self) -> float:
        """Mean log-probability (natural) of a step."""
        return sum(self.token_scores) / len(self.token_scores)


@torch.no_grad()
def decode(
    model: CaptionModel, image_BE: Tensor, *, beam_size: int, max_tokens: int, length_penalty: float = 1.0
) -> list[Caption]:
    """The best caption of each image: greedy when `beam_size` is 1, beam search otherwise."""
    if beam_size < 1 or max_tokens < 1:
        raise ValueError(f"beam_size {beam_size} and max_tokens {max_tokens} must be at least 1")
    if not len(image_BE):
        return []
    if beam_size == 1:
        return greedy(model, image_BE, max_tokens=max_tokens)
    return beam_search(model, image_BE, beam_size=beam_size, max_tokens=max_tokens, length_penalty=length_penalty)


def _likeliest(logits_NV: Tensor, *, num_tokens: int, first: bool) -> tuple[Tensor, Tensor]:
    """The tokens that may be said next and are likeliest: log-probabilities (N, S), the best first, and tokens (N, S).

    Words that are never said, and an end before any word, come last and at minus infinity.
    """
    logits_NV = logits_NV.float()
    log_sum_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    logits_NV[:, [*NEVER_SAID, END] if first else NEVER_SAID] = -torch.inf
    best_NS, tokens_NS = logits_NV.topk(num_tokens)
    return best_NS - log_sum_N1, tokens_NS


def greedy(model: CaptionModel, image_BE: Tensor, *, max_tokens: int) -> list[Caption]:
    """Take the likeliest next token, at most `max_tokens` times. Captions that have ended leave the batch."""
    rows = torch.arange(len(image_BE), device=image_BE.device)
    state = model.start(image_BE, rows_N=rows)
    tokens_N = torch.full_like(rows, START)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max_tokens):
        logits_NV, state = model.advance(tokens_N, state, image_BE[rows])
        scores_N, tokens_N = (best[:, 0] for best in _likeliest(logits_NV, num_tokens=1, first=step == 0))
        steps.append((rows, tokens_N, scores_N))
        alive = (tokens_N != END).nonzero()[:, 0]
        if not len(alive):
            break
        if len(alive) < len(rows):
            rows, tokens_N, state = rows[alive], tokens_N[alive], _select(state, alive)
    return _collect(steps, num_captions=len(image_BE))


def _collect(steps: list[tuple[Tensor, Tensor, Tensor]], *, num_captions: int) -> list[Caption]:
    """Captions from steps of (row of caption, token, score); one transfer from the device in all."""
    captions = [Caption(tokens=[], token_scores=[]) for _ in range(num_captions)]
    rows, tokens, scores = (torch.cat(column).tolist() for column in zip(*steps, strict=True))
    for row, token, score in zip(rows, tokens, scores, strict=True):
        captions[row].token_scores.append(score)
        if token != END:
            captions[row].tokens.append(token)
    return captions


def _select(state: LSTMState, rows: Tensor) -> LSTMState:
    return state[0][:, rows], state[1][:, rows]


def beam_search(
    model: CaptionModel, image_BE: Tensor, *, beam_size: int, max_tokens: int, length_penalty: float = 1.0
) -> list[Caption]:
    """Keep the `beam_size` likeliest beginnings of each image; of those that ended, the best score wins.

    The score is the total log-probability over the number of steps to the power of `length_penalty`: 1 is the mean
    step, 0 the plain sum, which favours short captions. An ended beam keeps its place and its total, so an image is
    done when its K best are all ended; where none has ended at `max_tokens`, the best unended one is the caption.
    The beams under way of all images advance in one batch, which ended ones leave.
    """
    num_images, num_words, device = len(image_BE), model.config.vocabulary_size, image_BE.device
    first_beam_B = torch.arange(num_images, device=device) * beam_size
    totals_BK = torch.full((num_images, beam_size), -torch.inf, device=device)
    totals_BK[:, 0] = 0.0  # the others only fill places, as if they had ended at no probability
    tokens_BK = torch.full((num_images, beam_size), END, device=device)
    tokens_BK[:, 0] = START
    history_BKT = tokens_BK.new_empty((num_images, beam_size, 0))
    scores_BKT = totals_BK.new_empty((num_images, beam_size, 0))
    alive_N = first_beam_B  # beams under way, numbered through all images
    state = model.start(image_BE, rows_N=torch.arange(num_images, device=device))
    for step in range(max_tokens):
        logits_NV, state = model.advance(tokens_BK.flatten()[alive_N], state, image_BE[alive_N // beam_size])
        best_NS, words_NS = _likeliest(logits_NV, num_tokens=min(beam_size, num_words), first=step == 0)
        steps_BKS, words_BKS = _ways_on(best_NS, words_NS, alive_N, num_images=num_images, beam_size=beam_size)
        totals_BK, chosen_BK = (totals_BK[..., None] + steps_BKS).flatten(1).topk(beam_size)
        origin_BK = chosen_BK // steps_BKS.shape[2]
        tokens_BK = words_BKS.flatten(1).gather(1, chosen_BK)
        step_scores_BK = steps_BKS.flatten(1).gather(1, chosen_BK)
        history_BKT = torch.cat((_reorder(history_BKT, origin_BK), tokens_BK[..., None]), dim=2)
        scores_BKT = torch.cat((_reorder(scores_BKT, origin_BK), step_scores_BK[..., None]), dim=2)
        still_alive_N = (tokens_BK != END).flatten().nonzero()[:, 0]
        if not len(still_alive_N):
            break
        origin_N = (origin_BK + first_beam_B[:, None]).flatten()[still_alive_N]
        state, alive_N = _select(state, torch.searchsorted(alive_N, origin_N)), still_alive_N
    return _best_beams(history_BKT, scores_BKT, totals_BK, length_penalty=length_penalty)


def _ways_on(
    best_NS: Tensor, words_NS: Tensor, alive_N: Tensor, *, num_images: int, beam_size: int
) -> tuple[Tensor, Tensor]:
    """For every beam (B, K, S) log-probabilities and tokens: an ended one has only `<end>` to repeat, for nothing."""
    steps_BKS = best_NS.new_full((num_images, beam_size, best_NS.shape[1]), -torch.inf)
    steps_BKS[..., 0] = 0.0
    words_BKS = torch.full_like(steps_BKS, END, dtype=torch.long)
    steps_BKS.view(-1, best_NS.shape[1])[alive_N] = best_NS
    words_BKS.view(-1, best_NS.shape[1])[alive_N] = words_NS
    return steps_BKS, words_BKS


def _reorder(values_BKT: Tensor, origin_BK: Tensor) -> Tensor:
    return values_BKT.gather(1, origin_BK[..., None].expand(-1, -1, values_BKT.shape[2]))


def _best_beams(history_BKT: Tensor, scores_BKT: Tensor, totals_BK: Tensor, *, length_penalty: float) -> list[Caption]:
    """Of each image the ended beam (any beam, where none ended) with the best score: see `beam_search`.

    Beams of total minus infinity only fill places that no possible beginning took, and are no captions.
    """
    best = []
    for beams, beam_scores, totals in zip(history_BKT.tolist(), scores_BKT.tolist(), totals_BK.tolist(), strict=True):
        possible = [pair for *pair, total in zip(beams, beam_scores, totals, strict=True) if total > -math.inf]
        captions = [(END in tokens, _caption(tokens, scores)) for tokens, scores in possible]
        best.append(max(captions, key=lambda pair: (pair[0], _beam_score(pair[1], length_penalty)))[1])
    return best


def _caption(tokens: list[int], scores: list[float]) -> Caption:
    length = tokens.index(END) if END in tokens else len(tokens)
    return Caption(tokens=tokens[:length], token_scores=scores[: length + 1])


def _beam_score(caption: Caption, length_penalty: float) -> float:
    return sum(caption.token_scores) / len(caption.token_scores) ** length_penalty
