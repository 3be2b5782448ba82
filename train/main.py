"""Train a captioning model on tar shards.

    accelerate launch train/main.py                                        # COCO in data/shards, into runs/coco
    accelerate launch --config_file accelerate_config.yaml train/main.py   # on all GPUs of this machine
    accelerate launch train/main.py --shards shards --output runs/small --encoder resnet18 --batch-size 64

Started again with the same flags it resumes from its newest checkpoint, on any number of GPUs and workers. Before,
sharding/make_shards.py packs the data; after, infer/main.py captions folders with OUTPUT/model.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from captioner import cli, storage
from captioner.bundle import DecodingDefaults, save_bundle
from captioner.cli import UserError
from captioner.model import CaptionModel, ModelConfig, load_encoder_weights
from captioner.shards import Manifest, manifest_location, read_manifest
from captioner.views import ViewSpec
from captioner.vocabulary import read_vocabulary
from train.plan import EpochPlan, num_steps
from train.run_folder import (
    Progress,
    RunReport,
    model_folder,
    record_settings,
    remove_checkpoints,
    resume,
    save_checkpoint,
    write_report,
)
from train.settings import TrainSettings
from train.step import StepLoss, average_buffers, check_same_weights, make_optimizer, make_schedule, train_step
from train.stream import Batch, Share, ViewRules, stream
from train.validation import caption_split, score_captions, validation_loss, write_captions

LOG_STEPS = 10
CHANGEABLE = ("workers", "checkpoint_steps")  # settings that may differ when a run is resumed
PACK_FIRST = "python sharding/make_shards.py packs it (after python sharding/download_coco.py for COCO)"


def main(settings: TrainSettings) -> None:  # noqa: PLR0915 (a recipe, in the order of execution)
    """The whole run, from top to bottom."""
    accelerator = start_accelerator(settings)
    say, run = accelerator.print, Path(settings.output)

    # ---- data ---------------------------------------------------------------------------------------------
    train_manifest = read_manifest(settings.shards, "train", remedy=PACK_FIRST)
    val_manifest = read_validation_manifest(settings.shards)
    vocabulary = read_vocabulary(storage.join(settings.shards, "vocabulary.json"), remedy=PACK_FIRST)
    view = read_view(train_manifest, val_manifest, crop=settings.crop)
    steps_per_epoch = num_steps(train_manifest.num_samples, global_batch=settings.batch_size)
    if not steps_per_epoch:
        raise UserError(f"the training split in {settings.shards} holds no samples: see its train.failures.jsonl")
    say(f"{train_manifest.num_samples:,} training images, {len(vocabulary):,} words, {settings.epochs} epochs of "
        f"{steps_per_epoch:,} steps on {accelerator.num_processes} x {accelerator.device}")  # fmt: skip

    # ---- where to start: 1. a finished run stays as it is ---------------------------------------------------
    if accelerator.is_main_process:
        record_settings(run, asdict(settings), ignored=CHANGEABLE)
    if model_folder(run).exists():
        say(f"{run} is finished already: its model is in {model_folder(run)}")
        return

    # ---- model ----------------------------------------------------------------------------------------------
    model = build_model(settings, num_words=len(vocabulary), accelerator=accelerator)
    optimizer = make_optimizer(model, learning_rate=settings.learning_rate)
    schedule = make_schedule(optimizer, total_steps=settings.epochs * steps_per_epoch)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)

    # ---- where to start: 2. the newest complete checkpoint, 3. the beginning ---------------------------------
    progress = resume(run, Progress(data=data_fingerprint(train_manifest, settings)), accelerator)
    if progress.epoch or progress.step:
        say(f"resuming at epoch {progress.epoch + 1}, step {progress.step + 1:,}")

    # ---- epochs ---------------------------------------------------------------------------------------------
    writer = SummaryWriter(str(run / "tensorboard")) if accelerator.is_main_process else None
    share = Share(settings.batch_size, rank=accelerator.process_index, world_size=accelerator.num_processes)
    open_stream = partial(stream, settings.shards, share=share, vocabulary=vocabulary, workers=settings.workers)
    rules = ViewRules(crop=settings.crop, max_tokens=settings.max_tokens, training=True)
    metrics: dict[str, float] = {}
    report = RunReport()
    for epoch in range(progress.epoch, settings.epochs):
        first_step = progress.step if epoch == progress.epoch else 0
        sizes = [shard.samples for shard in train_manifest.shards]
        plan = EpochPlan(shard_sizes=sizes, seed=settings.seed, epoch=epoch, num_lanes=train_manifest.lanes)
        batches = open_stream(train_manifest, plan=plan, rules=rules, first_step=first_step)
        started = time.monotonic()
        loss, num_cut = train_epoch(
            batches,
            partial(
                train_step,
                wrapped,
                view=view,
                optimizer=optimizer,
                schedule=schedule,
                accelerator=accelerator,
            ),
            progress=replace(progress, epoch=epoch, step=first_step),
            num_steps=steps_per_epoch,
            checkpoint_steps=settings.checkpoint_steps,
            run=run,
            writer=writer,
            accelerator=accelerator,
        )
        report.training_images += train_manifest.num_samples - first_step * settings.batch_size
        report.training_seconds += time.monotonic() - started
        say(f"epoch {epoch + 1}: training {loss}, {time.monotonic() - started:.1f} s, {num_cut:,} captions cut")
        average_buffers(model, accelerator)
        check_same_weights(model, accelerator)
        if val_manifest is not None:
            loss = validation_loss(wrapped, open_validation(open_stream, val_manifest, rules), view=view,
                                   accelerator=accelerator)  # fmt: skip
            log(writer, "validation", loss, step=(epoch + 1) * steps_per_epoch)
            metrics = {"validation_loss": loss.per_token, "validation_perplexity": loss.perplexity}
            say(f"epoch {epoch + 1}: validation {loss}")
        save_checkpoint(run, replace(progress, epoch=epoch + 1, step=0), accelerator)

    # ---- evaluation and the model folder --------------------------------------------------------------------
    decoding = DecodingDefaults(beam_size=settings.beam_size, max_tokens=settings.max_tokens)
    if val_manifest is not None:
        started = time.monotonic()
        captions = caption_split(
            model, open_validation(open_stream, val_manifest, rules),
            view=view, vocabulary=vocabulary, decoding=decoding, accelerator=accelerator,
        )  # fmt: skip
        metrics |= score_captions(captions)
        if accelerator.is_main_process:
            write_captions(run / "validation.jsonl", captions)
            report.validation_images, report.validation_seconds = len(captions), time.monotonic() - started
            title = f"{len(captions):,} validation images, {report.validation_seconds:.1f} s"
            cli.print_table(title, ("metric", "value"), list(metrics.items()))
    if accelerator.is_main_process:
        write_report(run, report)
        save_bundle(
            model_folder(run),
            model=model,
            view=view,
            vocabulary=vocabulary,
            decoding=decoding,
            metrics=metrics,
        )
        remove_checkpoints(run)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    say(f"the model is in {model_folder(run)}; caption a folder with: "
        f"python infer/main.py --model {model_folder(run)} --images PHOTOS")  # fmt: skip


def train_epoch(
    batches: Iterator[Batch],
    take_step: Callable[[Batch], Tensor],
    *,
    progress: Progress,
    num_steps: int,
    checkpoint_steps: int,
    run: Path,
    writer: SummaryWriter | None,
    accelerator: Accelerator,
) -> tuple[StepLoss, int]:
    """One optimizer step for each batch, with progress, curves and checkpoints; the epoch's loss and cut captions.

    The losses stay on the device and are read every LOG_STEPS steps, so that the device never waits for them.
    """
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    recent, num_cut = torch.zeros_like(total), 0
    bar_name, quiet = f"epoch {progress.epoch + 1}", not accelerator.is_main_process
    with cli.progress_bar(bar_name, total=num_steps, unit="steps", quiet=quiet, done=progress.step) as bar:
        for step, batch in enumerate(batches, start=progress.step + 1):
            recent += take_step(batch.to(accelerator.device))
            num_cut += batch.num_cut
            note = ""
            if step % LOG_STEPS == 0 or step == num_steps:
                loss = StepLoss.of(recent)
                log(writer, "train", loss, step=progress.epoch * num_steps + step)
                note, total, recent = str(loss), total + recent, torch.zeros_like(recent)
            bar.advance(note=note)
            if step % checkpoint_steps == 0 and step < num_steps:
                save_checkpoint(run, replace(progress, step=step), accelerator)
    return StepLoss.of(total), sum(gather_object([num_cut]))


# ---- preparing ------------------------------------------------------------------------------------------------


def start_accelerator(settings: TrainSettings) -> Accelerator:
    """Accelerate as it was launched. Raises UserError when it was not launched as the environment announced."""
    accelerator = Accelerator()
    # `accelerate launch --cpu --num_processes N` sets MASTER_ADDR, announces nothing else, and starts one process
    announced = os.environ.get("WORLD_SIZE", "several" if "MASTER_ADDR" in os.environ else "1")
    if announced != str(accelerator.num_processes):
        raise UserError(
            f"the environment announces {announced} processes (WORLD_SIZE, MASTER_ADDR), but Accelerate sees "
            f"{accelerator.num_processes}: on a machine without GPUs start several with ACCELERATE_USE_CPU=true "
            "torchrun --nproc_per_node N train/main.py; unset both variables to train with one"
        )
    if settings.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch-size {settings.batch_size} is the global batch and must be a multiple of the "
            f"{accelerator.num_processes} processes"
        )
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves a lone CPU process one thread
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    set_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    return accelerator


def read_validation_manifest(folder: str) -> Manifest | None:
    """The val split's manifest, or None when that split was not packed."""
    if not storage.exists(manifest_location(folder, "val")):
        return None
    manifest = read_manifest(folder, "val", remedy=PACK_FIRST)
    return manifest if manifest.num_samples else None


