"""Captions from encoded images: batched greedy, beam and diverse search.

`images` are B encoded images, as `model.encode` returns them.

Shapes: B images, K beams an image, N unfinished captions, S candidates for the next token, G captions to differ from,
T generated tokens, R positions of an image, V vocabulary. The searches stop as soon as every caption has ended, never
produce `<pad>`, `<start>` or `<unk>`, and never an empty caption.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.model.generated import COPY_PENALTY, DIVERSITY, FORBIDDEN, GeneratedCaption
from captioner.model.network import CaptionModel
from captioner.vocabulary import END, PAD, SPECIAL_WORDS, START


@torch.no_grad()
def decode(
    model: CaptionModel,
    images: Tensor,
    *,
    beam_size: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    no_repeat_trigram: bool = True,
    with_attention: bool = False,
) -> list[GeneratedCaption]:
    """The best caption of each image: greedy when `beam_size` is 1, beam search otherwise.

    With `no_repeat_trigram` a caption has no trigram twice; scores stay the model's own. `with_attention` keeps what
    each step looked at, if the model has attention.
    """
    if model.config.vocabulary_size <= len(SPECIAL_WORDS):
        raise ValueError("the model's vocabulary has no words")
    if not len(images):
        return []
    with_attention &= model.config.decoder == "attention"
    options = {"max_tokens": max_tokens, "no_repeat_trigram": no_repeat_trigram, "with_attention": with_attention}
    if beam_size == 1:
        return greedy(model, images, **options)
    return beam_search(model, images, beam_size=beam_size, length_penalty=length_penalty, **options)


@torch.no_grad()
def diverse(
    model: CaptionModel,
    images: Tensor,
    *,
    num_captions: int,
    beam_size: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    no_repeat_trigram: bool = True,
    with_attention: bool = False,
) -> list[list[GeneratedCaption]]:
    """Several captions of each image, the first that of `decode`: diverse beam search with groups of one beam.

    Each further caption is a greedy search with a penalty on tokens that earlier ones have at the same step
    (Vijayakumar et al., 2016), which here also grows with the length of the copied beginning. All captions of an image
    differ if the vocabulary has at least `num_captions + max_tokens` words.
    """
    options = {"max_tokens": max_tokens, "no_repeat_trigram": no_repeat_trigram, "with_attention": with_attention}
    best = decode(model, images, beam_size=beam_size, length_penalty=length_penalty, **options)
    captions = [[caption] for caption in best]
    while captions and len(captions[0]) < num_captions:
        others = greedy(model, images, earlier=captions, **options)
        captions = [[*group, other] for group, other in zip(captions, others, strict=True)]
    return captions


def _likeliest(
    logits_NV: Tensor, history_NT: Tensor, *, num_tokens: int, no_repeat_trigram: bool
) -> tuple[Tensor, Tensor]:
    """The likeliest next tokens after `history_NT`, best first: log-probabilities (N, S) and tokens (N, S).

    Forbidden ones (special words, an end before any word, the third token of a repeated trigram) are at minus infinity.
    """
    scores_NV = logits_NV.log_softmax(dim=1, dtype=torch.float32)
    scores_NV[:, FORBIDDEN if history_NT.shape[1] else [*FORBIDDEN, END]] = -torch.inf
    if no_repeat_trigram:
        scores_NV.scatter_(1, _third_tokens(history_NT), -torch.inf)
    return _topk(scores_NV, num_tokens)


def _third_tokens(history_NT: Tensor) -> Tensor:
    """The tokens that followed earlier occurrences of the last two tokens; `<pad>`, always forbidden, elsewhere."""
    seen = (history_NT[:, :-2] == history_NT[:, -2:-1]) & (history_NT[:, 1:-1] == history_NT[:, -1:])
    return torch.where(seen, history_NT[:, 2:], PAD)


def _topk(scores_NV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """`scores_NV.topk(num_tokens)`, several times faster on the CPU.

    The vocabulary is a table of 32 rows (R); the best tokens are in the columns with the greatest maxima.
    """
    num_rows, num_words = 32, scores_NV.shape[1]
    width = num_words // num_rows
    if width < num_tokens:
        return scores_NV.topk(num_tokens)
    ids_V = torch.arange(num_words, device=scores_NV.device)
    table_NRW = scores_NV[:, : num_rows * width].unflatten(1, (num_rows, width))
    columns_NS = table_NRW.amax(dim=1).topk(num_tokens).indices
    in_columns = (columns_NS[..., None] + ids_V[: num_rows * width : width]).flatten(1)
    rest = ids_V[num_rows * width :].expand(len(scores_NV), -1)
    candidates_NC = torch.cat((in_columns, rest), dim=1)
    best_NS, indices_NS = scores_NV.gather(1, candidates_NC).topk(num_tokens)
    return best_NS, candidates_NC.gather(1, indices_NS)


def greedy(
    model: CaptionModel,
    images: Tensor,
    *,
    max_tokens: int,
    no_repeat_trigram: bool = True,
    with_attention: bool = False,
    earlier: Sequence[Sequence[GeneratedCaption]] = (),
) -> list[GeneratedCaption]:
    """Take the likeliest next token, at most `max_tokens` times. Captions that have ended leave the batch.

    `earlier` has the captions of each image that this one must differ from, equally many for each: see `diverse`.
    """
    rows = torch.arange(len(images), device=images.device)
    state = model.start(images, rows, 1)
    tokens_N = torch.full_like(rows, START)
    history_NT = rows.new_empty((len(rows), 0))
    earlier_NGT = _padded_steps(earlier or [()] * len(rows), max_tokens=max_tokens).to(rows.device)
    num_tokens = min(1 + earlier_NGT.shape[1], model.config.vocabulary_size)
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(max_tokens):
        logits_NV, state, attention_NR = model.advance(tokens_N, state)
        best = _likeliest(logits_NV, history_NT, num_tokens=num_tokens, no_repeat_trigram=no_repeat_trigram)
        scores_N, tokens_N = _pick_different(*best, history_NT, earlier_NGT)
        attention = (attention_NR,) if with_attention and attention_NR is not None else ()
        steps.append((rows, tokens_N, scores_N, *attention))
        alive = (tokens_N != END).nonzero()[:, 0]
        if not len(alive):
            break
        history_NT = torch.cat((history_NT, tokens_N[:, None]), dim=1)
        if len(alive) < len(rows):
            rows, tokens_N = rows[alive], tokens_N[alive]
            state = state.take(alive, rows)
            history_NT, earlier_NGT = history_NT[alive], earlier_NGT[alive]
    return _collect(steps, num_captions=len(images))


@torch.no_grad()
def sample(model: CaptionModel, images: Tensor, uniform_BST: Tensor, *, temperature: float = 1) -> list[list[int]]:
    """Captions drawn from the model, S of each image, one after the other, at most T tokens long.

    Each is the token ids, with `<end>` unless the caption was cut. The numbers in [0, 1) choose the tokens: equal ones
    give equal captions, in any batch. Logits are divided by `temperature`: below 1, likely tokens become likelier.
    """
    num_images, num_samples, max_tokens = uniform_BST.shape
    cells_N = torch.arange(num_images * num_samples, device=images.device)
    uniform_NT = uniform_BST.flatten(0, 1)
    state, tokens_N, rows_N = model.start(images, cells_N, num_samples), torch.full_like(cells_N, START), cells_N
    steps: list[tuple[Tensor, Tensor]] = []
    for step in range(max_tokens):
        logits_NV, state, _ = model.advance(tokens_N, state)
        logits_NV[:, [*FORBIDDEN, END] if step == 0 else FORBIDDEN] = -torch.inf
        cumulated_NV = logits_NV.div_(temperature).softmax(dim=1, dtype=torch.float32).cumsum(dim=1)
        chosen_N1 = uniform_NT[rows_N, step, None] * cumulated_NV[:, -1:]
        tokens_N = torch.searchsorted(cumulated_NV, chosen_N1, right=True)[:, 0].clamp(max=logits_NV.shape[1] - 1)
        steps.append((rows_N, tokens_N))
        alive = (tokens_N != END).nonzero()[:, 0]
        if not len(alive):
            break
        if len(alive) < len(rows_N):
            rows_N, tokens_N = rows_N[alive], tokens_N[alive]
            state = state.take(alive, rows_N)
    captions: list[list[int]] = [[] for _ in range(num_images * num_samples)]
    for row, token in zip(*(torch.cat(column).tolist() for column in zip(*steps, strict=True)), strict=True):
        captions[row].append(token)
    return captions


def _padded_steps(captions: Sequence[Sequence[GeneratedCaption]], *, max_tokens: int) -> Tensor:
    """The steps (B, G, T) of G captions of each image: tokens, `<end>` unless cut, then `<pad>`."""
    fill = [END] + [PAD] * max_tokens
    steps = [[[*caption.tokens, *fill][:max_tokens] for caption in group] for group in captions]
    return torch.tensor(steps, dtype=torch.long).view(len(captions), -1, max_tokens)


def _pick_different(
    scores_NS: Tensor, tokens_NS: Tensor, history_NT: Tensor, earlier_NGT: Tensor
) -> tuple[Tensor, Tensor]:
    """The score (N), without its penalty, and the token (N) that are best after the penalties for earlier captions.

    Only G tokens have a penalty, so the best is among the G + 1 likeliest. It grows while a caption copies an earlier
    one, so that they differ before their last words.
    """
    step = history_NT.shape[1]
    now_NG = earlier_NGT[:, :, step]
    copied_NG = (earlier_NGT[:, :, :step] == history_NT[:, None]).all(dim=2)
    ends_NG = (now_NG == END) | (step + 1 == earlier_NGT.shape[2])
    penalties_NG = torch.where(copied_NG & ends_NG, COPY_PENALTY, DIVERSITY * (1 + step * copied_NG))
    penalties_NS = ((tokens_NS[:, :, None] == now_NG[:, None]) * penalties_NG[:, None]).sum(dim=2)
    chosen_N1 = (scores_NS - penalties_NS).argmax(dim=1, keepdim=True)
    return scores_NS.gather(1, chosen_N1)[:, 0], tokens_NS.gather(1, chosen_N1)[:, 0]


def _collect(steps: list[tuple[Tensor, ...]], *, num_captions: int) -> list[GeneratedCaption]:
    """Captions from steps of (row of caption, token, score and perhaps attention), with a transfer for each column."""
    rows, tokens, scores, *attention = (torch.cat(column).cpu() for column in zip(*steps, strict=True))
    captions = [
        GeneratedCaption(tokens=[], token_scores=[], attention=attention[0][rows == row].numpy() if attention else None)
        for row in range(num_captions)
    ]
    for row, token, score in zip(rows.tolist(), tokens.tolist(), scores.tolist(), strict=True):
        captions[row].token_scores.append(score)
        if token != END:
            captions[row].tokens.append(token)
    return captions


def beam_search(
    model: CaptionModel,
    images: Tensor,
    *,
    beam_size: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    no_repeat_trigram: bool = True,
    with_attention: bool = False,
) -> list[GeneratedCaption]:
    """Keep the `beam_size` likeliest beams of each image; of those that ended, the best score wins.

    The score is the total log-probability over the number of steps to the power of `length_penalty`: 1 is the mean
    step, 0 the plain sum, which favours short captions. An ended beam stays with its total, so an image is done when
    its K best beams have all ended; if none has ended at `max_tokens`, the best unended one is the caption. The
    unfinished beams of all images advance in one batch, which ended ones leave.
    """
    num_images, num_words, device = len(images), model.config.vocabulary_size, images.device
    first_beam_B = torch.arange(num_images, device=device) * beam_size
    totals_BK = torch.full((num_images, beam_size), -torch.inf, device=device)
    totals_BK[:, 0] = 0.0  # the others are padding: ended beams of probability 0
    tokens_BK = torch.full((num_images, beam_size), END, device=device)
    tokens_BK[:, 0] = START
    history_BKT = tokens_BK.new_empty((num_images, beam_size, 0))
    scores_BKT = totals_BK.new_empty((num_images, beam_size, 0))
    attention_BKTR = totals_BK.new_empty((num_images, beam_size, 0, images.shape[1])) if with_attention else None
    alive_N = first_beam_B  # indices of unfinished beams among the B x K
    state = model.start(images, alive_N, beam_size)
    for _ in range(max_tokens):
        logits_NV, state, attention_NR = model.advance(tokens_BK.flatten()[alive_N], state)
        best_NS, words_NS = _likeliest(
            logits_NV,
            history_BKT.flatten(0, 1)[alive_N],
            num_tokens=min(beam_size, num_words),
            no_repeat_trigram=no_repeat_trigram,
        )
        steps_BKS, words_BKS = _candidates(best_NS, words_NS, alive_N, num_images=num_images, beam_size=beam_size)
        totals_BK, chosen_BK = (totals_BK[..., None] + steps_BKS).flatten(1).topk(beam_size)
        origin_BK = chosen_BK // steps_BKS.shape[2]
        tokens_BK = words_BKS.flatten(1).gather(1, chosen_BK)
        step_scores_BK = steps_BKS.flatten(1).gather(1, chosen_BK)
        history_BKT = torch.cat((_reorder(history_BKT, origin_BK), tokens_BK[..., None]), dim=2)
        scores_BKT = torch.cat((_reorder(scores_BKT, origin_BK), step_scores_BK[..., None]), dim=2)
        if attention_BKTR is not None and attention_NR is not None:
            attention_BKR = attention_BKTR.new_zeros((num_images * beam_size, attention_NR.shape[1]))
            attention_BKR[alive_N] = attention_NR
            attention_BKTR = torch.cat((attention_BKTR, attention_BKR.view(num_images, beam_size, 1, -1)), dim=2)
            attention_BKTR = attention_BKTR[torch.arange(num_images)[:, None], origin_BK]
        still_alive_N = (tokens_BK != END).flatten().nonzero()[:, 0]
        if not len(still_alive_N):
            break
        origin_N = (origin_BK + first_beam_B[:, None]).flatten()[still_alive_N]
        state, alive_N = state.take(torch.searchsorted(alive_N, origin_N), still_alive_N), still_alive_N
    return _best_beams(history_BKT, scores_BKT, totals_BK, attention_BKTR, length_penalty=length_penalty)


def _candidates(
    best_NS: Tensor, words_NS: Tensor, alive_N: Tensor, *, num_images: int, beam_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens (B, K, S) of every beam's candidates: an ended one only repeats `<end>`, at 0."""
    steps_BKS = best_NS.new_full((num_images, beam_size, best_NS.shape[1]), -torch.inf)
    steps_BKS[..., 0] = 0.0
    words_BKS = torch.full_like(steps_BKS, END, dtype=torch.long)
    steps_BKS.view(-1, best_NS.shape[1])[alive_N] = best_NS
    words_BKS.view(-1, best_NS.shape[1])[alive_N] = words_NS
    return steps_BKS, words_BKS


