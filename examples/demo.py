"""All stages on drawn scenes: draw, pack, train, evaluate on 2,000 other scenes, caption a folder; then one table.

Runs the commands that a user would type, and says what each is for; what they print is in data/demo/demo.log. Complete
results of an earlier run are reused. All files are in data/demo and runs/demo; the figures are in
runs/demo/summary.json.

Exit codes: 0 done; 1 done, but captions are worse than they should be; 2 an error, in one line.
"""

import json
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from awkward import write_folder
from captioner import cli
from captioner.errors import UserError
from captioner.files.storage import read_json, write_atomic
from captioner.metrics import References
from scenes import UNSEEN_PAIRS, SceneSettings, named_pairs, named_shapes, share_right
from train.run.tracking import HISTORY, read_rows

DATA, RUN = Path("data/demo"), Path("runs/demo")
SCENES, SHARDS, FOLDER = DATA / "scenes", DATA / "shards", DATA / "folder"
LOG, LOG_LINES = DATA / "demo.log", 12  # the last lines of the log are shown when a command fails
TEST_SCENES, TEST_SHARDS, RESULTS = DATA / "test", DATA / "test-shards", RUN / "test.json"
REPOSITORY = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2
SOME_FAILED = 3  # the captioning command's exit code if some files are no images
SCORES = {
    "cider": "CIDEr",
    "right_shape": "right shapes",
    "right_colour": "right shapes and colours",
    "two_kinds_right": "the same, two kinds of shapes",
    "unseen_pairs_right": "the same, pairs never trained on",
}
BARS = {"right_shape": 0.95, "right_colour": 0.95, "two_kinds_right": 0.9, "unseen_pairs_right": 0.85}

DRAW = f"python examples/scenes.py --output {SCENES}"
DRAW_TEST = f"python examples/scenes.py --output {TEST_SCENES} --train 1 --val 2000 --seed 2027"
PACK = (
    f"python sharding/make_shards.py --images {SCENES} --captions {SCENES}/annotations --output {SHARDS} "
    "--size 68 --shard-megabytes 1"
)
PACK_TEST = (
    f"python sharding/make_shards.py --images {TEST_SCENES} --captions {TEST_SCENES}/annotations --split val "
    f"--vocabulary {SHARDS}/vocabulary.json --output {TEST_SHARDS} --size 68 --shard-megabytes 1"
)
TRAIN = (  # the launcher guesses missing flags, with a warning
    "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "
    f"train/main.py --shards {SHARDS} --output {RUN} --resume --encoder small_cnn --weights none "
    "--finetune-encoder-from-step 0 --crop 60 --embedding-size 192 --hidden-size 192 --epochs 9 --batch-size 32 "
    "--learning-rate 2.5e-3 --encoder-learning-rate 2.5e-3 --input-dropout 0 --dropout 0"
)
EVALUATE = f"python train/evaluate.py --model {RUN}/model --shards {TEST_SHARDS} --output {RESULTS}"
CAPTION = (
    f"python infer/main.py --model {RUN}/model --images {FOLDER} --output {RUN}/captions.jsonl --gallery {RUN}/gallery "
    "--attention"
)


