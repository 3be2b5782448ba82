"""Look after a dataset folder: verify its shards, repair them, show what is in them, or index those of others.

    python sharding/check_shards.py verify data/shards               # exit code 1 when something is broken
    python sharding/check_shards.py repair data/shards               # rebuild only that, byte for byte
    python sharding/check_shards.py show data/shards --split val     # a summary and one sample
    python sharding/check_shards.py index cc3m --split train         # webdataset tars that another program wrote

DIR is a local folder or a URL. verify reads every byte: checksums, tar members, captions and pictures against index
and manifest. repair needs the pictures and captions only where a tar is broken. index writes beside the tars what
train/main.py needs (indexes, vocabulary, manifest), and changes and unpacks none of them.

Exit codes: 0 whole; 1 something is broken or stays broken; 2 something to mend, told in one line.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from captioner import cli
from captioner.files.ownership import AlreadyOwnedError
from captioner.flags import Count, Location, Pixels
from captioner.shards.indexing import is_any
from sharding.checking.foreign_split import Samples, index_split
from sharding.checking.repair import SourceFlags, repair_split
from sharding.checking.show import show_dataset
from sharding.checking.verify import (
    SplitCheck,
    as_rows,
    check_split,
    check_vocabulary,
    find_splits,
    open_manifest,
)
from sharding.checking.verify_shard import Problem
from sharding.settings import Split

EXIT_BROKEN = 1


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Read every byte of the shards and compare all that their files say of each other."""

    folder: Annotated[tyro.conf.Positional[Location], tyro.conf.arg(metavar="DIR")]
    """Dataset folder (or URL)."""
    split: Split | None = None
    """Look at this split only."""


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """Find what is broken and rebuild only that, to the same bytes: indexes from tars, tars from their pictures."""

    folder: Annotated[tyro.conf.Positional[Location], tyro.conf.arg(metavar="DIR")]
    """Dataset folder (or URL)."""
    split: Split | None = None
    """Look at this split only."""
    images: Location | None = None
    """Where the pictures are now, if not where they were when they were packed."""
    captions: Location | None = None
    """Where the captions are now: a file, or a folder as make_shards.py takes it."""


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """Print what the shards hold, how they were made, and one sample."""

    folder: Annotated[tyro.conf.Positional[Location], tyro.conf.arg(metavar="DIR")]
    """Dataset folder (or URL)."""
    split: Split | None = None
    """Look at this split only."""
    key: str | None = None
    """The sample to show; without it the first."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Make webdataset tars of another program trainable: an index beside each, a manifest and, of captions, a
    vocabulary."""

    folder: Annotated[tyro.conf.Positional[Location], tyro.conf.arg(metavar="DIR")]
    """Folder (or URL) that holds the tars and receives the other files."""
    split: Split
    """What the tars are for."""
    samples: Samples = "captioned-pictures"
    """What they hold: pictures with captions, as train/main.py reads them, or any fields, for captioner.streaming."""
    pattern: str | None = None
    """Which files, such as "cc3m-train-*.tar"; without it SPLIT*.tar where there are any, else *.tar."""
    threshold: Count | None = None
    """A word enters the vocabulary when the captions hold it at least this often (train, or where there is none).
    Without it 4, or on small data the highest lower value at which the vocabulary covers 90 % of all words in them."""
    size: Pixels = 256
    """Sides in pixels that pictures are squashed to when training reads them."""


CheckSettings = VerifySettings | RepairSettings | ShowSettings | IndexSettings


@tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True, kw_only=True)
class Command:
    """One of verify, repair, show, index."""

    settings: (
        Annotated[VerifySettings, tyro.conf.subcommand("verify")]
        | Annotated[RepairSettings, tyro.conf.subcommand("repair")]
        | Annotated[ShowSettings, tyro.conf.subcommand("show")]
        | Annotated[IndexSettings, tyro.conf.subcommand("index")]
    )


def main(command: Command) -> None:
    """Do what was asked for."""
    settings = command.settings
    if isinstance(settings, VerifySettings):
        verify(settings)
    elif isinstance(settings, RepairSettings):
        repair(settings)
    elif isinstance(settings, ShowSettings):
        show_dataset(settings.folder, split=settings.split, key=settings.key)
    else:
        index_split(
            settings.folder,
            split=settings.split,
            samples=settings.samples,
            pattern=settings.pattern,
            threshold=settings.threshold,
            size=settings.size,
        )


def verify(settings: VerifySettings) -> None:
    """Print what is broken, and leave with exit code 1 if anything is."""
    checks, vocabulary = check_folder(settings.folder, settings.split, doing="verifying")
    problems = [problem for check in checks for problem in check.all_problems]
    if vocabulary:
        problems.append(vocabulary)
    leave(settings.folder, checks, problems)


def repair(settings: RepairSettings) -> None:
    """Rebuild what is broken, print what was done, and leave with exit code 1 if anything stays broken."""
    checks, vocabulary = check_folder(settings.folder, settings.split, doing="looking")
    source = SourceFlags(images=settings.images, captions=settings.captions)
    left: list[Problem] = []
    done: list[tuple[str, str]] = []
    for check in checks:
        total = sum(shard.entry.samples for shard in check.shards if shard.has("tar"))
        with cli.progress_bar(f"repairing {check.split}", total=total, unit="images", quiet=not total) as bar:
            repairs = repair_split(settings.folder, check, source, report=bar.advance)
        done += repairs.done
        left += repairs.left
    if vocabulary:
        left.append(vocabulary)
    if done:
        cli.print_table(f"{settings.folder}: made anew, byte for byte", ("file", "how"), done)
    leave(settings.folder, checks, left)


def check_folder(folder: str, split: str | None, *, doing: str) -> tuple[list[SplitCheck], Problem | None]:
    """Check the splits under one progress bar; the vocabulary's problem comes apart, since it is of no split."""
    wanted, names = find_splits(folder, split)
    checks = [open_manifest(folder, name, names) for name in wanted]
    total = sum(check.manifest.num_samples for check in checks if check.manifest)
    with cli.progress_bar(f"{doing} {folder}", total=total, unit="images") as bar:
        for check in checks:
            check_split(folder, check, bar)
    captioned = [check for check in checks if check.manifest is None or not is_any(check.manifest)]
    train = next((check for check in captioned if check.split == "train"), None)
    return checks, check_vocabulary(folder, train) if captioned else None


def leave(folder: str, checks: Sequence[SplitCheck], problems: Sequence[Problem]) -> None:
    """Say that all is whole, or print what is not and leave with exit code 1."""
    if problems:
        cli.print_table(f"{folder}: {len(problems):,} problems", ("file", "what is wrong", "remedy"), as_rows(problems))
        sys.exit(EXIT_BROKEN)
    num_samples = sum(shard.entry.samples for check in checks for shard in check.shards)
    num_shards = sum(len(check.shards) for check in checks)
    splits = ", ".join(check.split for check in checks)
    cli.console.print(f"{folder}: all {num_samples:,} samples in {num_shards:,} shards are whole ({splits})")


def run() -> None:
    """The console entry."""
    cli.run(main, Command, description=__doc__ or "", remedies={AlreadyOwnedError: "wait for it or stop it"})


if __name__ == "__main__":
    run()
