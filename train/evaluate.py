"""Score captions: a trained model's on a split of shards, or any model's from a COCO results file.

    python train/evaluate.py --model runs/coco/model --shards data/shards            # also writes results.json
    accelerate launch --config_file accelerate_config.yaml train/evaluate.py --model model --shards shards  # all GPUs
    python train/evaluate.py --results results.json --references captions_val2014.json --json scores.json

    python train/evaluate.py --model runs/coco/model --shards data/shards --calibrate  # and its confidence again

Figures are those of the evaluation inside training, and of the official program (coco-caption). METEOR and SPICE need
Java and one more package: pip install -e '.[java]', then --java-metrics meteor spice.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.flags import AnyNumber, Count, File, LocalPath, Location, Positive, WorkersOrZero
from captioner.metrics import References
from captioner.samples import ImageId
from captioner.streaming.cache import CacheFolderError, CacheTooSmallError
from train.evaluation.coco_results import by_reference_id, read_references, read_results, write_results
from train.evaluation.java_metrics import JavaMetric, check_java, java_scores

if TYPE_CHECKING:
    from captioner.calibration import Calibration
    from captioner.streaming.dataset import Split

SCORING_FLAGS = ("results", "references", "java_metrics", "json")  # the others are for captioning a split
CAPTIONING_DEFAULTS: dict[str, Any] = {
    "split": "val",
    "batch_size": 128,
    "workers": 2,
    "cache": "~/.cache/captioner/shards",
    "cache_gigabytes": 50.0,
    "output": Path("results.json"),
}
REMEDIES: cli.Remedies = {
    CacheTooSmallError: "give more --cache-gigabytes",
    CacheFolderError: "give another --cache folder on a disk of this machine, or fewer --cache-gigabytes if it is full",
}


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Either --model and --shards, or --results and --references. GPUs are `accelerate launch`'s flags."""

    model: File | None = None
    """Model folder that train/main.py wrote."""
    shards: tuple[Location, ...] = ()
    """Dataset folders (or URLs) that sharding/make_shards.py wrote."""
    split: str | None = None
    """Split of the shards that is captioned and scored. Without it val."""
    beam_size: Count | None = None
    """Beams of the search; 1 is greedy. Without it the model folder's default."""
    length_penalty: AnyNumber | None = None
    """A beam's score is its log-probability over its length to this power. Without it the model folder's default."""
    batch_size: Count | None = None
    """Images that all processes together caption at once. Without it 128."""
    workers: WorkersOrZero | None = None
    """Loader processes for each captioning process; 0 loads in the captioning process. Without it 2."""
    cache: LocalPath | None = None
    """Folder where shards behind URLs are kept, for all processes of a machine. Without it
    ~/.cache/captioner/shards."""
    cache_gigabytes: Positive | None = None
    """What that folder may hold, downloads under way included; the least recently used shards go first. Without it
    50."""
    calibrate: bool = False
    """Also measure the model's confidence and what its pictures are like, and keep both in its folder."""
    output: File | None = None
    """COCO results file that receives the model's captions. Without it results.json."""

    results: File | None = None
    """COCO results file of any model, to be scored."""
    references: File | None = None
    """COCO caption file with the references of its images."""

    java_metrics: tuple[JavaMetric, ...] = ()
    """Also METEOR or SPICE, which need Java and `pip install -e '.[java]'`."""
    json: File | None = None
    """JSON file that receives the scores and what was scored."""


def main(settings: EvaluateSettings) -> None:
    """Score a results file, or caption a split and score that."""
    scoring = settings.results is not None or settings.references is not None
    check_settings(settings, scoring=scoring)
    check_java(settings.java_metrics)
    if scoring:
        score_results(settings)
    else:
        score_model(settings)


