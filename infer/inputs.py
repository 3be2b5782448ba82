"""The files to caption. Imports no torch."""

from collections.abc import Iterator
from itertools import chain

from captioner.errors import UserError
from infer.gallery import check_folder
from infer.listing import ImageFile, Listing
from infer.peers import Peers
from infer.results import own_files
from infer.settings import CaptionSettings
from infer.sidecars import check_ending


def check_flags(settings: CaptionSettings) -> None:
    """Raise UserError if nothing is to be captioned, or for an invalid sidecar or gallery."""
    if not (settings.images or settings.list or settings.shards):
        raise UserError("nothing to caption: give --images with a folder, a file, a glob or a URL")
    if settings.sidecar is not None:
        check_ending(settings.sidecar)
    if settings.gallery is not None:
        check_folder(settings.gallery, images=settings.images)


def open_listing(settings: CaptionSettings, peers: Peers) -> Listing:
    """The listing of this process's files, without those that this command writes."""
    excluded = own_files(settings.output, num_processes=peers.world_size)
    return Listing(
        settings.images,
        lists=settings.list,
        shards=settings.shards,
        excluded=[*excluded, settings.gallery] if settings.gallery else excluded,
        skip_suffixes=[settings.sidecar] if settings.sidecar else [],
        rank=peers.rank,
        world_size=peers.world_size,
    )


def check_files(listing: Listing, settings: CaptionSettings) -> Iterator[ImageFile]:
    """The files of the listing. Raises UserError if there is none in any process, before anything is written."""
    first = next(listing, None)
    if first is None and not listing.num_found:
        looked_at = ", ".join(map(str, (*settings.images, *settings.list, *settings.shards)))
        left_out = "".join(f"; {line}" for line in lines_of_left_out(listing, settings))
        raise UserError(
            f"nothing to caption: there is no file in {looked_at} but those that this command writes{left_out}: "
            "give --images a folder with pictures"
        )
    return chain(() if first is None else (first,), listing)


def lines_of_left_out(listing: Listing, settings: CaptionSettings) -> list[str]:
    """Lines that count what was left out on purpose, by reason."""
    left_out = {
        "links to folders were not followed (name these with --images)": listing.num_linked_folders,
        f"{settings.sidecar} files are no pictures": listing.num_skipped,
        "files were named again": listing.num_repeated,
    }
    return [f"{count:,} {what}" for what, count in left_out.items() if count]
