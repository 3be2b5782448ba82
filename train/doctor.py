"""What limits the loader on your own shards, and how many workers it needs:

    python train/doctor.py --shards data/shards --samples-per-second 2000 --workers 4
    python train/doctor.py --shards audio --transform my_project.data:prepare --collate my_project.data:pad

Some of the shards are read by the loader of training, in this process and with real workers. Start it where you will
train while nothing else runs; it leaves nothing behind.
"""

import json
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory

import torch

from captioner import cli
from captioner.errors import UserError
from captioner.files import storage
from captioner.flags import Count, File, Location, Pixels, Positive, Workers
from captioner.plots import bars
from captioner.streaming.cache import CacheFolderError
from train.data.folders import read_filled_split
from train.data.loader_speed import caption_functions, fetch_some_shards, measure_loader, user_functions
from train.settings import TrainSettings

COLUMNS = ("stage", "µs a sample", "share %", "samples/s a core")
REMEDIES: cli.Remedies = {CacheFolderError: "set TMPDIR to a folder with room on a disk of this machine"}


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What would be trained on, and how fast it should come."""

    shards: tuple[Location, ...] = ("data/shards",)
    """Dataset folders (or URLs) of any samples, as for train/main.py."""
    split: str = "train"
    """Which split."""
    batch_size: Count = 128
    """Samples of a batch of one training process."""
    crop: Pixels = 224
    """Side in pixels of the square that is cut from a captioned image, where no --transform is given."""
    transform: str | None = None
    """Your transform of a sample, MODULE:FUNCTION. Without it that of train/main.py for captioned images."""
    collate: str | None = None
    """Your collate function, MODULE:FUNCTION, with --transform; without it torch's."""
    samples_per_second: Positive = 1000.0
    """What one training process should get."""
    workers: Workers = 2
    """Loader processes to measure with."""
    seconds: Positive = 10.0
    """For the loader with workers; all other measurements together take about as long again."""
    json: File | None = None
    """Write the numbers and the verdict there too, and a plot of the stages beside it (.svg)."""


def main(settings: DoctorSettings) -> None:
    """Measure, then print a table and one line of verdict."""
    split, seconds = read_filled_split(settings.shards, settings.split), settings.seconds
    if settings.json is not None and settings.json.is_dir():
        raise UserError(f"--json {settings.json} is a folder: give the name of a file")
    if settings.collate and not settings.transform:
        raise UserError("--collate takes what your --transform makes: give both, or neither")
    torch.set_num_threads(1)
    with cli.progress_bar("measuring", total=2, unit="parts") as bar, TemporaryDirectory() as cache:
        split, download_mbs = fetch_some_shards(split, cache, seconds=seconds / 2)
        batch_size = min(settings.batch_size, split.num_samples)
        if settings.transform:
            functions = user_functions(settings.transform, settings.collate)
        else:
            functions = caption_functions(
                split, crop=settings.crop, max_tokens=TrainSettings.max_tokens, batch_size=batch_size
            )
        speed = measure_loader(
            split, functions, batch_size=batch_size, workers=settings.workers, seconds=seconds, cache=cache, bar=bar
        )
    verdict = speed.verdict(wanted=settings.samples_per_second)
    cli.print_table(f"{split.name} of {', '.join(split.folders)}", COLUMNS, speed.rows())
    cli.console.print(verdict, markup=False)
    if settings.json:
        content = {
            **asdict(speed),
            "download_mbs": download_mbs,
            "wanted": settings.samples_per_second,
            "verdict": verdict,
        }
        stages = {str(stage): float(str(us)) for stage, us, *_ in speed.rows()}
        plot = bars("Microseconds a sample, stage by stage", stages, note=verdict)
        try:
            storage.write_atomic(str(settings.json), json.dumps(content, indent=1, allow_nan=False))
            if settings.json.suffix != ".svg":
                storage.write_atomic(str(settings.json.with_suffix(".svg")), plot.svg)
        except OSError as error:
            raise UserError(f"cannot write {settings.json} ({error.strerror}): give another --json") from error


def run() -> None:
    """The console entry."""
    cli.run(main, DoctorSettings, description=__doc__ or "", remedies=REMEDIES)


if __name__ == "__main__":
    run()
