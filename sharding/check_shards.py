"""Look after a dataset folder: verify its shards, repair them, show what is in them, or index those of others.

    python sharding/check_shards.py verify data/shards               # exit code 1 when something is broken
    python sharding/check_shards.py repair data/shards               # make only that again, byte for byte
    python sharding/check_shards.py show data/shards --split val     # a summary and one sample
    python sharding/check_shards.py index cc3m --split train         # webdataset tars that another program wrote

DIR is a local folder or a URL. verify reads every byte: checksums, tar members, captions and images against index
and manifest. repair needs the images and captions only where a tar is broken. index writes beside the tars what
train/main.py needs (indexes, vocabulary, manifest), and changes and unpacks none of them.

Exit codes: 0 whole; 1 something is broken or stays broken; 2 an error that you can fix, in one line.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from captioner import cli
from captioner.files.ownership import AlreadyOwnedError
from sharding.checking.foreign_split import index_split
from sharding.checking.repair import repair_split
from sharding.checking.show import show_dataset
from sharding.checking.verify import SplitCheck, check_folder, check_split, find_problems
from sharding.settings import IndexSettings, RepairSettings, ShowSettings, VerifySettings

EXIT_BROKEN = 1


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
    """Run the chosen subcommand."""
    settings = command.settings
    if isinstance(settings, VerifySettings):
        verify(settings)
    elif isinstance(settings, RepairSettings):
        repair(settings)
    elif isinstance(settings, ShowSettings):
        show_dataset(**asdict(settings))
    else:
        index_split(**asdict(settings))


def verify(settings: VerifySettings) -> None:
    """Print what is broken, and leave with exit code 1 if anything is."""
    leave(settings.folder, check_folder(settings.folder, settings.split, doing="verifying"))


def repair(settings: RepairSettings) -> None:
    """Verify, make what is broken again, verify that, and leave with exit code 1 if anything stays broken."""
    folder = settings.folder
    checks = check_folder(folder, settings.split, doing="verifying")
    done: list[tuple[str, str]] = []
    for check in checks:
        total = sum(shard.entry.samples for shard in check.shards if shard.problems)
        with cli.progress_bar(f"repairing {check.split}", total=total, unit="images", quiet=not total) as bar:
            made = repair_split(folder, check, images=settings.images, captions=settings.captions, report=bar.advance)
        if made:
            check_split(folder, check, report=lambda _: None)
        done += made
    if done:
        cli.print_table(f"{folder}: made again, byte for byte", ("file", "how"), done)
    leave(folder, checks)


def leave(folder: str, checks: Sequence[SplitCheck]) -> None:
    """Print that all is whole, or print what is not and leave with exit code 1."""
    if problems := find_problems(folder, checks):
        rows = [(problem.file, problem.what, problem.remedy) for problem in problems]
        cli.print_table(f"{folder}: {len(problems):,} problems", ("file", "what is wrong", "remedy"), rows)
        sys.exit(EXIT_BROKEN)
    shards = [shard.entry for check in checks for shard in check.shards]
    num_samples, splits = sum(shard.samples for shard in shards), ", ".join(check.split for check in checks)
    cli.console.print(f"{folder}: all {num_samples:,} samples in {len(shards):,} shards are whole ({splits})")


def run() -> None:
    """The console entry."""
    cli.run(main, Command, description=__doc__ or "", remedies={AlreadyOwnedError: "wait for it or stop it"})


if __name__ == "__main__":
    run()