def main() -> None:
    """Run the stages in order and report."""
    started = time.monotonic()
    earlier = read_json(str(RUN / "summary.json"), remedy="")["stages"] if (RUN / "summary.json").exists() else {}
    stages: dict[str, dict[str, float]] = {}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")

    explain(
        "1 of 6: draw scenes of coloured shapes, each with five captions",
        "So nothing is downloaded, and it is known what each picture shows. Six pairs such as a red star are left out: "
        "the test has them.",
    )
    seconds, reused = run_stage(DRAW, finished=SCENES / "settings.json")
    stages["draw"] = stage_figures(count_pictures(SCENES), seconds, earlier.get("draw") if reused else None)

    explain(
        "2 of 6: pack them into shards",
        "Each picture is resized once and stored with its captions in one of a few tar files, which are fast to read.",
    )
    seconds, reused = run_stage(PACK, finished=SHARDS / "val.manifest.json")
    stages["pack"] = stage_figures(count_samples(), seconds, earlier.get("pack") if reused else None)

    explain("3 of 6: draw and pack other scenes for the test", "A model is judged on pictures that it has never seen.")
    run_stage(DRAW_TEST, finished=TEST_SCENES / "settings.json")
    run_stage(PACK_TEST, finished=TEST_SHARDS / "val.manifest.json")

    explain(
        "4 of 6: train, about 4 minutes on two CPU cores",
        "An encoder looks at the picture, a decoder writes the caption word by word. After each epoch the model "
        "captions other scenes; CIDEr says how much its captions are like the true ones, 0 for not at all.",
    )
    seconds, reused = run_stage(TRAIN, finished=RUN / "model" / "config.json", watch=EpochPrinter())
    report = read_json(str(RUN / "report.json"), remedy=f"delete {RUN} and run the demo again")
    training_seconds = seconds - report["validation_seconds"]
    stages["train"] = stage_figures(
        report["training_images"], training_seconds, earlier.get("train") if reused else None
    )

    explain("5 of 6: caption the test scenes", "The captions are compared with what was drawn.")
    seconds, reused = run_stage(EVALUATE, finished=RESULTS)
    results = read_json(str(RESULTS), remedy="delete it and run the demo again")
    stages["evaluate"] = stage_figures(len(results), seconds, earlier.get("evaluate") if reused else None)

    explain(
        "6 of 6: caption a folder such as people have",
        "Several formats, odd names, folders in folders, and four broken files, for each of which it says why.",
    )
    write_folder(FOLDER, seed=SceneSettings().seed)
    seconds, reused = run_stage(CAPTION, finished=RUN / "captions.jsonl", fine=(0, SOME_FAILED))
    rows = read_lines(RUN / "captions.jsonl")
    stages["caption"] = stage_figures(len(rows), seconds, earlier.get("caption") if reused else None)

    summary: dict[str, Any] = {
        **judge(results),
        "folder": judge_folder(rows),
        "stages": stages,
    }
    write_atomic(str(RUN / "summary.json"), json.dumps(summary, indent=1, allow_nan=False))
    missed = [f"{SCORES[name]}: {summary[name]:.3f}, not {bar}" for name, bar in BARS.items() if summary[name] < bar]
    if missed:
        cli.console.print(f"\nworse than it should be: {'; '.join(missed)}")
    print_summary(summary, seconds=time.monotonic() - started)
    if missed:
        raise SystemExit(1)


# ---- running --------------------------------------------------------------------------------------------------


def explain(title: str, why: str) -> None:
    """Print what the next stage does, and why."""
    cli.console.print(f"\n[bold]{title}[/bold]\n{why}")


