"""Train a captioning model on tar shards.

    accelerate launch train/main.py                                        # COCO in data/shards, into runs/coco
    accelerate launch --config_file accelerate_config.yaml train/main.py   # on all GPUs of this machine
    accelerate launch train/main.py --shards mine --output runs/mine --init runs/coco/model

Before, sharding/make_shards.py packs the data; after, infer/main.py captions folders with OUTPUT/model. With --resume
it goes on from the newest checkpoint, on any number of GPUs and workers; stopped by SIGTERM it saves and exits with 75.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from captioner import cli
from captioner.errors import TooManyBadSamplesError
from captioner.files.ownership import AlreadyOwnedError, NotWritableError
from captioner.model.encoders import FixedCropError, SmallImagesError, WeightsError
from captioner.shards.format import PACK_FIRST
from captioner.streaming.cache import CacheFolderError, CacheTooSmallError
from captioner.streaming.order import ShardOrder, num_steps
from train.data.batches import PINNED_FOR, caption_loader, check_batch_size
from train.data.split import read_data
from train.evaluation.validation import Evaluator
from train.plan import window_advice
from train.run import run_folder
from train.run.encode import prepare_features
from train.run.epoch import train_epoch
from train.run.job import as_job
from train.run.launch import Preemption, ending_without_peers
from train.run.report import write_report
from train.run.tracking import Tracker, check_wandb
from train.settings import CHANGEABLE, TrainSettings, check_settings, count_steps
from train.step.schedule import make_optimizer, make_schedule
from train.step.starting_model import choose_model, make_model
from train.step.step import CaptionLoss, check_same_weights, distribute, train_step
from train.uneven import refused_together

REMEDIES: cli.Remedies = {
    AlreadyOwnedError: "wait for it, stop it, or give another --output",
    NotWritableError: "give another --output",
    FixedCropError: "give --crop {error.needed}",
    SmallImagesError: "pack them with sharding/make_shards.py --size {error.packed_size}, or give --crop {error.size} "
    "or less where the encoder takes it",
    WeightsError: "give other --weights, or train from scratch with --weights none --finetune-encoder-from-step 0",
    TooManyBadSamplesError: "pack or fetch these shards again, or give a greater --tolerate-bad-samples",
    CacheTooSmallError: "give more --cache-gigabytes or fewer --shuffle-shards",
    CacheFolderError: "give another --cache folder on a disk of this machine, or fewer --cache-gigabytes if it is full",
}


@as_job
def main(settings: TrainSettings, accelerator: Accelerator, stop: Preemption) -> None:  # noqa: PLR0915 (a recipe)
    """The whole run, from top to bottom, in the order of execution."""
    thaw_step = settings.finetune_encoder_from_step
    say, run, is_main = accelerator.print, Path(settings.output), accelerator.is_main_process

    # ---- data -------------------------------------------------------------------------------------------------
    with refused_together():
        check_settings(settings)
        check_wandb(settings.wandb)
        train, val, vocabulary = read_data(settings.shards, remedy=PACK_FIRST)
        epoch_steps = num_steps(train.num_samples, global_batch=settings.batch_size)
        total_steps = count_steps(settings, epoch_steps, has_val=val is not None)
        check_batch_size(settings.batch_size, world_size=accelerator.num_processes,
                         accumulation_steps=settings.accumulation_steps)  # fmt: skip

    # ---- where to start: 1. a finished run stays as it is; 2. --init's model with new words, 3. else a new one ------
    with refused_together():
        settings, initial, vocabulary, view = choose_model(settings, vocabulary, splits=[train, val])
        parts = run_folder.made_of(train, val, vocabulary, initial=initial, weights=settings.weights)
    if run_folder.is_finished(run, asdict(settings), parts, ignored=CHANGEABLE, resume=settings.resume):
        say(f"{run} is finished already: its model is in {run_folder.model_folder(run)}")
        return
    model = make_model(
        settings.model_config(len(vocabulary)), vocabulary, initial, crop=view.crop, trainable=thaw_step is not None,
        weights=run_folder.kept_encoder(run) or settings.weights, compiled=settings.compile_encoder,
        accelerator=accelerator)  # fmt: skip
    loss_model = CaptionLoss(
        model, view=view, label_smoothing=settings.label_smoothing, scheduled_sampling=settings.scheduled_sampling,
        total_steps=total_steps, thaw_step=thaw_step or 0)  # fmt: skip
    optimizer = make_optimizer(model, settings.learning_rate, encoder_learning_rate=settings.encoder_learning_rate)
    schedule = make_schedule(optimizer, settings.schedule, total_steps=total_steps, encoder_from_step=thaw_step or 0)
    progress, report = run_folder.Progress(), run_folder.RunReport()
    wrapped, optimizer = distribute(loss_model, optimizer, accelerator)
    run_folder.checkpoint_trained_weights(loss_model, accelerator)

    # ---- loaders and evaluation ---------------------------------------------------------------------------------
    open_loader = partial(
        caption_loader, vocabulary=vocabulary, crop=view.crop, max_tokens=settings.max_tokens,
        batch_size=settings.batch_size, rank=accelerator.process_index, world_size=accelerator.num_processes,
        num_workers=settings.workers, pin_memory=accelerator.device.type in PINNED_FOR, cache=settings.cache,
        cache_gigabytes=settings.cache_gigabytes, tolerate_bad_samples=settings.tolerate_bad_samples)  # fmt: skip
    cached = [split for split in (train, val) if split and settings.cache_features]
    features = prepare_features(cached, loss_model=loss_model, open_loader=open_loader, cache=settings.cache,
                                accelerator=accelerator)  # fmt: skip
    loader = open_loader(train, training=True, seed=settings.seed, shuffle_shards=settings.shuffle_shards,
                         accumulation_steps=settings.accumulation_steps, features=features.get("train"))  # fmt: skip
    open_val = partial(open_loader, accumulation_steps=settings.accumulation_steps, features=features.get("val"))
    evaluator = None
    if val is not None:
        evaluator = Evaluator(val, loss_model, open_val, decoding=settings.decoding(), vocabulary=vocabulary,
                              accelerator=accelerator)  # fmt: skip

    # ---- where to start: 4. with --resume, instead of these, the newest complete checkpoint ----------------------
    accelerator.register_for_checkpointing(schedule, loader, progress)
    run_folder.resume(run, accelerator)
    done_steps = loader.epoch * epoch_steps + loader.steps_done
    order = ShardOrder(train.sizes, seed=settings.seed, batch_size=settings.batch_size,
                       shuffle_shards=settings.shuffle_shards).of_epoch(0)  # fmt: skip
    say(f"{train.num_samples:,} training images, {len(vocabulary):,} words, {settings.epochs} epochs of {epoch_steps:,}"
        f" steps on {accelerator.num_processes} x {accelerator.device}, {done_steps:,} of them done"
        f"{window_advice(order, world_size=accelerator.num_processes)}")  # fmt: skip
    with run_folder.starting(run, asdict(settings), parts):
        tracker = Tracker(run, first_step=done_steps, wandb_project=settings.wandb, settings=asdict(settings),
                          quiet=not is_main)  # fmt: skip
        run_folder.keep_encoder(run, model.encoder, accelerator)
    save = partial(run_folder.save_checkpoint, run, loader, progress, accelerator, keep=settings.keep_checkpoints)
    take_step = partial(train_step, wrapped, optimizer=optimizer, schedule=schedule, accelerator=accelerator)

    # ---- epochs -------------------------------------------------------------------------------------------------
    while progress.epochs < settings.epochs and not progress.is_stuck(patience_epochs=settings.patience_epochs):
        if loader.epoch == progress.epochs:  # else it was trained before a resume, up to its evaluation
            planned = train.num_samples - loader.steps_done * settings.batch_size
            with stop.deferred():
                reading = train_epoch(
                    loader, take_step, num_epochs=settings.epochs, schedule=schedule,
                    checkpoint_steps=settings.checkpoint_steps, save=save, tracker=tracker, stop=stop,
                    accelerator=accelerator,
                )  # fmt: skip
            report.add_training(reading)
            ledger = run_folder.reconcile(run, loader.ledger, "train", epoch=loader.epoch, planned=planned)
            say(f"epoch {loader.epoch}: training {reading}; {ledger}")
        check_same_weights(loss_model, accelerator)
        progress.epochs += 1
        if evaluator:
            found = evaluator.evaluate()
            report.add_validation(found)
            ledger = run_folder.reconcile(run, found.ledger, "val", epoch=progress.epochs, planned=evaluator.num_images)
            say(f"epoch {progress.epochs}: validation {found}; {ledger}")
            tracker.log(progress.epochs * epoch_steps, {"epoch": progress.epochs, **found.curves()})
            if is_main:
                tracker.show(progress.epochs * epoch_steps, *evaluator.samples(found))
            progress.note(run, found, checkpoint=run_folder.checkpoint_name(loader))
        save()

    # ---- the best epoch's model, and a page to look at -----------------------------------------------------------
    run_folder.load_best(run, progress, loss_model)
    calibration = evaluator.calibrate(run / run_folder.BEST_CAPTIONS) if evaluator else None
    tracker.close()
    with refused_together():
        if is_main:
            run_folder.write_figures(run, report, progress.metrics)
            write_report(run)
            run_folder.write_model(run, loss_model, vocabulary, settings.decoding(), progress.metrics,
                                   calibration=calibration)  # fmt: skip
    accelerator.end_training()
    say(f"the model is in {run_folder.model_folder(run)}, its curves in {run / 'report.html'}; caption a folder with: "
        f"python infer/main.py --model {run_folder.model_folder(run)} --images PHOTOS")  # fmt: skip


def run() -> None:
    """The console entry."""
    remedy = "the same command with --resume continues from the newest checkpoint, on fewer machines too"
    job = ending_without_peers(remedy=remedy)(main)
    cli.run(job, TrainSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
