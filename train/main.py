"""Train a captioning model on tar shards.

    accelerate launch train/main.py                                        # COCO in data/shards, into runs/coco
    accelerate launch --config_file accelerate_config.yaml train/main.py   # on all GPUs of this machine
    accelerate launch train/main.py --shards shards --output runs/small --encoder resnet18 --batch-size 64

Started again with the same flags it resumes from its newest checkpoint, on any number of GPUs and workers. Before,
sharding/make_shards.py packs the data; after, infer/main.py captions folders with OUTPUT/model.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from captioner import cli
from captioner.bundle import DecodingDefaults, save_bundle
from captioner.cli import UserError
from captioner.model import CaptionModel, ModelConfig, load_encoder_weights
from train.cache import ShardCache
from train.plan import PACK_FIRST, num_steps
from train.run_folder import (
    RunReport,
    append_skipped,
    model_folder,
    record_settings,
    remove_checkpoints,
    resume,
    save_checkpoint,
    write_report,
)
from train.settings import TrainSettings
from train.split import Split, read_merged_vocabulary, read_split, read_validation, read_view
from train.step import StepLoss, average_buffers, check_same_weights, make_optimizer, make_schedule, train_step
from train.stream import Batch, BatchStream, Ledger, Share, StreamState, ViewRules, check_ranks, rank_facts
from train.validation import caption_split, score_captions, validation_loss, write_captions

LOG_STEPS = 10
# settings that may differ when a run is resumed
CHANGEABLE = ("workers", "checkpoint_steps", "cache", "cache_gigabytes", "tolerate_bad_samples")


def main(settings: TrainSettings) -> None:  # noqa: PLR0915 (a recipe, in the order of execution)
    """The whole run, from top to bottom."""
    accelerator = start_accelerator(settings)
    say, run = accelerator.print, Path(settings.output)

    # ---- data ---------------------------------------------------------------------------------------------
    train = read_split(settings.shards, "train", remedy=PACK_FIRST)
    val = read_validation(settings.shards, remedy=PACK_FIRST)
    vocabulary = read_merged_vocabulary(settings.shards, remedy=PACK_FIRST)
    view = read_view([train, val] if val else [train], crop=settings.crop)
    steps_per_epoch = num_steps(train.num_samples, global_batch=settings.batch_size)
    if not steps_per_epoch:
        raise UserError(f"the training split in {train.folders[0]} holds no samples: see its train.failures.jsonl")
    say(f"{train.num_samples:,} training images, {len(vocabulary):,} words, {settings.epochs} epochs of "
        f"{steps_per_epoch:,} steps on {accelerator.num_processes} x {accelerator.device}")  # fmt: skip
    share = Share(settings.batch_size, rank=accelerator.process_index, world_size=accelerator.num_processes)
    state = StreamState.start(train, seed=settings.seed, window_shards=settings.window_shards)
    check_ranks(gather_object([rank_facts(state, share)]))

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
    accelerator.register_for_checkpointing(schedule, state)

    # ---- where to start: 2. the newest complete checkpoint, 3. the beginning ---------------------------------
    if resume(run, accelerator):
        say(f"resuming at epoch {state.epoch + 1}, step {state.position // settings.batch_size + 1:,}")

    # ---- epochs ---------------------------------------------------------------------------------------------
    writer = SummaryWriter(str(run / "tensorboard")) if accelerator.is_main_process else None
    cache = ShardCache(str(Path(settings.cache).expanduser()), max_bytes=int(settings.cache_gigabytes * 1e9))
    rules = ViewRules(crop=settings.crop, max_tokens=settings.max_tokens, training=True)
    open_stream = partial(
        BatchStream, share=share, vocabulary=vocabulary, workers=settings.workers, cache=cache,
        tolerate=settings.tolerate_bad_samples,
    )  # fmt: skip
    metrics: dict[str, float] = {}
    report = RunReport()
    for epoch in range(state.epoch, settings.epochs):
        first_position, started = state.position, time.monotonic()
        batches = open_stream(
            train,
            plan=train.plan(seed=settings.seed, epoch=epoch, window_shards=settings.window_shards),
            rules=rules,
            first_step=first_position // settings.batch_size,
        )
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
            state=state,
            global_batch=settings.batch_size,
            num_steps=steps_per_epoch,
            checkpoint_steps=settings.checkpoint_steps,
            run=run,
            writer=writer,
            accelerator=accelerator,
        )
        ledger = settle(batches, "train", state, planned=train.num_samples - first_position, run=run)
        report.training_images += ledger.decoded
        report.training_seconds += time.monotonic() - started
        say(f"epoch {epoch + 1}: training {loss}, {time.monotonic() - started:.1f} s, {num_cut:,} captions cut")
        say(f"epoch {epoch + 1}: {ledger}")
        average_buffers(model, accelerator)
        check_same_weights(model, accelerator)
        if val is not None:
            batches = open_validation(open_stream, val, rules)
            loss = validation_loss(wrapped, batches, view=view, accelerator=accelerator)
            ledger = settle(batches, "val", state, planned=val.num_samples, run=run)
            log(writer, "validation", loss, step=(epoch + 1) * steps_per_epoch)
            metrics = {"validation_loss": loss.per_token, "validation_perplexity": loss.perplexity}
            say(f"epoch {epoch + 1}: validation {loss}; {ledger}")
        state.epoch, state.position = epoch + 1, 0
        save_checkpoint(run, state, accelerator)

    # ---- evaluation and the model folder --------------------------------------------------------------------
    decoding = DecodingDefaults(beam_size=settings.beam_size, max_tokens=settings.max_tokens)
    if val is not None:
        started = time.monotonic()
        captions = caption_split(
            model, open_validation(open_stream, val, rules),
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
    batches: Iterable[Batch],
    take_step: Callable[[Batch], Tensor],
    *,
    state: StreamState,
    global_batch: int,
    num_steps: int,
    checkpoint_steps: int,
    run: Path,
    writer: SummaryWriter | None,
    accelerator: Accelerator,
) -> tuple[StepLoss, int]:
    """One optimizer step for each batch, with progress, curves and checkpoints; the epoch's loss and cut captions.

    `state` is where the epoch begins, and moves on with each checkpoint.
    The losses stay on the device and are read every LOG_STEPS steps, so that the device never waits for them.
    """
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    recent, num_cut = torch.zeros_like(total), 0
    bar_name, quiet = f"epoch {state.epoch + 1}", not accelerator.is_main_process
    done = state.position // global_batch
    with cli.progress_bar(bar_name, total=num_steps, unit="steps", quiet=quiet, done=done) as bar:
        for step, batch in enumerate(batches, start=done + 1):
            recent += take_step(batch.to(accelerator.device))
            num_cut += batch.num_cut
            note = ""
            if step % LOG_STEPS == 0 or step == num_steps:
                loss = StepLoss.of(recent)
                log(writer, "train", loss, step=state.epoch * num_steps + step)
                note, total, recent = str(loss), total + recent, torch.zeros_like(recent)
            bar.advance(note=note)
            if step % checkpoint_steps == 0 and step < num_steps:
                state.position = step * global_batch
                save_checkpoint(run, state, accelerator)
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


def open_validation(open_stream: Callable[..., BatchStream], split: Split, rules: ViewRules) -> BatchStream:
    """The validation split's batches, in the shards' own order, with middle crops."""
    return open_stream(split, plan=split.plain_plan(), rules=replace(rules, training=False))


def settle(stream: BatchStream, split: str, state: StreamState, *, planned: int, run: Path) -> Ledger:
    """What became of all ranks' samples; skipped ones are listed in the run folder. RuntimeError when some are lost."""
    ledger = Ledger.of_all(gather_object([stream.ledger]), planned=planned)
    if PartialState().is_main_process:
        append_skipped(run, ledger, split=split, epoch=state.epoch + 1)
    return ledger


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
