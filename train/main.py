"""Train a captioning model on tar shards.

    accelerate launch train/main.py                                        # COCO in data/shards, into runs/coco
    accelerate launch --config_file accelerate_config.yaml train/main.py   # on all GPUs of this machine
    accelerate launch train/main.py --shards mine --output runs/mine --init runs/coco/model

Before, sharding/make_shards.py packs the data; after, infer/main.py captions folders with OUTPUT/model. With --resume
it continues from the newest checkpoint, on any number of GPUs and workers; stopped by SIGTERM it saves and exits with
code 75.
"""

from pathlib import Path

from accelerate import Accelerator

from captioner import cli
from captioner.errors import TooManyBadSamplesError
from captioner.files.ownership import AlreadyOwnedError, NotWritableError
from captioner.model.encoders import FixedCropError, SmallImagesError, WeightsError
from captioner.streaming.cache import CacheFolderError, CacheTooSmallError
from train.barriers import raising_on_all_ranks
from train.data.folders import read_data
from train.run import folder
from train.run.job import as_job
from train.run.launch import Preemption
from train.run.tracking import check_wandb
from train.run.trainer import Trainer
from train.settings import TrainSettings, check_settings, count_steps
from train.step.starting_model import choose_start

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
def main(settings: TrainSettings, accelerator: Accelerator, stop: Preemption) -> None:
    """Run it all, from top to bottom."""
    say, run = accelerator.print, Path(settings.output)

    # ---- data, and the model to start from: that of --init with the shards' new words, or a new one -------------
    with raising_on_all_ranks():
        check_settings(settings, world_size=accelerator.num_processes)
        check_wandb(settings.wandb)
        data = read_data(settings.shards)
        total_steps = count_steps(settings, data.train.num_samples, has_val=data.val is not None)
        settings, start = choose_start(settings, data)
        inputs = folder.input_fingerprints(data, start.vocabulary, initial=start.initial, weights=settings.weights)
    if folder.is_finished(run, settings, inputs):
        say(f"{run} is finished already: its model is in {folder.model_folder(run)}")
        return

    # ---- model, optimizer, loaders; with --resume they continue from the newest complete checkpoint --------------
    trainer = Trainer(settings, data, start, total_steps=total_steps, accelerator=accelerator)
    trainer.resume()
    say(trainer)
    with folder.starting(run, settings, inputs):
        tracker = trainer.open_tracker()

    # ---- epochs -------------------------------------------------------------------------------------------------
    while not trainer.is_done:
        trainer.train_epoch(tracker, stop)
        trainer.evaluate(tracker)
        trainer.save()
    tracker.close()

    # ---- the best epoch's model, and a page to look at -----------------------------------------------------------
    trainer.finish()
    model = folder.model_folder(run)
    say(
        f"the model is in {model}, its curves in {run / 'report.html'}; caption a folder with: "
        f"python infer/main.py --model {model} --images PHOTOS"
    )


def run() -> None:
    """The console entry."""
    cli.run(main, TrainSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