def check_settings(settings: EvaluateSettings, *, scoring: bool) -> None:
    """Raise UserError for flags that are missing, that the other use takes, or that make no sense."""
    if scoring:
        others = [each.name for each in fields(settings) if each.name not in SCORING_FLAGS
                  and getattr(settings, each.name) != each.default]  # fmt: skip
        if others:
            raise UserError(f"{_flag(others[0])} is for captioning a split, not for scoring --results: leave it out")
        if settings.results is None or settings.references is None:
            raise UserError("a results file is scored against references: give both --results and --references")
    elif settings.model is None or not settings.shards:
        raise UserError("give --model and --shards to caption a split, or --results and --references to score a file")
    check_files(settings, scoring=scoring)


def check_files(settings: EvaluateSettings, *, scoring: bool) -> None:
    """Raise UserError where a file that is to be written is a folder, or another file of this command."""
    own = {"results": settings.results, "references": settings.references, "json": settings.json}
    if not scoring:
        own["output"] = filled(settings)["output"]
    for name in ("json", "output"):
        path = own.pop(name, None)
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{_flag(name)} {path} is a folder: give the name of a file")
        same = [_flag(other) for other, file in own.items() if file and file.resolve() == path.resolve()]
        if same:
            raise UserError(f"{_flag(name)} {path} is also {same[0]}: give another file")


def filled(settings: EvaluateSettings) -> dict[str, Any]:
    """The flags of CAPTIONING_DEFAULTS: a default, where one is not given."""
    given = {name: getattr(settings, name) for name in CAPTIONING_DEFAULTS}
    return CAPTIONING_DEFAULTS | {name: value for name, value in given.items() if value is not None}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---- a results file -------------------------------------------------------------------------------------------


def score_results(settings: EvaluateSettings) -> None:
    """Score the images of a results file; like the official program, leave out images that have no result."""
    results, references = str(settings.results), str(settings.references)
    found, all_captions = read_results(results), read_references(references)
    captions = by_reference_id(found, all_captions, results=results, location=references)
    num_left = len(all_captions) - len(captions)
    if num_left:
        cli.console.print(f"{num_left:,} of {len(all_captions):,} images in {references} have no result: not scored")
    own_references = {image_id: all_captions[image_id] for image_id in captions}
    facts = {"num_images": len(captions), "num_without_result": num_left, "results": results, "references": references}
    report({}, captions, own_references, facts, settings=settings)


def report(
    metrics: Mapping[str, float],
    captions: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    facts: Mapping[str, Any],
    *,
    settings: EvaluateSettings,
) -> None:
    """Add the scores to the metrics, print all, and write them with the facts of what was scored."""
    corpus = References(references)
    metrics = {
        **metrics,
        **corpus.scores(captions),
        **java_scores(captions, references, metrics=settings.java_metrics),
    }
    cli.print_table(f"{len(captions):,} images", ("metric", "value"), list(metrics.items()))
    if settings.json is not None:
        content = {"metrics": metrics, "bleu_counts": corpus.bleu_counts(captions)._asdict(), **facts}
        storage.write_atomic(str(settings.json), json.dumps(content, indent=1, allow_nan=False))


# ---- a model ----------------------------------------------------------------------------------------------------


def score_model(settings: EvaluateSettings) -> None:
    """Caption a split with a model, on all processes; the main one writes the results file and scores it."""
    from train.run.launch import ending_without_peers

    with ending_without_peers(remedy="run the same command again"):
        _score_model(settings)


