"""The run folder: settings, checkpoints that are whole or absent, and where everything lies.

`settings.json` · `checkpoints/step-0001-00001000/` (epoch, step) · `tensorboard/`
`validation.jsonl` · `report.json` · `model/` (last)
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from captioner.cli import UserError
from captioner.storage import read_json, write_atomic

KEPT_CHECKPOINTS = 2
COMPLETE = "complete.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where training stands; the same on every rank. `step` of `epoch` is the next one to do."""

    data: str
    """Fingerprint of what the epoch plan is a function of."""
    epoch: int = 0
    step: int = 0


@dataclass(kw_only=True, slots=True)
class RunReport:
    """What the finishing session did itself (a resumed run's earlier sessions are not counted), for `report.json`."""

    training_images: int = 0
    training_seconds: float = 0.0
    validation_images: int = 0
    validation_seconds: float = 0.0


def write_report(run: Path, report: RunReport) -> None:
    """Write `report.json`."""
    write_atomic(str(run / "report.json"), json.dumps(asdict(report), indent=1))


def model_folder(run: Path) -> Path:
    """Where a run's model lies once it is finished."""
    return run / "model"


def record_settings(run: Path, settings: Mapping[str, Any], *, ignored: tuple[str, ...]) -> None:
    """Save the run's settings; when the run exists already, refuse others than it was started with."""
    path = run / "settings.json"
    if path.exists():
        old = read_json(str(path), remedy=f"delete {run} or give another --output")
        changed = [name for name in settings if name not in ignored and old.get(name) != settings[name]]
        if changed:
            what = ", ".join(f"{name} was {old.get(name)}, is {settings[name]}" for name in changed)
            raise UserError(f"{run} was started with other settings ({what}): give another --output, or delete {run}")
    else:
        write_atomic(str(path), json.dumps(settings, indent=1))


def save_checkpoint(run: Path, progress: Progress, accelerator: Accelerator) -> None:
    """Write a checkpoint; its completion marker comes last, and only then the oldest ones go."""
    folder = run / "checkpoints" / f"step-{progress.epoch:04d}-{progress.step:08d}"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and folder.exists():
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_atomic(str(folder / COMPLETE), json.dumps(asdict(progress)))
        for old in _complete_checkpoints(run)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _complete_checkpoints(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob(f"checkpoints/step-*/{COMPLETE}"))


def resume(run: Path, fresh: Progress, accelerator: Accelerator) -> Progress:
    """Load the newest complete checkpoint and say where it stands; `fresh` when there is none.

    Raises UserError when it was made on other data than `fresh` says.
    """
    checkpoints = _complete_checkpoints(run)
    if not checkpoints:
        return fresh
    marker = checkpoints[-1] / COMPLETE
    remedy = f"delete {marker.parent} to resume from an older checkpoint"
    progress = Progress(**read_json(str(marker), remedy=remedy))
    if progress.data != fresh.data:
        raise UserError(
            f"{marker.parent} was made on other shards, seed or batch size: give another --output, or delete {run}"
        )
    accelerator.load_state(str(marker.parent))
    return progress


def remove_checkpoints(run: Path) -> None:
    """Delete the checkpoints of a finished run: its model folder holds what they were for."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
