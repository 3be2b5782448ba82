"""A run's checkpoints: complete or absent, and without frozen weights.

A checkpoint is the folder `checkpoints/epoch-0001-000000001000` (epoch, step); a frozen encoder is stored once, as
`encoder.safetensors`.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from captioner.errors import UserError
from captioner.files.storage import write_atomic
from captioner.streaming import StreamingLoader
from train.barriers import on_main_rank, raising_on_all_ranks
from train.run.agreement import wait_until_all_see

FOLDER = "checkpoints"
COMPLETE = "complete.json"
WEIGHTS = "model.safetensors"  # Accelerate's name
ENCODER = "encoder.safetensors"


@dataclass(kw_only=True, slots=True)
class Progress:
    """The number of completed epochs, and the best epoch's checkpoint and metrics. Accelerate stores it."""

    epochs: int = 0
    best: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    epochs_since_best: int = 0

    def add_evaluation(self, metrics: dict[str, float], *, checkpoint: str) -> bool:
        """Record an epoch's metrics, before its checkpoint is written. Returns whether they are the best so far."""
        is_best = not self.best or metrics["cider"] > self.metrics["cider"]
        self.epochs_since_best += 1
        if is_best:
            self.best, self.metrics, self.epochs_since_best = checkpoint, metrics, 0
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """The state to checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        for name in asdict(self):
            setattr(self, name, state[name])


@dataclass
class Checkpoints:
    """Saves and loads what is registered with Accelerate, on all ranks. Keeps the `keep` newest ones and the best."""

    run: Path
    loader: StreamingLoader
    progress: Progress
    accelerator: Accelerator
    keep: int = 2

    @property
    def name(self) -> str:
        """The name of the checkpoint at the loader's step."""
        return f"epoch-{self.loader.epoch:04d}-{self.loader.steps_done:012d}"

    def save(self) -> None:
        """Write a checkpoint, its completion marker last, and then delete old ones.

        Raises UserError if it cannot be written; earlier checkpoints stay.
        """
        folder = self.run / FOLDER / self.name

        def complete() -> None:
            _sync(folder)
            write_atomic(str(folder / COMPLETE), json.dumps(self.loader.state_dict()))

        on_main_rank(lambda: _remove(folder))
        try:
            with raising_on_all_ranks():
                try:
                    self.accelerator.save_state(str(folder))
                except (OSError, RuntimeError, SafetensorError) as error:  # each library raises its own for a full disk
                    raise UserError(_first_line(error)) from error
            on_main_rank(complete)
        except (UserError, OSError) as error:
            if self.accelerator.is_main_process:
                _remove(folder)
            earlier = find_checkpoints(self.run)
            newest = f"{earlier[-1]} is complete" if earlier else "there is no earlier checkpoint"
            raise UserError(
                f"cannot write {folder} ({error}); {newest}: make room, then continue with --resume"
            ) from error
        on_main_rank(self._remove_old)

    def _remove_old(self) -> None:
        for old in find_checkpoints(self.run)[: -self.keep]:
            if old.name != self.progress.best:
                _remove(old)

    def resume(self) -> None:
        """Load the newest complete checkpoint that the main process sees, if any, with the loader's state.

        Raises UserError if it was made on other data or cannot be read.
        """
        newest = on_main_rank(lambda: [path.name for path in find_checkpoints(self.run)[-1:]])
        for name in newest:  # the run folder may have another path on each machine
            checkpoint = self.run / FOLDER / name
            wait_until_all_see(checkpoint / COMPLETE)
            with raising_on_all_ranks():
                _load(checkpoint, self.accelerator)

    def load_best(self, loss_model: nn.Module) -> None:
        """Load the best epoch's weights into the model; without a validation split nothing changes."""
        if self.progress.best:
            load_weights(self.run / FOLDER / self.progress.best, loss_model)


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints, the newest last."""
    return sorted(path.parent for path in run.glob(f"{FOLDER}/epoch-*/{COMPLETE}"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sync(folder: Path) -> None:
    """Flush all files of a folder to disk, so that after a power cut a marker never stands for lost files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """Delete a checkpoint, its completion marker first, so that after a kill it counts as incomplete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _load(checkpoint: Path, accelerator: Accelerator) -> None:
    try:
        accelerator.load_state(str(checkpoint))
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"cannot read the checkpoint {checkpoint} ({_first_line(error)}): delete it to continue from the one "
            "before, and launch with the same --mixed_precision as before"
        ) from error


# ---- weights ------------------------------------------------------------------------------------------------


def checkpoint_trained_weights(loss_model: nn.Module, accelerator: Accelerator) -> None:
    """Make checkpoints hold only the weights that training changes, under names independent of the world size."""

    def save(_models: list[nn.Module], states: list[dict[str, Tensor]], _folder: str) -> None:
        states[:] = [{name: tensor.contiguous() for name, tensor in trained_weights(loss_model).items()}]

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_weights(Path(folder), loss_model)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_weights(checkpoint: Path, loss_model: nn.Module) -> None:
    """Load a checkpoint's weights into the model. Raises UserError if they belong to another model."""
    found, wanted = load_file(checkpoint / WEIGHTS), trained_weights(loss_model)
    if {name: tensor.shape for name, tensor in found.items()} != {name: w.shape for name, w in wanted.items()}:
        raise UserError(f"{checkpoint} belongs to another model: give another --output, or the settings of that run")
    loss_model.load_state_dict(found, strict=False)


def trained_weights(loss_model: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen modules, which have parameters but none that requires a gradient."""
    frozen = tuple(f"{name}." for name, module in loss_model.named_modules() if _is_frozen(module))
    return {name: tensor for name, tensor in loss_model.state_dict().items() if not name.startswith(frozen)}


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def store_encoder(run: Path, backbone: nn.Module) -> None:
    """Write a frozen encoder's weights to the run folder, unless they are there: checkpoints do not hold them."""
    if not (run / ENCODER).exists():
        tensors = {name: tensor.contiguous().cpu() for name, tensor in backbone.state_dict().items()}
        write_atomic(str(run / ENCODER), save_tensors(tensors))