def _score_model(settings: EvaluateSettings) -> None:
    from accelerate.utils import gather_object

    from captioner.model.bundle import load_bundle
    from captioner.streaming import Ledger
    from captioner.streaming.dataset import check_filled, read_split
    from train.data.batches import PINNED_FOR, caption_loader, check_batch_size
    from train.data.split import check_fits, read_view
    from train.evaluation.calibrate import calibrate
    from train.evaluation.validation import evaluate_split
    from train.plan import PACK_FIRST
    from train.run.launch import start_accelerator
    from train.step.step import CaptionLoss
    from train.uneven import refused_together

    flags = filled(settings)
    accelerator = start_accelerator(seed=0)
    with refused_together():
        bundle = load_bundle(str(settings.model), device=accelerator.device)
        split = read_split(settings.shards, flags["split"], remedy=PACK_FIRST)
        check_filled(split)
        check_batch_size(flags["batch_size"], world_size=accelerator.num_processes)
        check_fits(bundle.view, read_view([split], crop=bundle.view.crop))
        if settings.calibrate:
            check_enough(split)
    given: dict[str, Any] = {"beam_size": settings.beam_size, "length_penalty": settings.length_penalty}
    decoding = replace(bundle.decoding, **{name: value for name, value in given.items() if value is not None})
    open_loader = partial(
        caption_loader,
        vocabulary=bundle.vocabulary,
        crop=bundle.view.crop,
        max_tokens=decoding.max_tokens,
        batch_size=flags["batch_size"],
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=flags["workers"],
        pin_memory=accelerator.device.type in PINNED_FOR,
        cache=flags["cache"],
        cache_gigabytes=flags["cache_gigabytes"],
    )
    loss_model = CaptionLoss(bundle.model, view=bundle.view)
    with closing(open_loader(split)) as loader:
        loss, rows = evaluate_split(
            loss_model,
            chain.from_iterable(loader),
            vocabulary=bundle.vocabulary,
            decoding=decoding,
            accelerator=accelerator,
        )
    Ledger.of_all(gather_object([loader.ledger]), planned=split.num_samples)
    with refused_together():
        if accelerator.is_main_process:
            write_results(str(flags["output"]), [(row.image_id, row.caption) for row in rows])
            captions = {row.image_id: row.caption for row in rows}
            references = {row.image_id: row.references for row in rows}
            metrics = {"validation_loss": loss.per_token, "validation_perplexity": loss.perplexity}
            facts = {
                "num_images": len(rows),
                "model": bundle.name,
                "decoding": asdict(decoding),
                "split": split.name,
                "shards": list(settings.shards),
                "results": str(flags["output"]),
            }
            report(metrics, captions, references, facts, settings=settings)
    if settings.calibrate:
        calibration = calibrate(
            rows, split, loss_model=loss_model, open_loader=open_loader, decoding=decoding, accelerator=accelerator
        )
        with refused_together():
            if settings.model is not None and calibration is not None:
                keep_calibration(settings.model, calibration, old=bundle.calibration, name=bundle.name)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def check_enough(split: "Split") -> None:
    """Raise UserError for a split that is too small to calibrate on, before anything is done with it."""
    from captioner.calibration import MIN_IMAGES

    if split.num_samples < MIN_IMAGES:
        raise UserError(
            f"--calibrate needs {MIN_IMAGES} pictures, and the {split.name} split in {split.folders[0]} holds "
            f"{split.num_samples}: give more of them with --shards or --split, or leave out --calibrate"
        )


def keep_calibration(folder: Path, calibration: "Calibration", *, old: "Calibration | None", name: str) -> None:
    """Write a calibration into the folder of the model with this name, unless the old one has more.

    Raises UserError if the old one has more, or if writing fails.
    """
    from captioner.model.bundle import save_calibration

    if calibration.curve is None and calibration.space is None:
        raise UserError(f"there is nothing to keep in {folder}, {calibration}: calibrate on other shards")
    if old and ((old.curve and not calibration.curve) or (old.space and not calibration.space)):
        raise UserError(
            f"the calibration in {folder} is kept, the new one has {calibration}: calibrate on other shards"
        )
    try:
        save_calibration(folder, calibration, model=name)
    except OSError as error:
        raise UserError(f"cannot keep the calibration in {folder} ({error}): fix that and run again") from error
    cli.console.print(f"the calibration is in {folder}, for captions with the same beams and penalty")


def run() -> None:
    """The console entry."""
    cli.run(main, EvaluateSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
