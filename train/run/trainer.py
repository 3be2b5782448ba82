"""A training run on all ranks: what it is built of, its epochs, and what it leaves."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from captioner.streaming.order import ShardOrder
from train.barriers import raising_on_all_ranks
from train.data.batches import caption_loader, rank_options
from train.data.folders import CaptionData
from train.data.order_table import window_advice
from train.evaluation.calibrate import calibrate
from train.evaluation.predictions import read_captions, write_captions
from train.evaluation.validation import Evaluator
from train.run import folder
from train.run.checkpoints import Checkpoints, Progress, checkpoint_trained_weights, store_encoder
from train.run.encode import prepare_features
from train.run.launch import Preemption
from train.run.report import write_report
from train.run.steps import run_epoch
from train.run.tracking import Tracker
from train.settings import TrainSettings
from train.step.schedule import make_optimizer, make_schedule
from train.step.self_critical import SelfCriticalStep, make_reward
from train.step.starting_model import StartingPoint, make_loss_model
from train.step.step import TrainStep, check_same_weights, distribute


class Trainer:
    """Model, optimizer, loaders and checkpoints of a run. All ranks must call each of its methods.

    Making one loads the encoder's weights, and with `cache_features` encodes all images; it writes nothing into the
    run folder. Raises UserError.
    """

    def __init__(
        self,
        settings: TrainSettings,
        data: CaptionData,
        start: StartingPoint,
        *,
        total_steps: int,
        accelerator: Accelerator,
    ) -> None:
        self._settings, self._data, self._start, self._accelerator = settings, data, start, accelerator
        self._run = Path(settings.output)
        self._epoch_steps = total_steps // settings.all_epochs
        self._make_model()
        self._open_loaders()
        self._progress = Progress()
        accelerator.register_for_checkpointing(self._take_step.schedule, self._loader, self._progress)
        self._checkpoints = Checkpoints(
            self._run, self._loader, self._progress, accelerator, keep=settings.keep_checkpoints
        )
        counts = ("training_images", "training_seconds", "validation_images", "validation_seconds")
        self._report: dict[str, float] = dict.fromkeys(counts, 0)

    def _make_model(self) -> None:
        settings, accelerator = self._settings, self._accelerator
        total_steps = settings.epochs * self._epoch_steps
        self._loss_model = make_loss_model(
            settings,
            self._start,
            weights=folder.kept_encoder(self._run) or settings.weights,
            total_steps=total_steps,
            accelerator=accelerator,
        )
        optimizer = make_optimizer(
            self._loss_model.model, settings.learning_rate, encoder_learning_rate=settings.encoder_learning_rate
        )
        schedule = make_schedule(
            optimizer,
            settings.schedule,
            total_steps=total_steps,
            encoder_from_step=settings.finetune_encoder_from_step or 0,
            factor_after=settings.self_critical_learning_rate / settings.learning_rate,
            steps_after=settings.self_critical_epochs * self._epoch_steps,
        )
        wrapped, optimizer = distribute(self._loss_model, optimizer, accelerator)
        self._take_step = TrainStep(wrapped, optimizer, schedule, accelerator)
        checkpoint_trained_weights(self._loss_model, accelerator)

    def _open_loaders(self) -> None:
        """Open the training loader and make the evaluator, after encoding all images where features are cached."""
        settings, train, val = self._settings, self._data.train, self._data.val
        reading: dict[str, Any] = {
            "num_workers": settings.workers,
            "cache": settings.cache,
            "cache_gigabytes": settings.cache_gigabytes,
            "tolerate_bad_samples": settings.tolerate_bad_samples,
            **rank_options(self._accelerator),
        }
        open_loader = partial(
            caption_loader,
            vocabulary=self._start.vocabulary,
            crop=self._start.view.crop,
            max_tokens=settings.max_tokens,
            batch_size=settings.batch_size,
            accumulation_steps=settings.accumulation_steps,
            **reading,
        )
        prepare = partial(
            prepare_features,
            loss_model=self._loss_model,
            open_loader=open_loader,
            cache=settings.cache,
            accelerator=self._accelerator,
        )
        features = prepare(self._data.splits if settings.cache_features else [])
        mirrored_features = prepare([train] if settings.mirrored_features else [], mirrored=True)
        self._loader = open_loader(
            train,
            training=True,
            references=settings.self_critical_epochs > 0,
            seed=settings.seed,
            shuffle_shards=settings.shuffle_shards,
            features=features.get("train"),
            mirrored_features=mirrored_features.get("train"),
        )
        self._self_critical_step: SelfCriticalStep | None = None
        if settings.self_critical_epochs:
            step = self._take_step
            self._self_critical_step = SelfCriticalStep(
                step.model,
                step.optimizer,
                step.schedule,
                step.accelerator,
                reward=make_reward(train, self._accelerator, **reading),
                vocabulary=self._start.vocabulary,
                max_tokens=settings.max_tokens,
                seed=settings.seed,
                epoch_steps=self._epoch_steps,
                first_step=1 + settings.epochs * self._epoch_steps,
            )
        self._evaluator: Evaluator | None = None
        if val:
            self._evaluator = Evaluator(
                split=val,
                loss_model=self._loss_model,
                open_loader=partial(open_loader, features=features.get("val")),
                decoding=settings.decoding(),
                vocabulary=self._start.vocabulary,
                accelerator=self._accelerator,
            )

    # ---- the start ------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Load the newest complete checkpoint, if any. Raises UserError where it does not fit."""
        self._checkpoints.resume()

    @property
    def done_steps(self) -> int:
        """Optimizer steps taken since the beginning of the run."""
        return self._loader.epoch * self._epoch_steps + self._loader.steps_done

    def __str__(self) -> str:
        settings, train, world_size = self._settings, self._data.train, self._accelerator.num_processes
        order = ShardOrder(
            train.sizes, seed=settings.seed, batch_size=settings.batch_size, shuffle_shards=settings.shuffle_shards
        )
        return (
            f"{train.num_samples:,} training images, {len(self._start.vocabulary):,} words, {settings.all_epochs} "
            f"epochs of {self._epoch_steps:,} steps on {world_size} x {self._accelerator.device}, {self.done_steps:,} "
            f"of them done{window_advice(order.of_epoch(0), world_size=world_size)}"
        )

    def open_tracker(self) -> Tracker:
        """The run's curves from here on; a frozen encoder is stored beside them. Raises UserError."""
        is_main = self._accelerator.is_main_process
        tracker = Tracker(
            self._run,
            first_step=self.done_steps,
            wandb_project=self._settings.wandb,
            settings=asdict(self._settings),
            quiet=not is_main,
        )
        if is_main and self._settings.finetune_encoder_from_step is None:
            store_encoder(self._run, self._loss_model.model.encoder.backbone)
        return tracker

    # ---- epochs ---------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained, or the CIDEr has not improved for `patience_epochs`."""
        patience = self._settings.patience_epochs
        is_stuck = patience is not None and self._progress.epochs_since_best >= patience
        return is_stuck or self._progress.epochs >= self._settings.all_epochs

    def train_epoch(self, tracker: Tracker, stop: Preemption) -> None:
        """Take an epoch's optimizer steps; none where a resumed run had already taken them. Raises UserError."""
        loader, settings = self._loader, self._settings
        if loader.epoch == self._progress.epochs:
            planned = self._data.train.num_samples - loader.steps_done * settings.batch_size
            is_self_critical = self._progress.epochs >= settings.epochs
            metrics = run_epoch(
                loader,
                self._self_critical_step if self._self_critical_step and is_self_critical else self._take_step,
                stop=stop,
                tracker=tracker,
                save=self._checkpoints.save,
                num_epochs=settings.all_epochs,
                checkpoint_steps=settings.checkpoint_steps,
            )
            self._report["training_images"] += metrics.num_images
            self._report["training_seconds"] += metrics.seconds
            ledger = folder.reconcile(self._run, loader.ledger, "train", epoch=loader.epoch, planned=planned)
            self._accelerator.print(f"epoch {loader.epoch}: training {metrics}; {ledger}")
        check_same_weights(self._loss_model, self._accelerator)
        self._progress.epochs += 1

    def evaluate(self, tracker: Tracker) -> None:
        """Evaluate the trained epochs on the val split, where there is one, and note its captions if they are the best.

        Raises UserError.
        """
        if not self._evaluator:
            return
        found = self._evaluator.evaluate()
        self._report["validation_images"] += len(found.captions)
        self._report["validation_seconds"] += found.seconds
        epoch = self._progress.epochs
        planned = self._evaluator.split.num_samples
        ledger = folder.reconcile(self._run, found.ledger, "val", epoch=epoch, planned=planned)
        self._accelerator.print(f"epoch {epoch}: validation {found}; {ledger}")
        is_best = self._progress.add_evaluation(found.metrics, checkpoint=self._checkpoints.name)
        tracker.log(epoch * self._epoch_steps, {"epoch": epoch, **found.curves()})
        if self._accelerator.is_main_process:
            tracker.show(epoch * self._epoch_steps, *self._evaluator.sample_captions(found))
            if is_best:
                write_captions(self._run / folder.BEST_CAPTIONS, found.captions)

    def save(self) -> None:
        """Write a checkpoint. Raises UserError where it cannot be written."""
        self._checkpoints.save()

    # ---- the end --------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write figures, report, and the model folder with the best epoch's weights, its confidence calibrated.

        Raises UserError.
        """
        self._checkpoints.load_best(self._loss_model)
        calibration, is_main = None, self._accelerator.is_main_process
        if self._evaluator:
            captions = read_captions(self._run / folder.BEST_CAPTIONS) if is_main else []
            calibration = calibrate(captions, self._evaluator)
        with raising_on_all_ranks():
            if is_main:
                folder.write_figures(self._run, report=self._report, metrics=self._progress.metrics)
                write_report(self._run)
                folder.write_model(
                    self._run,
                    model=self._loss_model.model,
                    view=self._start.view,
                    vocabulary=self._start.vocabulary,
                    decoding=self._settings.decoding(),
                    metrics=self._progress.metrics,
                    calibration=calibration,
                )
        self._accelerator.end_training()
