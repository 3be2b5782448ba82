"""The validation split: its loss, generated captions, and how they score; exact on any number of processes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from captioner.bundle import DecodingDefaults
from captioner.decoding import decode
from captioner.metrics import caption_scores
from captioner.model import CaptionModel
from captioner.storage import write_atomic
from captioner.views import ViewSpec, normalise
from captioner.vocabulary import Vocabulary
from train.step import StepLoss, batch_loss
from train.stream import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationCaption:
    """One validation image: its caption, mean log-probability a token, and the references."""

    position: int
    image_id: int | str
    caption: str
    score: float
    references: list[str]


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[Batch], *, view: ViewSpec, accelerator: Accelerator
) -> StepLoss:
    """Summed cross-entropy and target tokens of the whole split, the same on every rank."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        _, totals = batch_loss(model, batch.to(accelerator.device), view=view, accelerator=accelerator)
        total += totals
    model.train()
    return StepLoss.of(total)


@torch.no_grad()
def caption_split(
    model: CaptionModel,
    batches: Iterable[Batch],
    *,
    view: ViewSpec,
    vocabulary: Vocabulary,
    decoding: DecodingDefaults,
    accelerator: Accelerator,
) -> list[ValidationCaption]:
    """A caption for each image of the split, in the split's order, gathered on every rank."""
    model.eval()
    rows: list[ValidationCaption] = []
    for batch in batches:
        if not batch.num_samples:
            continue
        with accelerator.autocast():
            image_BE = model.encode(normalise(batch.to(accelerator.device).views_BPP3, view))
            captions = decode(model, image_BE, beam_size=decoding.beam_size, max_tokens=decoding.max_tokens)
        rows += [
            ValidationCaption(
                position=position,
                image_id=image_id,
                caption=vocabulary.decode(caption.tokens),
                score=caption.score,
                references=refs,
            )
            for position, image_id, refs, caption in zip(
                batch.positions, batch.image_ids, batch.references, captions, strict=True
            )
        ]
    model.train()
    return sorted(gather_object(rows), key=lambda row: row.position)


def score_captions(rows: list[ValidationCaption]) -> dict[str, float]:
    """Corpus scores of the captions against their references, by name."""
    return caption_scores({row.position: row.caption for row in rows}, {row.position: row.references for row in rows})


def write_captions(path: Path, rows: list[ValidationCaption]) -> None:
    """Write the captions as JSONL: `image_id`, `caption`, `score`, `references`."""
    fields: list[dict[str, Any]] = [
        {"image_id": row.image_id, "caption": row.caption, "score": row.score, "references": row.references}
        for row in rows
    ]
    write_atomic(str(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fields))