def read_view(train: Manifest, val: Manifest | None, *, crop: int) -> ViewSpec:
    """How the pictures came to their size, and a crop; those stored as they are (`none`) are squashed on reading.

    Raises UserError where the two splits' pictures came to their size in different ways.
    """
    ways = {}
    for manifest in (train, val or train):
        size, resize = manifest.settings["size"], manifest.settings["resize"]
        ways[manifest.split] = ViewSpec(size=size, resize="squash" if resize == "none" else resize, crop=crop)
    view, *others = ways.values()
    for other in others:
        if other != view:
            raise UserError(
                f"the training pictures have size {view.size} ({view.resize}), the validation pictures {other.size} "
                f"({other.resize}): pack both splits with the same --size and --resize"
            )
    return view


def build_model(settings: TrainSettings, *, num_words: int, accelerator: Accelerator) -> CaptionModel:
    """The model with its encoder's starting weights, which one process of a machine downloads for all."""
    if settings.weights == "none" and not settings.train_encoder:
        raise UserError("--weights none leaves the frozen encoder random: add --train-encoder, or give weights")
    config = ModelConfig(
        encoder=settings.encoder,
        vocabulary_size=num_words,
        embedding_size=settings.embedding_size,
        hidden_size=settings.hidden_size,
        image_input=settings.image_input,
    )
    model = CaptionModel(config, encoder_trainable=settings.train_encoder)
    with accelerator.local_main_process_first():
        load_encoder_weights(model.encoder, name=settings.encoder, weights=settings.weights)
    return model


def data_fingerprint(manifest: Manifest, settings: TrainSettings) -> str:
    """Hex sha256 of what decides which samples a step of an epoch holds, and at which size."""
    content = [
        [shard.sha256 for shard in manifest.shards],
        manifest.settings["size"],
        manifest.lanes,
        settings.seed,
        settings.batch_size,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_validation(
    open_stream: Callable[..., Iterator[Batch]], manifest: Manifest, rules: ViewRules
) -> Iterator[Batch]:
    """The validation split's batches, in the manifest's order, with middle crops."""
    plan = EpochPlan(shard_sizes=[shard.samples for shard in manifest.shards], shuffled=False)
    return open_stream(manifest, plan=plan, rules=replace(rules, training=False))


def log(writer: SummaryWriter | None, name: str, loss: StepLoss, *, step: int) -> None:
    """Add loss and perplexity to the TensorBoard curves."""
    if writer is not None:
        writer.add_scalar(f"{name}/loss", loss.per_token, step)
        writer.add_scalar(f"{name}/perplexity", loss.perplexity, step)


def run() -> None:
    """The console entry."""
    cli.run(main, TrainSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
