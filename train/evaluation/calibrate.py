"""Calibration of a trained model's confidence, and of what its images are like, on a split with references.

Shapes: B images, F features of an image.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from accelerate.utils import gather_object
from torch import Tensor

from captioner.calibration import MIN_IMAGES, Calibration, fit_confidence, fit_space
from captioner.errors import UserError
from captioner.metrics import References
from captioner.model.bundle import Bundle, save_calibration
from captioner.model.network import pooled
from captioner.streaming.dataset import Split
from train.evaluation.predictions import ValidationCaption
from train.evaluation.validation import Evaluator
from train.step.step import encode_split

MAX_IMAGES = 4096  # of larger splits every k-th image is taken


def calibrate(captions: Sequence[ValidationCaption], evaluator: Evaluator) -> Calibration | None:
    """The calibration of the evaluator's model, which made these captions of its split.

    All ranks must call it; all but the main one get None, and their `captions` are not read.
    """
    features_BF = sample_features(evaluator)
    if not evaluator.accelerator.is_main_process:
        return None
    usable = [row for row in captions[:: _stride(len(captions))] if len(row.references) > 1]
    found = fit_confidence([row.score for row in usable], are_good(usable)) if usable else None
    curve, reliability = found or (None, None)
    space = fit_space(features_BF)
    calibration = Calibration(decoding=asdict(evaluator.decoding), curve=curve, reliability=reliability, space=space)
    evaluator.accelerator.print(f"calibration: {calibration}")
    return calibration


def _stride(num_images: int) -> int:
    return max(1, -(-num_images // MAX_IMAGES))


def are_good(captions: Sequence[ValidationCaption]) -> list[bool]:
    """Whether each caption scores at least as high as the median human caption.

    One reference of each image is left out as the human caption. The score is CIDEr-D against the others: of the
    measures here it follows human judgement of single captions best (Anderson et al., ECCV 2016). Each image needs two
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


def sample_features(evaluator: Evaluator) -> Tensor:
    """The encoder's pooled features (B, F) of every k-th image of the split, in its order, the same on every rank.

    These are at most MAX_IMAGES, the same ones for any number of ranks.
    """
    evaluator.loss_model.eval()
    rows = encode_split(
        evaluator.split,
        loss_model=evaluator.loss_model,
        open_loader=evaluator.open_loader,
        accelerator=evaluator.accelerator,
        world_size=evaluator.accelerator.num_processes,
        every=_stride(evaluator.split.num_samples),
    )
    own = [(position, pooled(torch.from_numpy(features)[None])[0]) for position, features in rows]
    found = dict(chain.from_iterable(gather_object([own])))
    return torch.stack([found[position] for position in sorted(found)])


def check_enough(split: Split) -> None:
    """Raise UserError for a split that is too small to calibrate on."""
    if split.num_samples < MIN_IMAGES:
        raise UserError(
            f"--calibrate needs {MIN_IMAGES} images, and the {split.name} split in {split.folders[0]} holds "
            f"{split.num_samples}: give more of them with --shards or --split, or leave out --calibrate"
        )


def keep_calibration(bundle: Bundle, folder: Path, calibration: Calibration) -> None:
    """Write a calibration into the folder of its model, unless the folder's own has more.

    Raises UserError if the folder's own has more, or if writing fails.
    """
    old = bundle.calibration
    if calibration.curve is None and calibration.space is None:
        raise UserError(f"there is nothing to keep in {folder}, {calibration}: calibrate on other shards")
    if old and ((old.curve and not calibration.curve) or (old.space and not calibration.space)):
        raise UserError(
            f"the calibration in {folder} is kept, the new one has {calibration}: calibrate on other shards"
        )
    try:
        save_calibration(folder, calibration, model=bundle.name)
    except OSError as error:
        raise UserError(f"cannot write the calibration into {folder} ({error}): fix this and rerun") from error
