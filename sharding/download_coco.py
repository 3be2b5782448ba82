"""Download COCO's photos and captions and unpack them, ready for make_shards.py.

    python sharding/download_coco.py                                       # 2014, train and val: 20 GB
    python sharding/download_coco.py --year 2017 --splits val              # 5,000 photos: 0.8 GB, a try-out
    python sharding/download_coco.py --output /big/disk/coco --keep-zips

Leaves OUTPUT/train2014/*.jpg, OUTPUT/val2014/*.jpg and OUTPUT/annotations/captions_{train,val}2014.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioner import cli
from captioner.errors import UserError
from captioner.flags import File
from sharding.download import download, read_json, say, source_path, unzip, write_json

DESCRIPTION = """Download COCO's photos and captions and unpack them for make_shards.py.

2014: 20 GB to download (train 13.5, val 6.6, captions 0.25), 123,287 photos; takes 27 GB of disk while it
works, as each zip is deleted once it is unpacked.
2017: the same photos split otherwise (train 19.3, val 0.8); takes 39 GB of disk while it works.

20 GB last half an hour at 100 Mbit/s, five hours at 10 Mbit/s. Stop it whenever you like: the same command
continues where it stopped and skips what is complete. http_proxy and https_proxy are honoured.
A small start: --year 2017 --splits val (5,000 photos, 1 GB).

Next: python sharding/make_shards.py"""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """One zip of COCO: its path at the server, and which of its members are wanted."""

    path: str
    pattern: str

    @property
    def name(self) -> str:
        """The file name alone."""
        return self.path.rpartition("/")[2]


def archives_of(year: int, splits: Sequence[str]) -> list[Archive]:
    """The zips to fetch, the small one first, so that a wrong address or a blocked network shows at once."""
    annotations = Archive(
        path=f"annotations/annotations_trainval{year}.zip", pattern=f"annotations/captions_*{year}.json"
    )
    photos = [
        Archive(path=f"zips/{split}{year}.zip", pattern=f"{split}{year}/*.jpg") for split in dict.fromkeys(splits)
    ]
    return [annotations, *photos]


def main(settings: DownloadSettings) -> None:
    """Download and unpack every archive that is not complete yet; raises `UserError`."""
    if not settings.base_url.startswith(("http://", "https://")):
        raise UserError(f"--base-url {settings.base_url} is not an http:// or https:// address")
    if not settings.splits:
        raise UserError("--splits is empty: name train, val or both")
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
        for archive in archives_of(settings.year, settings.splits):
            fetch(archive, settings.output, base_url=settings.base_url, keep_zip=settings.keep_zips)
    except OSError as error:
        remedy = "mend that, and the same command continues"
        raise UserError(f"cannot read or write in {settings.output} ({error}): {remedy}") from error
    say("next: python sharding/make_shards.py")


def fetch(archive: Archive, output: Path, *, base_url: str, keep_zip: bool) -> None:
    """Leave the wanted members of `archive` under `output`, and a marker that says they are complete.

    The marker is written last; while it and the files it counts are there, the server is asked for nothing.
    """
    zip_path = output / archive.name
    marker = output / f"{archive.name}.done.json"
    if is_complete(marker, output, archive.pattern):
        left = f" ({zip_path} is no longer needed)" if zip_path.exists() and not keep_zip else ""
        say(f"{archive.name}: complete, skipped{left}")
        return
    source = download(f"{base_url.rstrip('/')}/{archive.path}", zip_path)
    num_members = unzip(zip_path, output, pattern=archive.pattern)
    write_json(marker, {"size": source.size, "num_members": num_members, "etag": source.etag})
    source_path(zip_path).unlink(missing_ok=True)
    if not keep_zip:
        zip_path.unlink()


def is_complete(marker: Path, output: Path, pattern: str) -> bool:
    """Whether `marker` is there and as many files match `pattern` as it counted when it was written."""
    record = read_json(marker)
    if record is None:
        return False
    num_files = sum(1 for _ in output.glob(pattern))
    if num_files < record["num_members"]:
        say(f"{marker}: only {num_files:,} of {record['num_members']:,} files are left, fetching them again")
        return False
    return True


def run() -> None:
    """The command `python sharding/download_coco.py`."""
    cli.run(main, DownloadSettings, description=DESCRIPTION)


if __name__ == "__main__":
    run()
