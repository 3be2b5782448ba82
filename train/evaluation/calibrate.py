"""Measuring a trained model's confidence, and what its training pictures are like, on a split with references.

Shapes: B pictures, F features of a picture.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from captioner.calibration import Calibration, fit_confidence, fit_space
from captioner.metrics import References
from captioner.model.bundle import DecodingDefaults
from captioner.streaming import StreamingLoader
from captioner.streaming.dataset import Split
from train.evaluation.predictions import ValidationCaption
from train.step.step import CaptionLoss

MOST_PICTURES = 4096  # of large splits so many are enough, taken at equal distances
ENCODED_TOGETHER = 64  # pictures of a rank's batch


def calibrate(
    captions: Sequence[ValidationCaption],
    split: Split,
    *,
    loss_model: CaptionLoss,
    open_loader: Callable[..., StreamingLoader],
    decoding: DecodingDefaults,
    accelerator: Accelerator,
) -> Calibration | None:
    """The calibration of a model that made these captions of the split's pictures, decoding so; in the main process.

    All ranks must call it; the others get None, and their `captions` are not read. `open_loader` opens a loader of the
    split's samples, with middle crops or cached features.
    """
    features_BF = sample_features(split, loss_model=loss_model, open_loader=open_loader, accelerator=accelerator)
    if not accelerator.is_main_process:
        return None
    usable = [row for row in thinned(captions) if len(row.references) > 1]
    found = fit_confidence([row.score for row in usable], are_good(usable)) if usable else None
    curve, reliability = found or (None, None)
    space = fit_space(features_BF)
    calibration = Calibration(decoding=asdict(decoding), curve=curve, reliability=reliability, space=space)
    accelerator.print(f"calibration: {calibration}")
    return calibration


def thinned(captions: Sequence[ValidationCaption]) -> Sequence[ValidationCaption]:
    """At most MOST_PICTURES of them, at equal distances."""
    return captions[:: _stride(len(captions))]


def _stride(num_pictures: int) -> int:
    return max(1, -(-num_pictures // MOST_PICTURES))


def are_good(captions: Sequence[ValidationCaption]) -> list[bool]:
    """Whether each caption is at least as near to its picture's references as half of what people write is.

    One reference of each picture is left out, and stands for what people write. Nearness is CIDEr-D to the others: of
    the measures here it follows people's judgement of single captions best (Anderson et al., ECCV 2016). There are two
    references or more.
    """
    people, others = {}, {}
    for number, row in enumerate(captions):
        left_out = number % len(row.references)
        people[number] = row.references[left_out]
        others[number] = row.references[:left_out] + row.references[left_out + 1 :]
    references = References(others)
    of_people = references.cider(people)
    of_model = references.cider({number: row.caption for number, row in enumerate(captions)})
    bar = median(of_people.values())
    return [of_model[number] >= bar for number in range(len(captions))]


@torch.no_grad()
def sample_features(
    split: Split, *, loss_model: CaptionLoss, open_loader: Callable[..., StreamingLoader], accelerator: Accelerator
) -> Tensor:
    """The encoder's features (B, F) of at most MOST_PICTURES pictures of a split, in its order, the same on every rank.

    They stand at equal distances in the split, the same ones for any number of ranks.
    """
    loss_model.eval()
    positions: list[int] = []
    features: list[np.ndarray] = []
    together, every = ENCODED_TOGETHER * accelerator.num_processes, _stride(split.num_samples)
    with closing(open_loader(split, batch_size=together, accumulation_steps=1, every=every)) as loader:
        for (batch,) in loader:
            with accelerator.autocast():
                features_BF = loss_model.features(batch.to(accelerator.device).inputs)
            positions += batch.positions
            features.append(features_BF[: batch.num_samples].float().cpu().numpy())  # none of a filler's row
    found = gather_object([(positions, np.concatenate(features))])
    order = np.argsort(np.concatenate([positions for positions, _ in found]))
    return torch.from_numpy(np.concatenate([features_BF for _, features_BF in found])[order])
