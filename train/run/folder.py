"""The run folder: the settings and inputs a run was started with, and what it leaves.

It is created after all checks of the start have passed, see docs/decisions/0019-what-a-run-is.md.

`settings.json` · `encoder.safetensors` (a frozen one, once) · `checkpoints/` · `history.jsonl` · `samples.jsonl` and
`samples/` · `tensorboard/` · `skipped.jsonl` · `validation.jsonl` (of the best epoch) · `metrics.json` · `report.json`
`report.html` · `model/` (last)
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from captioner.errors import UserError
from captioner.files.storage import file_sha256, read_json, write_atomic
from captioner.model.bundle import Bundle, save_bundle
from captioner.streaming import Ledger
from captioner.vocabulary import Vocabulary
from train.barriers import on_main_rank, raising_on_all_ranks
from train.data.folders import CaptionData
from train.run.agreement import ENCODER_WEIGHTS, check_same_start, check_shared, differences
from train.run.checkpoints import ENCODER, FOLDER, find_checkpoints
from train.settings import CHANGEABLE, TrainSettings

SETTINGS = "settings.json"
INPUTS = "made_of"  # in settings.json
BEST_CAPTIONS = "validation.jsonl"
OWNER = "owner.json"
SKIPPED = "skipped.jsonl"


def model_folder(run: Path) -> Path:
    """The folder of a finished run's model."""
    return run / "model"


def kept_encoder(run: Path) -> str | None:
    """The stored weights of the run's frozen encoder; those of a start that was killed do not count."""
    return str(run / ENCODER) if (run / ENCODER).exists() and (run / SETTINGS).exists() else None


def input_fingerprints(
    data: CaptionData, vocabulary: Vocabulary, *, initial: Bundle | None, weights: str | None
) -> dict[str, str | None]:
    """A content fingerprint of each input of a run, independent of the input's location and name.

    None for an input that is absent, and for a weights file that no longer exists.
    """
    return {
        "train shards": data.train.fingerprint,
        "val shards": data.val.fingerprint if data.val else None,
        "vocabulary": vocabulary.fingerprint,
        "model of --init": initial.name if initial else None,
        ENCODER_WEIGHTS: _weights_fingerprint(weights),
    }


def _weights_fingerprint(weights: str | None) -> str | None:
    if weights in (None, "default", "none"):
        return weights
    if not Path(weights).is_file():
        return None
    return file_sha256(Path(weights))


# ---- the start ----------------------------------------------------------------------------------------------


def is_finished(run: Path, settings: TrainSettings, inputs: Mapping[str, str | None]) -> bool:
    """Whether the run's model is there, as the main process sees it; nothing is written.

    Raises UserError where the ranks have different settings or inputs, where the folder holds a run of other settings
    (those in CHANGEABLE excepted) or inputs, and where an unfinished run is not to be resumed.
    """
    facts = json.loads(json.dumps({**asdict(settings), **inputs}))  # lists for tuples, as in a file
    check_same_start(facts)

    def look() -> bool:
        finished = model_folder(run).exists()
        if (run / SETTINGS).exists():
            _check_same_run(run, facts)
        if find_checkpoints(run) and not settings.resume and not finished:
            raise UserError(
                f"{run} holds an unfinished run: continue with --resume, give another --output, or delete {run}"
            )
        return finished

    return on_main_rank(look)


def _check_same_run(run: Path, facts: Mapping[str, Any]) -> None:
    """Raise UserError where the folder's settings or inputs differ from these."""
    path = run / SETTINGS
    old = read_json(str(path), remedy=f"delete {run} or give another --output")
    if not isinstance(old, dict) or INPUTS not in old:
        raise UserError(f"{path} is damaged or of an older version: give another --output, or delete {run}")
    weights_are_gone = facts[ENCODER_WEIGHTS] is None and old.get("weights") == facts["weights"]
    ignored = (*CHANGEABLE, ENCODER_WEIGHTS) if weights_are_gone else CHANGEABLE  # they are kept in the run folder
    changes = [
        f"{name} was {was}, is {value}" for name, was, value in differences(old | old[INPUTS], facts, ignored=ignored)
    ]
    if changes:
        raise UserError(
            f"{run} was started with other settings or shards in another order ({', '.join(changes)}): give another "
            f"--output, or delete {run}"
        )


@contextmanager
def starting(run: Path, settings: TrainSettings, inputs: Mapping[str, str | None]) -> Iterator[None]:
    """Write the run's settings on leaving.

    An error within is raised on all ranks, and so is a UserError where they do not share the folder. What was written
    into a new folder is deleted then, and the folder is removed by its owner.
    """
    is_new = on_main_rank(lambda: {path.name for path in run.iterdir()} <= {OWNER})
    try:
        check_shared(run)
        with raising_on_all_ranks():
            yield
        content = json.dumps({**asdict(settings), INPUTS: inputs}, indent=1)
        on_main_rank(lambda: write_atomic(str(run / SETTINGS), content))
    except BaseException:
        if is_new and PartialState().is_main_process:
            _empty(run)
        raise


def _empty(run: Path) -> None:
    """Delete what is in a run folder, except its owner file."""
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != OWNER:
            path.unlink(missing_ok=True)


# ---- what a run leaves --------------------------------------------------------------------------------------


def reconcile(run: Path, ledger: Ledger, split: str, *, epoch: int, planned: int) -> Ledger:
    """The sum of all ranks' ledgers; skipped samples are listed in `skipped.jsonl`.

    Raises UserError where no sample could be used, and RuntimeError when some are lost.
    """
    total = Ledger.of_all(gather_object([ledger]), planned=planned)
    if total.skipped and PartialState().is_main_process:
        with (run / SKIPPED).open("a", encoding="utf-8") as file:
            rows = ({"split": split, "epoch": epoch, **asdict(skip)} for skip in total.skipped)
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if planned and not total.decoded:
        raise UserError(
            f"none of the {planned:,} {split} samples of epoch {epoch} could be used ({total.skipped[0].message}): see "
            f"{run / SKIPPED}"
        )
    return total


def write_figures(run: Path, **figures: Mapping[str, float]) -> None:
    """Write JSON files: `metrics={...}` into `metrics.json`."""
    for name, content in figures.items():
        write_atomic(str(run / f"{name}.json"), json.dumps(dict(content), indent=1, allow_nan=False))


def write_model(run: Path, **parts: Any) -> None:
    """Write the model folder, which ends the run, and delete the checkpoints, which are not needed any more.

    `parts` are those of `save_bundle`. Raises UserError where it cannot be written; the checkpoints stay then.
    """
    folder = model_folder(run)
    try:
        save_bundle(folder, **parts)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error}): make room, then continue with --resume") from error
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    (run / ENCODER).unlink(missing_ok=True)
