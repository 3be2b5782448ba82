"""A training job from launch to end: its processes, their signals, and ownership of its run folder."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from accelerate import Accelerator

from captioner.errors import UserError
from captioner.files.ownership import owned
from train.barriers import on_main_rank
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
            stop = Preemption()
            on_main_rank(lambda: stack.enter_context(_owned_run(settings.output)))
            recipe(settings, accelerator, stop)

    return job


def _owned_run(output: str) -> AbstractContextManager[None]:
    run = Path(output)
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: give a folder with --output")
    return owned(str(run / OWNER), doing="is training in this folder")
