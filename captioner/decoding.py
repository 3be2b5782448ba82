"""Captions from image embeddings: batched greedy and beam search.

Shapes: B images, K beams an image, T generated tokens, E embedding width, V vocabulary. Both searches stop as soon
as every caption has ended, never produce `<pad>`, `<start>` or `<unk>`, and never an empty caption.
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
def decode(model: CaptionModel, image_BE: Tensor, *, beam_size: int, max_tokens: int) -> list[Caption]:
    """The best caption of each image: greedy when `beam_size` is 1, beam search otherwise."""
    if beam_size < 1 or max_tokens < 1:
        raise ValueError(f"beam_size {beam_size} and max_tokens {max_tokens} must be at least 1")
    if not len(image_BE):
        return []
    if beam_size == 1:
        return greedy(model, image_BE, max_tokens=max_tokens)
    return beam_search(model, image_BE, beam_size=beam_size, max_tokens=max_tokens)


def _log_probabilities(logits_NV: Tensor, *, first: bool) -> Tensor:
    """Log-probabilities with the words that are never said, and an end before any word, at minus infinity."""
    log_probabilities_NV = logits_NV.float().log_softmax(dim=1)
    log_probabilities_NV[:, NEVER_SAID] = -torch.inf
    if first:
        log_probabilities_NV[:, END] = -torch.inf
    return log_probabilities_NV


def greedy(model: CaptionModel, image_BE: Tensor, *, max_tokens: int) -> list[Caption]:
    """Take the likeliest next token, at most `max_tokens` times. Captions that have ended leave the batch."""
    rows = torch.arange(len(image_BE), device=image_BE.device)
    state = model.start(image_BE, rows_N=rows)
    tokens_N = torch.full_like(rows, START)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max_tokens):
        logits_NV, state = model.advance(tokens_N, state, image_BE[rows])
        scores_N, tokens_N = _log_probabilities(logits_NV, first=step == 0).max(dim=1)
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


def beam_search(model: CaptionModel, image_BE: Tensor, *, beam_size: int, max_tokens: int) -> list[Caption]:
    """Keep the `beam_size` likeliest beginnings of each image; the caption with the best mean step wins.

    All beams of all images advance in one batch. An ended beam keeps its place and its score, so an image is done
    when its K best are all ended; where none has ended at `max_tokens`, the best unended one is the caption.
    """
    num_images, device = len(image_BE), image_BE.device
    image_of_beam = torch.arange(num_images, device=device).repeat_interleave(beam_size)
    state = model.start(image_BE, rows_N=image_of_beam)
    image_NE = image_BE[image_of_beam]
    tokens_BK = torch.full((num_images, beam_size), START, device=device)
    totals_BK = torch.full((num_images, beam_size), -torch.inf, device=device)
    totals_BK[:, 0] = 0.0
    ended_BK = torch.zeros_like(tokens_BK, dtype=torch.bool)
    history_BKT = torch.empty((num_images, beam_size, 0), dtype=torch.long, device=device)
    scores_BKT = torch.empty((num_images, beam_size, 0), device=device)
    for step in range(max_tokens):
        logits_NV, state = model.advance(tokens_BK.flatten(), state, image_NE)
        steps_BKV = _log_probabilities(logits_NV, first=step == 0).view(num_images, beam_size, -1)
        steps_BKV = _only_repeat_end(steps_BKV, ended_BK)
        totals_BK, chosen_BK = (totals_BK[..., None] + steps_BKV).flatten(1).topk(beam_size)
        origin_BK, tokens_BK = chosen_BK // steps_BKV.shape[2], chosen_BK % steps_BKV.shape[2]
        step_scores_BK = steps_BKV.flatten(1).gather(1, chosen_BK)
        history_BKT = torch.cat((_reorder(history_BKT, origin_BK), tokens_BK[..., None]), dim=2)
        scores_BKT = torch.cat((_reorder(scores_BKT, origin_BK), step_scores_BK[..., None]), dim=2)
        flat = (origin_BK + torch.arange(num_images, device=device)[:, None] * beam_size).flatten()
        state = _select(state, flat)
        ended_BK = tokens_BK == END
        if bool(ended_BK.all()):
            break
    return _best_beams(history_BKT, scores_BKT, totals_BK)


def _only_repeat_end(steps_BKV: Tensor, ended_BK: Tensor) -> Tensor:
    """An ended beam continues with `<end>` for nothing, and with no other word."""
    closed_V = torch.full_like(steps_BKV[0, 0], -torch.inf)
    closed_V[END] = 0.0
    return torch.where(ended_BK[..., None], closed_V, steps_BKV)


def _reorder(values_BKT: Tensor, origin_BK: Tensor) -> Tensor:
    return values_BKT.gather(1, origin_BK[..., None].expand(-1, -1, values_BKT.shape[2]))


def _best_beams(history_BKT: Tensor, scores_BKT: Tensor, totals_BK: Tensor) -> list[Caption]:
    """Of each image the ended beam (any beam, where none ended) with the greatest mean log-probability.

    Beams of total minus infinity only fill places that no possible beginning took, and are no captions.
    """
    best = []
    for beams, beam_scores, totals in zip(history_BKT.tolist(), scores_BKT.tolist(), totals_BK.tolist(), strict=True):
        possible = [pair for *pair, total in zip(beams, beam_scores, totals, strict=True) if total > -math.inf]
        captions = [(END in tokens, _caption(tokens, scores)) for tokens, scores in possible]
        best.append(max(captions, key=lambda pair: (pair[0], pair[1].score))[1])
    return best


def _caption(tokens: list[int], scores: list[float]) -> Caption:
    length = tokens.index(END) if END in tokens else len(tokens)
    return Caption(tokens=tokens[:length], token_scores=scores[: length + 1])
