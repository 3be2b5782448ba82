"""The run folder: settings, checkpoints that are whole or absent, and where everything lies.

It is created after all checks of the start have passed, see docs/decisions/0019-what-a-run-is.md.

`settings.json` · `encoder.safetensors` (a frozen one, once) · `checkpoints/epoch-0001-000000001000/` (epoch, step)
`history.jsonl` · `samples.jsonl` and `samples/` · `tensorboard/` · `skipped.jsonl` · `validation.jsonl` (of the best
epoch) · `metrics.json` · `report.json` · `report.html` · `model/` (last)
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from uuid import uuid4

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from captioner.calibration import Calibration
from captioner.errors import UserError
from captioner.files.storage import read_json, write_atomic
from captioner.model.bundle import Bundle, DecodingDefaults, save_bundle
from captioner.model.encoders import Encoder
from captioner.streaming import Ledger, StreamingLoader
from captioner.streaming.dataset import Split
from captioner.vocabulary import Vocabulary
from train.evaluation.predictions import write_captions
from train.evaluation.validation import Evaluation
from train.run.epoch import Reading
from train.step.schedule import is_frozen
from train.step.step import CaptionLoss
from train.uneven import in_main, refused_together

SETTINGS = "settings.json"
MADE_OF = "made_of"
ENCODER_WEIGHTS = "encoder weights"
BEST_CAPTIONS = "validation.jsonl"
COMPLETE = "complete.json"
OWNER = "owner.json"
SKIPPED = "skipped.jsonl"
WEIGHTS = "model.safetensors"  # Accelerate's name
ENCODER = "encoder.safetensors"
VISIBLE_SECONDS = 75.0  # NFS clients may trust for a minute what they knew of a folder
OF_A_MACHINE = ("shards", "output", "resume", "init", "weights", "cache", "cache_gigabytes", "workers", "wandb")


@dataclass(kw_only=True, slots=True)
class RunReport:
    """What the finishing session did itself (a resumed run's earlier sessions are not counted), for `report.json`."""

    training_images: int = 0
    training_seconds: float = 0.0
    validation_images: int = 0
    validation_seconds: float = 0.0

    def add_training(self, reading: Reading) -> None:
        """Count an epoch's steps."""
        self.training_images += reading.num_images
        self.training_seconds += reading.seconds

    def add_validation(self, found: Evaluation) -> None:
        """Count an evaluation."""
        self.validation_images += len(found.captions)
        self.validation_seconds += found.seconds


@dataclass(kw_only=True, slots=True)
class Progress:
    """The epochs that were trained and evaluated, the best one's metrics, and its checkpoint. Accelerate stores it."""

    epochs: int = 0
    best: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    epochs_since_best: int = 0

    def is_stuck(self, *, patience_epochs: int | None) -> bool:
        """Whether the CIDEr has not become better for so many epochs; None is endless patience."""
        return patience_epochs is not None and self.epochs_since_best >= patience_epochs

    def note(self, run: Path, found: Evaluation, *, checkpoint: str) -> None:
        """Take an epoch's evaluation, before its checkpoint is written; the best captions go to the run folder."""
        self.epochs_since_best += 1
        if not self.best or found.metrics["cider"] > self.metrics["cider"]:
            self.best, self.metrics, self.epochs_since_best = checkpoint, found.metrics, 0
            if PartialState().is_main_process:
                write_captions(run / BEST_CAPTIONS, found.captions)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take another's place."""
        for name in asdict(self):
            setattr(self, name, state[name])


def write_figures(run: Path, report: RunReport, metrics: Mapping[str, float]) -> None:
    """Write `report.json` and `metrics.json`."""
    write_atomic(str(run / "report.json"), json.dumps(asdict(report), indent=1, allow_nan=False))
    write_atomic(str(run / "metrics.json"), json.dumps(dict(metrics), indent=1, allow_nan=False))


def model_folder(run: Path) -> Path:
    """Where a run's model lies once it is finished."""
    return run / "model"


def made_of(
    train: Split, val: Split | None, vocabulary: Vocabulary, *, initial: Bundle | None, weights: str | None
) -> dict[str, str | None]:
    """A content fingerprint of each input of a run, independent of the input's location and name.

    None for an input that is absent, and for a weights file that no longer exists.
    """
    return {
        "train shards": train.fingerprint,
        "val shards": val.fingerprint if val else None,
        "vocabulary": vocabulary.fingerprint,
        "model of --init": initial.name if initial else None,
        ENCODER_WEIGHTS: _weights_fingerprint(weights),
    }


def _weights_fingerprint(weights: str | None) -> str | None:
    if weights in (None, "default", "none"):
        return weights
    if not Path(weights).is_file():
        return None
    with Path(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished(
    run: Path,
    settings: Mapping[str, Any],
    parts: Mapping[str, str | None],
    *,
    ignored: tuple[str, ...],
    resume: bool,
) -> bool:
    """Whether the run's model is there, as the main process sees it; nothing is written.

    Raises UserError where the processes have different settings or parts (`made_of`), where the folder holds a run that
    was started with others than these, the `ignored` ones apart, or of other parts, and where an unfinished run is not
    to be resumed.
    """
    check_same_parts(parts)
    check_same_settings(settings)
    return in_main(lambda: _is_finished(run, settings, parts, ignored=ignored, resume=resume))


def _is_finished(
    run: Path,
    settings: Mapping[str, Any],
    parts: Mapping[str, str | None],
    *,
    ignored: tuple[str, ...],
    resume: bool,
) -> bool:
    path, finished = run / SETTINGS, model_folder(run).exists()
    if path.exists():
        old = read_json(str(path), remedy=f"delete {run} or give another --output")
        if not isinstance(old, dict) or MADE_OF not in old:
            raise UserError(f"{path} is damaged or of an older version: give another --output, or delete {run}")
        changes = _changes(old, settings, parts, ignored=ignored)
        if changes:
            raise UserError(
                f"{run} was started with other settings ({', '.join(changes)}): give another --output, or delete {run}"
            )
    if complete_checkpoints(run) and not resume and not finished:
        raise UserError(
            f"{run} holds an unfinished run: continue with --resume, give another --output, or delete {run}"
        )
    return finished


def _changes(
    old: Mapping[str, Any],
    settings: Mapping[str, Any],
    parts: Mapping[str, str | None],
    *,
    ignored: tuple[str, ...],
) -> list[str]:
    """What differs between the recorded settings and these, in words."""
    settings, old_parts = _as_read(settings), old[MADE_OF]
    found = [
        f"{name} was {old.get(name)}, is {settings[name]}"
        for name in settings
        if name not in ignored and old.get(name) != settings[name]
    ]
    for name, fingerprint in parts.items():
        before = old_parts.get(name)
        is_gone = name == ENCODER_WEIGHTS and fingerprint is None and old.get("weights") == settings["weights"]
        if fingerprint != before and not is_gone:  # weights are kept in the run folder
            order = ", or in another order" if name.endswith("shards") else ""
            found.append(f"different {name}{order}: fingerprint {_short(before)} became {_short(fingerprint)}")
    return found


def _as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a file: lists for tuples."""
    return json.loads(json.dumps(settings))


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "none"


@contextmanager
def starting(run: Path, settings: Mapping[str, Any], parts: Mapping[str, str | None]) -> Iterator[None]:
    """Make the run folder before, and write its settings after what happens within, which may still refuse the start.

    Then, and where the processes do not share the folder, UserError is raised in all, and no new folder is left.
    """
    made = in_main(lambda: _make(run))
    try:
        check_shared(run)
        with refused_together():
            yield
        content = json.dumps({**settings, MADE_OF: parts}, indent=1)
        in_main(lambda: write_atomic(str(run / SETTINGS), content))
    except BaseException:
        if PartialState().is_main_process:
            _unmake(made)
        raise


def _make(run: Path) -> list[Path]:
    """Make the folder with its parents; returns those that were not there, the innermost first, or held no run yet."""
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    return new or ([run] if {path.name for path in run.iterdir()} <= {OWNER} else [])


def _unmake(made: Sequence[Path]) -> None:
    """Take back what `_make` made: what is in the run folder, but for its owner, and folders that are empty then."""
    for path in made[0].iterdir() if made else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != OWNER:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


# ---- one folder for all processes ---------------------------------------------------------------------------


def check_shared(run: Path) -> None:
    """Raise UserError unless all processes see what the main process writes into the run folder."""
    if PartialState().num_processes == 1:
        return
    mark = run / in_main(lambda: _leave_mark(run))
    try:
        _wait_until_all_see(mark)
    finally:
        if PartialState().is_main_process:
            mark.unlink(missing_ok=True)


def check_same_parts(parts: Mapping[str, str | None]) -> None:
    """Raise UserError unless all processes see the same data; a weights file need not be on all machines."""
    facts = gather_object([{name: parts[name] for name in parts if name != ENCODER_WEIGHTS}])
    for rank, other in enumerate(facts):
        for name, fingerprint in facts[0].items():
            if other[name] != fingerprint:
                raise UserError(
                    f"rank {rank} sees other data than rank 0 ({name} {other[name]}, not {fingerprint}): give all "
                    "machines the same shards and the same flags"
                )


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError unless all processes have the same settings, those apart that may be a machine's own."""
    for host, others in gather_object([(socket.gethostname(), dict(settings))]):
        differing = [name for name in settings if name not in OF_A_MACHINE and others[name] != settings[name]]
        if differing:
            raise UserError(
                f"{host} was launched with --{differing[0].replace('_', '-')} {others[differing[0]]}, "
                f"{socket.gethostname()} with {settings[differing[0]]}: give all machines the same flags"
            )


def _leave_mark(run: Path) -> str:
    """The name of a new file in the folder: no machine's cache can know it."""
    name = f".seen-by-all-{uuid4().hex}"
    write_atomic(str(run / name), "")
    return name


def _wait_until_all_see(path: Path) -> None:
    """Return when all processes see a file; all must call it. Raises UserError where one does not."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = {host for host, sees in gather_object([(socket.gethostname(), path.exists())]) if not sees}
    if blind:
        raise UserError(
            f"{', '.join(sorted(blind))} cannot see {path}, which rank 0 wrote: --output must be a folder on a file "
            "system that all machines share"
        )


# ---- checkpoints --------------------------------------------------------------------------------------------


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints that are whole, the newest last."""
    return sorted(path.parent for path in run.glob(f"checkpoints/epoch-*/{COMPLETE}"))


def checkpoint_name(loader: StreamingLoader) -> str:
    """The name of the checkpoint at the loader's step."""
    return f"epoch-{loader.epoch:04d}-{loader.steps_done:012d}"


def save_checkpoint(
    run: Path, loader: StreamingLoader, progress: Progress, accelerator: Accelerator, *, keep: int = 2
) -> None:
    """Write a checkpoint; its completion marker comes last, and only then go all but the `keep` newest and the best.

    Accelerate stores `loader` and `progress`, which are registered with it, among the rest. Raises UserError where it
    cannot be written; the checkpoints before it stay.
    """
    folder = run / "checkpoints" / checkpoint_name(loader)

    def write() -> None:
        try:
            accelerator.save_state(str(folder))
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
            raise UserError(next(iter(str(error).splitlines()), type(error).__name__)) from error

    def complete() -> None:
        try:
            _to_disk(folder)  # all ranks have written
            write_atomic(str(folder / COMPLETE), json.dumps(loader.state_dict()))
        except OSError as error:
            raise UserError(str(error)) from error

    in_main(lambda: _remove(folder))
    try:
        with refused_together():
            write()
        in_main(complete)
    except UserError as error:
        if accelerator.is_main_process:
            _remove(folder)
        newest = next(iter(complete_checkpoints(run)[::-1]), None)
        left = f"{newest} is whole" if newest else "there is none before it"
        raise UserError(f"cannot write {folder} ({error}); {left}: make room, then continue with --resume") from error
    in_main(lambda: _remove_old(run, keep=keep, best=progress.best))


def _remove_old(run: Path, *, keep: int, best: str) -> None:
    for old in complete_checkpoints(run)[:-keep]:
        if old.name != best:
            _remove(old)


def _to_disk(folder: Path) -> None:
    """Have all files of a folder written out, so that a completion marker never outlives them."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, its completion marker first: what a kill leaves of it is not taken for whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def resume(run: Path, accelerator: Accelerator) -> None:
    """Load the newest complete checkpoint, where there is one, with the loader's state.

    The main process chooses it for all. Raises UserError when it was made on other data.
    """
    newest = in_main(lambda: next((path.name for path in complete_checkpoints(run)[::-1]), None))
    if newest is not None:
        checkpoint = run / "checkpoints" / newest
        _wait_until_all_see(checkpoint / COMPLETE)
        with refused_together():
            _load(checkpoint, accelerator)


def _load(checkpoint: Path, accelerator: Accelerator) -> None:
    try:
        accelerator.load_state(str(checkpoint))
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"cannot read the checkpoint {checkpoint} ({reason}): delete it to go on from the one before, and "
            "launch with the same --mixed_precision as before"
        ) from error


def checkpoint_trained_weights(loss_model: CaptionLoss, accelerator: Accelerator) -> None:
    """Make checkpoints hold only the weights that training changes, under names independent of the world size."""

    def save(_models: list[nn.Module], states: list[dict[str, Tensor]], _folder: str) -> None:
        states[:] = [{name: tensor.contiguous() for name, tensor in _trained_weights(loss_model).items()}]

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_weights(Path(folder), loss_model)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_weights(checkpoint: Path, loss_model: CaptionLoss) -> None:
    """Put a checkpoint's weights into the model. Raises UserError where they are of another one."""
    found, wanted = load_file(checkpoint / WEIGHTS), _trained_weights(loss_model)
    if {name: tensor.shape for name, tensor in found.items()} != {name: w.shape for name, w in wanted.items()}:
        raise UserError(f"{checkpoint} is of another model: give another --output, or the settings it was made with")
    loss_model.load_state_dict(found, strict=False)


def _trained_weights(loss_model: CaptionLoss) -> dict[str, Tensor]:
    """All of the state that is not a frozen encoder's."""
    frozen = is_frozen(loss_model.model.encoder)
    state = loss_model.state_dict()
    return {name: tensor for name, tensor in state.items() if not (frozen and name.startswith("model.encoder."))}


def load_best(run: Path, progress: Progress, loss_model: CaptionLoss) -> None:
    """Put the best epoch's weights into the model; without a validation split it keeps the last ones."""
    if progress.best:
        load_weights(run / "checkpoints" / progress.best, loss_model)


def keep_encoder(run: Path, encoder: Encoder, accelerator: Accelerator) -> None:
    """Store the weights of a frozen encoder in the run folder, once: checkpoints hold none of them."""
    if is_frozen(encoder) and accelerator.is_main_process and not kept_encoder(run):
        tensors = {name: tensor.contiguous().cpu() for name, tensor in encoder.backbone.state_dict().items()}
        write_atomic(str(run / ENCODER), save_tensors(tensors))


def kept_encoder(run: Path) -> str | None:
    """The weights of the frozen encoder that a run was started with; a start that was killed left no settings."""
    return str(run / ENCODER) if (run / ENCODER).exists() and (run / SETTINGS).exists() else None


def reconcile(run: Path, ledger: Ledger, split: str, *, epoch: int, planned: int) -> Ledger:
    """What became of all ranks' samples; skipped ones are listed in the run folder.

    Raises UserError where none of them could be used, and RuntimeError when some are lost.
    """
    total = Ledger.of_all(gather_object([ledger]), planned=planned)
    if PartialState().is_main_process:
        append_skipped(run, total, split=split, epoch=epoch)
    if planned and not total.decoded:
        raise UserError(
            f"none of the {planned:,} {split} samples of epoch {epoch} could be used ({total.skipped[0].message}): see "
            f"{run / SKIPPED}"
        )
    return total


def append_skipped(run: Path, ledger: Ledger, *, split: str, epoch: int) -> None:
    """Add the samples that an epoch had to leave out to `skipped.jsonl`."""
    if ledger.skipped:
        with (run / SKIPPED).open("a", encoding="utf-8") as file:
            rows = ({"split": split, "epoch": epoch, **asdict(skip)} for skip in ledger.skipped)
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_model(
    run: Path,
    loss_model: CaptionLoss,
    vocabulary: Vocabulary,
    decoding: DecodingDefaults,
    metrics: Mapping[str, float],
    *,
    calibration: Calibration | None,
) -> None:
    """Write the model folder, which ends the run, and delete the checkpoints, of which it holds what they were for.

    Raises UserError where it cannot be written; the checkpoints stay then.
    """
    model, view = loss_model.model, loss_model.view
    try:
        save_bundle(
            model_folder(run), model=model, view=view, vocabulary=vocabulary, decoding=decoding, metrics=metrics,
            calibration=calibration,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"cannot write {model_folder(run)} ({error}): make room, then continue with --resume"
        ) from error
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / ENCODER).unlink(missing_ok=True)
