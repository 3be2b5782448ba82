"""The run folder: settings, checkpoints that are whole or absent, and where everything lies.

`settings.json` · `checkpoints/epoch-0001-000000128000/` (epoch, position in it) · `tensorboard/`
`skipped.jsonl` · `validation.jsonl` · `report.json` · `model/` (last)
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
from train.stream import Ledger, StreamState

KEPT_CHECKPOINTS = 2
COMPLETE = "complete.json"
SKIPPED = "skipped.jsonl"


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
    settings = json.loads(json.dumps(settings))  # as it comes back: lists for tuples
    if path.exists():
        old = read_json(str(path), remedy=f"delete {run} or give another --output")
        changed = [name for name in settings if name not in ignored and old.get(name) != settings[name]]
        if changed:
            what = ", ".join(f"{name} was {old.get(name)}, is {settings[name]}" for name in changed)
            raise UserError(f"{run} was started with other settings ({what}): give another --output, or delete {run}")
    else:
        write_atomic(str(path), json.dumps(settings, indent=1))


def save_checkpoint(run: Path, state: StreamState, accelerator: Accelerator) -> None:
    """Write a checkpoint; its completion marker comes last, and only then the oldest ones go.

    Accelerate stores `state`, which is registered with it, among the rest.
    """
    folder = run / "checkpoints" / f"epoch-{state.epoch:04d}-{state.position:012d}"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and folder.exists():
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_atomic(str(folder / COMPLETE), json.dumps(state.state_dict()))
        for old in _complete_checkpoints(run)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _complete_checkpoints(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob(f"checkpoints/epoch-*/{COMPLETE}"))


def resume(run: Path, accelerator: Accelerator) -> bool:
    """Load the newest complete checkpoint, the registered stream state in it too; whether there is one.

    Raises UserError when it was made on other data.
    """
    checkpoints = _complete_checkpoints(run)
    if checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
    return bool(checkpoints)


def append_skipped(run: Path, ledger: Ledger, *, split: str, epoch: int) -> None:
    """Add the samples that an epoch had to leave out to `skipped.jsonl`."""
    if ledger.skipped:
        with (run / SKIPPED).open("a", encoding="utf-8") as file:
            rows = ({"split": split, "epoch": epoch, **asdict(skip)} for skip in ledger.skipped)
            file.writelines(json.dumps(row) + "\n" for row in rows)


def remove_checkpoints(run: Path) -> None:
    """Delete the checkpoints of a finished run: its model folder holds what they were for."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