def run_stage(
    command: str, *, finished: Path, fine: Sequence[int] = (0,), watch: Callable[[], None] | None = None
) -> tuple[float, bool]:
    """Run a command as a user would; it must end with one of these exit codes. `watch` is called while it runs.

    Returns its wall seconds, and whether `finished` existed before it began. What it prints goes to the log.
    """
    reused = finished.exists()
    cli.console.print(f"$ {command}", style="dim", markup=False)
    words = shlex.split(command)
    programs = {"python": [sys.executable], "accelerate": [str(Path(sys.executable).with_name("accelerate"))]}
    started = time.monotonic()
    with LOG.open("a") as log:
        log.write(f"$ {command}\n")
        log.flush()
        arguments = [*programs[words[0]], *words[1:]]
        with subprocess.Popen(arguments, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if watch and not reused:
                    watch()
    if process.returncode not in fine:
        print(*LOG.read_text(errors="replace").splitlines()[-LOG_LINES:], sep="\n", file=sys.stderr)
        raise UserError(f"the command above ended with exit code {process.returncode}: see its output, also in {LOG}")
    seconds = time.monotonic() - started
    cli.console.print("done by an earlier run" if reused else f"done in {seconds:.0f} s")
    return seconds, reused


class EpochPrinter:
    """Prints a line for each epoch of the training run as it ends."""

    def __init__(self) -> None:
        self._num_printed = 0

    def __call__(self) -> None:
        """Print the epochs that have ended since the last call."""
        rows = [row for row in read_rows(RUN / HISTORY) if "validation/cider" in row]
        for row in rows[self._num_printed :]:
            cli.console.print(f"  epoch {row['epoch']:.0f}: CIDEr {row['validation/cider']:.2f}")
        self._num_printed = len(rows)


def stage_figures(items: int, seconds: float, earlier: dict[str, float] | None) -> dict[str, float]:
    """A stage's row of the table; if this run only reused its result, the row of the run that made it."""
    if earlier is not None:
        return earlier
    return {"items": items, "seconds": round(seconds, 2), "items_per_second": round(items / seconds, 2)}


def count_pictures(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*2026/*.jpg"))


def count_samples() -> int:
    manifests = [read_json(str(SHARDS / f"{split}.manifest.json"), remedy="") for split in ("train", "val")]
    return sum(manifest["totals"]["samples"] for manifest in manifests)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- judging --------------------------------------------------------------------------------------------------

Pairs = Iterable[tuple[str, str]]


def judge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of the test scenes' captions, and of two baselines that do not look at the image."""
    facts = list(read_json(str(TEST_SCENES / "scenes_val.json"), remedy="").values())
    shown = [{(colour, shape) for colour, shape in facts[row["image_id"] - 1]["pairs"]} for row in results]
    captions = [row["caption"] for row in results]
    references_of: dict[int, list[str]] = {row["image_id"]: [] for row in results}
    for annotation in read_json(str(TEST_SCENES / "annotations" / "captions_val2026.json"), remedy="")["annotations"]:
        references_of[annotation["image_id"]].append(annotation["caption"])
    references = list(references_of.values())
    shuffled = random.Random(0).sample(captions, len(captions))
    commonest = [commonest_training_caption()] * len(captions)
    return {
        **score(captions, references, shown),
        "baselines": {
            "commonest training caption": score(commonest, references, shown),
            "shuffled captions": score(shuffled, references, shown),
        },
    }


def score(captions: Sequence[str], references: Sequence[Sequence[str]], shown: Sequence[set]) -> dict[str, float]:
    """Corpus scores of all scenes; correct shapes and pairs of scenes without unseen pairs, and correct pairs of those
    with.
    """
    corpus = References(dict(enumerate(references))).scores(dict(enumerate(captions)))
    seen = [(caption, pairs) for caption, pairs in zip(captions, shown, strict=True) if not pairs & UNSEEN_PAIRS]
    unseen = [(caption, pairs) for caption, pairs in zip(captions, shown, strict=True) if pairs & UNSEEN_PAIRS]
    return {
        "cider": corpus["cider"],
        "bleu4": corpus["bleu4"],
        "right_shape": share_right((named_shapes(text), {shape for _, shape in pairs}) for text, pairs in seen),
        "right_colour": share_right((named_pairs(text), pairs) for text, pairs in seen),
        "two_kinds_right": share_right((named_pairs(text), pairs) for text, pairs in seen if len(pairs) > 1),
        "unseen_pairs_right": share_right((named_pairs(text), pairs) for text, pairs in unseen),
    }


def commonest_training_caption() -> str:
    coco = read_json(str(SCENES / "annotations" / "captions_train2026.json"), remedy="")
    return Counter(annotation["caption"] for annotation in coco["annotations"]).most_common(1)[0][0]


def judge_folder(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check that every file of the captioned folder has its row, and count the results."""
    files = sum(1 for path in FOLDER.rglob("*") if path.is_file())
    errors = Counter(row["error"] for row in rows if "error" in row)
    if files != len(rows):
        raise UserError(f"{FOLDER} holds {files} files, but {RUN / 'captions.jsonl'} has {len(rows)} rows")
    return {"files": files, "captioned": files - errors.total(), "errors": dict(sorted(errors.items()))}


def print_summary(summary: dict[str, Any], *, seconds: float) -> None:
    """Print the scores beside those of a caption that never looks, and where to look."""
    blind = summary["baselines"]["commonest training caption"]
    rows = [(label, f"{summary[key]:.3f}", f"{blind[key]:.3f}") for key, label in SCORES.items()]
    cli.console.print()
    cli.print_table("On the test scenes", ("", "this model", "one caption for all"), rows)
    errors = ", ".join(f"{count} {reason}" for reason, count in summary["folder"]["errors"].items())
    captioned, files = summary["folder"]["captioned"], summary["folder"]["files"]
    cli.console.print(f"In the folder {captioned} of {files} files are captioned; the others: {errors}.")
    cli.console.print(f"{seconds:.0f} s in all. Curves of the training: {(RUN / 'report.html').resolve().as_uri()}")
    gallery = (RUN / "gallery/index.html").resolve().as_uri()
    cli.console.print(f"[bold]Look at the captions beside their pictures: {gallery}[/bold]")


if __name__ == "__main__":
    cli.ignore_closed_output()
    try:
        main()
    except UserError as error:
        cli.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: make demo again reuses what is complete", file=sys.stderr)
        sys.exit(cli.EXIT_INTERRUPTED)