def _reorder(values_BKT: Tensor, origin_BK: Tensor) -> Tensor:
    return values_BKT.gather(1, origin_BK[..., None].expand(-1, -1, values_BKT.shape[2]))


def _best_beams(
    history_BKT: Tensor,
    scores_BKT: Tensor,
    totals_BK: Tensor,
    attention_BKTR: Tensor | None,
    *,
    length_penalty: float,
) -> list[GeneratedCaption]:
    """The ended beam of each image (any beam, if none ended) with the best score: see `beam_search`.

    Beams of total minus infinity are padding.
    """
    best = []
    columns = (history_BKT.tolist(), scores_BKT.tolist(), totals_BK.tolist())
    for image, (histories, scores_of_beams, totals) in enumerate(zip(*columns, strict=True)):
        found: list[tuple[bool, float, int]] = []  # ended, score, beam
        for beam, (tokens, scores) in enumerate(zip(histories, scores_of_beams, strict=True)):
            if totals[beam] > -math.inf:
                num_steps = _num_steps(tokens)
                found.append((END in tokens, sum(scores[:num_steps]) / num_steps**length_penalty, -beam))
        beam = -max(found)[2]
        tokens, num_steps = histories[beam], _num_steps(histories[beam])
        best.append(
            GeneratedCaption(
                tokens=[token for token in tokens[:num_steps] if token != END],
                token_scores=scores_of_beams[beam][:num_steps],
                attention=None if attention_BKTR is None else attention_BKTR[image, beam, :num_steps].cpu().numpy(),
            )
        )
    return best


def _num_steps(tokens: list[int]) -> int:
    """The steps up to the first `<end>`, it included, or all."""
    return tokens.index(END) + 1 if END in tokens else len(tokens)
