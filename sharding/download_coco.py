"""Download COCO's photos and captions and unpack them, ready for make_shards.py.

    python sharding/download_coco.py                                       # 2014, train and val: 20 GB
    python sharding/download_coco.py --year 2017 --splits val              # 5,000 photos: 0.8 GB, a try-out
    python sharding/download_coco.py --output /big/disk/coco --keep-zips

Leaves OUTPUT/train2014/*.jpg, OUTPUT/val2014/*.jpg and OUTPUT/annotations/captions_{train,val}2014.json.

2014: 20 GB to download (train 13.5, val 6.6, captions 0.25), 123,287 photos; needs 27 GB of disk, as each zip is
deleted once it is unpacked. 2017: the same photos split otherwise (train 19.3, val 0.8); needs 39 GB of disk.
20 GB take half an hour at 100 Mbit/s. Stop it whenever you like: the same command continues where it stopped and
skips what is complete. http_proxy and https_proxy are honoured.

Next: python sharding/make_shards.py
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioner import cli
from captioner.errors import UserError
from captioner.files.storage import write_atomic
from captioner.flags import File
from sharding.download import download, say, unzip


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadSettings:
    """What to download and where to."""

    output: File = Path("data/coco")
    """Folder for train2014/*.jpg, val2014/*.jpg and annotations/captions_*.json; made if it is not there."""
    year: Literal[2014, 2017] = 2014
    """Edition of the data set; 2014 is the book's and that of the Karpathy split."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Photos to download. The captions of both splits always come: they are one small zip."""
    base_url: str = "http://images.cocodataset.org"
    """Server, or a mirror of it with the same zips/ and annotations/ below it."""
    keep_zips: bool = False
    """Keep each zip after it is unpacked (20 GB more)."""


def main(settings: DownloadSettings) -> None:
    """Download and unpack every archive that is not complete yet. Raises UserError."""
    if not settings.base_url.startswith(("http://", "https://")):
        raise UserError(f"--base-url {settings.base_url} is not an http:// or https:// address")
    if not settings.splits:
        raise UserError("--splits is empty: name train, val or both")
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
        for path, pattern in archives_of(settings.year, settings.splits):
            fetch(f"{settings.base_url.rstrip('/')}/{path}", settings.output, pattern, keep_zip=settings.keep_zips)
    except OSError as error:
        remedy = "fix that, and the same command continues"
        raise UserError(f"cannot read or write in {settings.output} ({error}): {remedy}") from error
    say("next: python sharding/make_shards.py")


def archives_of(year: int, splits: Sequence[str]) -> list[tuple[str, str]]:
    """The zips' paths at the server and the members to unpack, the small one first: a wrong address shows at once."""
    annotations = (f"annotations/annotations_trainval{year}.zip", f"annotations/captions_*{year}.json")
    return [annotations, *((f"zips/{split}{year}.zip", f"{split}{year}/*.jpg") for split in dict.fromkeys(splits))]


def fetch(url: str, output: Path, pattern: str, *, keep_zip: bool) -> None:
    """Leave the members of a zip that match `pattern` under `output`, and a marker that says they are complete.

    The marker is written last; while it and the files it counts are there, the server is asked for nothing.
    """
    archive = output / url.rpartition("/")[2]
    marker = output / f"{archive.name}.done.json"
    if is_complete(marker, output, pattern):
        say(f"{archive.name}: complete, skipped")
        return
    download(url, archive)
    record = {"format_version": 1, "num_members": unzip(archive, output, pattern=pattern)}
    write_atomic(str(marker), json.dumps(record) + "\n")
    if not keep_zip:
        archive.unlink()


def is_complete(marker: Path, output: Path, pattern: str) -> bool:
    """Whether `marker` is there and as many files match `pattern` as it counted when it was written."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return len(list(output.glob(pattern))) >= json.loads(marker.read_bytes())["num_members"]
    return False


def run() -> None:
    """The console entry."""
    cli.run(main, DownloadSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
