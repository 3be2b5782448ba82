"""A run's curves and sample captions: history, TensorBoard, and Weights & Biases when asked.

`tensorboard/` · `history.jsonl` (a row for each `log`) · `samples.jsonl` (captions of the same images, over time)
`samples/00.jpg`, ... · `wandb.txt` (the id of the W&B run) and `wandb/`
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from captioner.attention import Attention
from captioner.errors import UserError
from captioner.files.storage import write_atomic

HISTORY = "history.jsonl"
SAMPLES = "samples.jsonl"
SAMPLE_IMAGES = "samples"
WANDB_ID = "wandb.txt"
JPEG_QUALITY = 90


class Tracker:
    """Writes a run's curves and sample captions; with `quiet`, on other ranks than the main one, it does nothing.

    A run that resumes after `first_step` steps drops the values of later ones. Raises UserError where the history is
    damaged, and where Weights & Biases is asked for and does not start.
    """

    def __init__(
        self,
        run: Path,
        *,
        first_step: int,
        wandb_project: str | None = None,
        settings: Mapping[str, Any],
        quiet: bool = False,
    ) -> None:
        self._quiet = quiet
        if quiet:
            return
        self._wandb = _start_wandb(run, wandb_project, settings) if wandb_project else None  # first: it may refuse
        for name in (HISTORY, SAMPLES):
            _drop_later(run / name, last_step=first_step)
        self._run = run
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)  # it purges this step too
        self._images_saved = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step to all curves; a number that is not finite is null in the history."""
        if self._quiet:
            return
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        _append(self._run / HISTORY, {"step": step, **finite})
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)
        self._board.flush()  # a run that is killed has the same curves in both
        self._log_to_wandb(step, numbers)

    def show(
        self,
        step: int,
        images: Sequence[np.ndarray],
        captions: Sequence[str],
        attention: Sequence[Attention | None] = (),
    ) -> None:
        """Add the captions at a step of images (each uint8 (P, P, 3)), the same ones every time.

        TensorBoard shows the images once, and below "text" their captions as they change. The report shows `attention`.
        """
        if self._quiet or len(images) == 0:
            return
        if not self._images_saved:
            for number, image in enumerate(images):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
                write_atomic(str(self._run / SAMPLE_IMAGES / f"{number:02d}.jpg"), buffer.getvalue())
            self._board.add_images("validation/samples", np.stack(images), step, dataformats="NHWC")
            self._images_saved = True
        seen = {"attention": [each and each.to_json() for each in attention]} if any(attention) else {}
        _append(self._run / SAMPLES, {"step": step, "captions": list(captions), **seen})
        listed = "".join(f"{number}. {caption}\n" for number, caption in enumerate(captions, start=1))  # Markdown
        self._board.add_text("validation/captions", listed.encode("utf-8", "replace").decode(), step)
        self._board.flush()
        if self._wandb is not None:
            import wandb  # type: ignore[missing-import]  # an extra

            logged = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
            self._log_to_wandb(step, {"validation/samples": logged})

    def close(self) -> None:
        """Close the TensorBoard file and the Weights & Biases run."""
        if self._quiet:
            return
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _log_to_wandb(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the W&B run, whose steps only increase: a resumed run's repeated steps are not logged again."""
        if self._wandb is not None and step >= self._wandb.step:
            self._wandb.log(values, step=step)


# ---- rows -----------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a history, without a last one that was cut off while it was written; none if there is no file.

    Raises UserError where another row is damaged.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # a whole row ends its line
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is damaged ({error}): delete that line") from error
    return rows


def _drop_later(path: Path, *, last_step: int) -> None:
    if path.exists():
        write_atomic(str(path), "".join(_line(row) for row in read_rows(path) if row["step"] <= last_step))


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


# ---- Weights & Biases -----------------------------------------------------------------------------------------


def check_wandb(project: str | None) -> None:
    """Raise UserError where a project is asked for and Weights & Biases is not installed."""
    if project is None:
        return
    try:
        import wandb  # type: ignore[missing-import]  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--wandb {project} needs Weights & Biases, which is not installed: pip install wandb"
        ) from error


def _start_wandb(run: Path, project: str, settings: Mapping[str, Any]) -> Any:
    """The W&B run, the same one when this run resumes; see `check_wandb`. Raises UserError when it does not start."""
    import wandb  # type: ignore[missing-import]

    path = run / WANDB_ID
    run_id = path.read_text() if path.exists() else uuid4().hex
    try:
        started = wandb.init(
            project=project, dir=str(run), id=run_id, name=run.resolve().name, resume="allow", config=dict(settings)
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases did not start ({error}): run wandb login, set WANDB_MODE=offline, or leave out --wandb"
        ) from error
    write_atomic(str(path), run_id)
    return started
