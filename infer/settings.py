"""The captioning command's flags, and the files that they name. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import tyro

from captioner.errors import UserError
from captioner.flags import AnyNumber, Count, File, Fraction, Location, Workers
from infer.gallery import check_folder
from infer.listing import ImageFile, Listing
from infer.metadata.described import XMP
from infer.metadata.exiftool import check_exiftool
from infer.metadata.xmp import Existing
from infer.peers import Peers
from infer.results import own_files
from infer.sidecars import check_suffix

Several = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """The images to caption, the model, how, and where the captions go."""

    images: tuple[Location, ...] = ()
    """Folders of images (with all subfolders), single files, globs in quotes, or URLs of these."""
    list: tuple[Location, ...] = ()
    """Text files with a path or URL on each line; - is the standard input."""
    shards: tuple[Location, ...] = ()
    """Dataset folders that sharding/make_shards.py wrote, whose images are captioned."""
    model: Location = "runs/coco/model"
    """Model folder that train/main.py wrote, or its URL."""
    output: File = Path("captions.jsonl")
    """JSONL file for one row per file; files that have a row already are not captioned again."""
    retry_errors: bool = False
    """Retry files whose row is an error."""
    gallery: File | None = None
    """Folder for a page (index.html) that shows all images and captions."""
    attention: bool = False
    """For each word of the caption, where in the image the model looked: in the key attention, and in the gallery."""
    sidecar: str | None = None
    """Suffix of files with the caption beside the images: .xmp for photo programs, or .txt (or another) for text."""
    embed: bool = False
    """Write the captions into the images' own XMP metadata, through exiftool; pixels and dates stay."""
    existing: Existing = "keep"
    """What happens to a person's text in a sidecar or an image: keep it, write after or before it, or overwrite it."""
    missing_only: bool = False
    """Caption no file that has a description, in a sidecar (.txt, .xmp, and that of --sidecar) or its own metadata."""
    dry_run: bool = False
    """Caption and write nothing: count what would be captioned, and measure how long that would take."""

    beam_size: Count | None = None
    """Beam size; 1 is greedy. The default is the model folder's."""
    length_penalty: AnyNumber | None = None
    """Below 1 the search favours short captions, above 1 long ones. The default is the model folder's."""
    captions_per_image: Count = 1
    """Different captions for each image, the best first, in the key captions."""
    abstain_below: Fraction | None = None
    """Leave alt empty and flag the row for review if the confidence is lower than this."""

    batch_size: Count | None = None
    """Images that are read and encoded together. The default is 128 on a GPU, 8 on a CPU."""
    workers: Workers | None = None
    """Processes that read images, for each captioning process. The default is one per processor."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder; auto is bfloat16 on GPUs that have it, else float32."""


def check_flags(settings: CaptionSettings) -> None:
    """Raise UserError if nothing is to be captioned, for an invalid sidecar or gallery, or without exiftool."""
    if not (settings.images or settings.list or settings.shards):
        raise UserError("nothing to caption: give --images with a folder, a file, a glob or a URL")
    if settings.sidecar is not None:
        check_suffix(settings.sidecar)
    if settings.embed:
        check_exiftool()
    if settings.existing != "keep" and not (settings.sidecar or settings.embed):
        raise UserError("--existing is about sidecars and images: give --sidecar or --embed too")
    if settings.gallery is not None:
        check_folder(settings.gallery, images=settings.images)


def sidecar_suffixes(settings: CaptionSettings) -> tuple[str, ...]:
    """The suffixes of the sidecars in which a description counts."""
    own = () if settings.sidecar is None else (settings.sidecar,)
    return tuple(dict.fromkeys((*own, ".txt", XMP)))


def skipped_suffixes(settings: CaptionSettings) -> tuple[str, ...]:
    """The suffixes of files that are not captioned, because the command writes such sidecars, or looks into them."""
    if settings.missing_only:
        return sidecar_suffixes(settings)
    own = () if settings.sidecar is None else (settings.sidecar,)
    return tuple(dict.fromkeys((*own, XMP))) if own or settings.embed else ()


def open_listing(settings: CaptionSettings, peers: Peers) -> Listing:
    """The listing of this process's files, without those that this command writes."""
    excluded = own_files(settings.output, num_processes=peers.world_size)
    return Listing(
        settings.images,
        lists=settings.list,
        shards=settings.shards,
        excluded=[*excluded, settings.gallery] if settings.gallery else excluded,
        skip_suffixes=skipped_suffixes(settings),
        rank=peers.rank,
        world_size=peers.world_size,
    )


def check_files(listing: Listing, settings: CaptionSettings) -> Iterator[ImageFile]:
    """The files of the listing. Raises UserError if there is none in any process, before anything is written."""
    first = next(listing, None)
    if first is None and not listing.num_found:
        sources = ", ".join((*settings.images, *settings.list, *settings.shards))
        raise UserError(
            f"nothing to caption: there is no file in {sources} but those that this command writes"
            f"{''.join(f'; {line}' for line in listing.lines_of_left_out())}: give --images a folder with images"
        )
    return chain(() if first is None else (first,), listing)
