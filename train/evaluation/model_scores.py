"""A trained model's captions of a split, and their scores."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from captioner import cli
from captioner.model.bundle import load_bundle
from captioner.streaming import Ledger
from train.barriers import raising_on_all_ranks
from train.data.batches import caption_loader, rank_options
from train.data.folders import check_batch_size, check_fits, read_filled_split, read_view
from train.evaluation.calibrate import calibrate, check_enough, keep_calibration
from train.evaluation.coco_results import read_results, write_results
from train.evaluation.scoring import report_scores
from train.evaluation.settings import EvaluateSettings
from train.evaluation.validation import Evaluator
from train.step.step import CaptionLoss


def score_model(settings: EvaluateSettings, accelerator: Accelerator) -> None:
    """Caption a split with a model, on all ranks; the main one writes the results file and scores it.

    Raises UserError.
    """
    with raising_on_all_ranks():
        bundle = load_bundle(str(settings.model), device=accelerator.device)
        split = read_filled_split(settings.shards, settings.split)
        check_batch_size(settings.batch_size, world_size=accelerator.num_processes)
        check_fits(bundle.view, read_view([split], crop=bundle.view.crop))
        if settings.calibrate:
            check_enough(split)
        if settings.against:
            read_results(str(settings.against))  # a file that cannot be read is refused before images are captioned
    given: dict[str, Any] = {"beam_size": settings.beam_size, "length_penalty": settings.length_penalty}
    decoding = replace(bundle.decoding, **{name: value for name, value in given.items() if value is not None})
    open_loader = partial(
        caption_loader,
        vocabulary=bundle.vocabulary,
        crop=bundle.view.crop,
        max_tokens=decoding.max_tokens,
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        cache=settings.cache,
        cache_gigabytes=settings.cache_gigabytes,
        **rank_options(accelerator),
    )
    evaluator = Evaluator(
        split=split,
        loss_model=CaptionLoss(bundle.model, view=bundle.view),
        open_loader=open_loader,
        decoding=decoding,
        vocabulary=bundle.vocabulary,
        accelerator=accelerator,
    )
    losses, rows, ledger = evaluator.caption_split()
    Ledger.of_all(gather_object([ledger]), planned=split.num_samples)
    with raising_on_all_ranks():
        if accelerator.is_main_process:
            write_results(str(settings.output), [(row.image_id, row.caption) for row in rows])
            facts = {
                "num_images": len(rows),
                "model": bundle.name,
                "decoding": asdict(decoding),
                "split": split.name,
                "shards": list(settings.shards),
                "results": str(settings.output),
            }
            captions = {row.image_id: row.caption for row in rows}
            references = {row.image_id: row.references for row in rows}
            report_scores(settings, captions, references, facts, losses)
    if settings.calibrate:
        calibration = calibrate(rows, evaluator)
        with raising_on_all_ranks():
            if settings.model is not None and calibration is not None:
                keep_calibration(bundle, settings.model, calibration)
                cli.console.print(
                    f"the calibration is in {settings.model}, for captions with the same beams and penalty"
                )
    accelerator.wait_for_everyone()
    accelerator.end_training()
