"""A training job from launch to end: its processes, their signals, and ownership of its run folder."""

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from accelerate import Accelerator

from captioner.errors import UserError
from captioner.files.ownership import owned
from train.barriers import on_main_rank
from train.run.checkpoints import find_checkpoints
from train.run.folder import OWNER
from train.run.launch import Preemption, ending_without_peers, start_accelerator
from train.settings import TrainSettings

Recipe = Callable[[TrainSettings, Accelerator, Preemption], None]


def as_job(recipe: Recipe) -> Callable[[TrainSettings], None]:
    """Run a training recipe as a job that owns its run folder. Raises UserError while another job owns it."""

    @functools.wraps(recipe)
    def job(settings: TrainSettings) -> None:
        remedy = "the same command with --resume continues from the newest checkpoint, on fewer machines too"
        with ending_without_peers(remedy=remedy), ExitStack() as stack:
            accelerator = start_accelerator(seed=settings.seed, thaws_later=bool(settings.finetune_encoder_from_step))
            stop = Preemption(remedy=lambda: how_to_continue(settings))
            on_main_rank(lambda: stack.enter_context(_owned_run(settings.output)))
            try:
                recipe(settings, accelerator, stop)
            except KeyboardInterrupt:
                if accelerator.is_main_process:
                    print(how_to_continue(settings), file=sys.stderr)
                raise

    return job


def how_to_continue(settings: TrainSettings) -> str:
    """What the command of a stopped run does next, by what the run has left."""
    if find_checkpoints(Path(settings.output)):
        return "the same command with --resume continues from the newest checkpoint"
    again = "there is no checkpoint yet: the same command with --resume begins at the first step"
    return f"{again}, and reuses the feature files that are complete" if settings.cache_features else again


def _owned_run(output: str) -> AbstractContextManager[None]:
    run = Path(output)
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: give a folder with --output")
    return owned(str(run / OWNER), doing="is training in this folder")
