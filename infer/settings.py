"""The captioning command's flags, and the files that they name. Imports no torch."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from captioner.errors import UserError
from captioner.files import storage
from captioner.files.tables import DELIMITERS
from captioner.flags import AnyNumber, Count, File, Fraction, Location, Workers
from infer.gallery import Source, check_corrections, check_folder, read_corrections
from infer.listing import ImageFile, Listing
from infer.metadata.described import XMP
from infer.metadata.exiftool import check_exiftool
from infer.metadata.xmp import Existing
from infer.peers import Peers
from infer.results import Row, own_files
from infer.sidecars import check_suffix
from infer.tables import Excel, check_table, check_unedited, edited_path, is_own
from infer.templates import Template
from infer.written import Written

DEFAULT_OUTPUT = Path("captions.jsonl")
STANDARD_OUTPUT = Path("-")


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
    """Model folder that train/main.py wrote, ONNX folder that infer/export.py wrote (without torch), or its URL."""
    output: File = DEFAULT_OUTPUT
    """JSONL file for one row per file; files that have a row already are not captioned again. - is the standard output.
    Without it the captions of up to ten files that --images names one by one are printed only."""
    retry_errors: bool = False
    """Retry files whose row is an error."""
    watch: bool = False
    """Then go on: caption files that arrive in the folders or are replaced, until SIGTERM or Ctrl-C."""
    gallery: File | None = None
    """Folder for a page (index.html) that shows all images and captions. What persons wrote in it is kept."""
    open: bool = False
    """Open that page in the browser; without --gallery it is beside the output."""
    corrections: File | None = None
    """What a person wrote: a gallery's downloaded file, or another table than that of --csv, whose texts always count.
    It goes into all that is written beside the rows."""
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
    csv: File | None = None
    """Table (.csv, or .tsv with tabs) of all rows, to correct in a spreadsheet: the next run takes what was changed.
    make_shards.py reads its columns image and caption."""
    csv_excel: Excel | None = None
    """Write the table for Excel: with a byte order mark, and separated as the region of the computer wants it."""
    coco_results: File | None = None
    """COCO results file (.json) of the captions, as train/evaluate.py --results reads it."""

    template: str | None = None
    """Text for sidecars, images and tables, such as "{alt} {folder}, {date}"; unknown fields are refused."""
    prefix: str = ""
    """Put before each text, as it is: with a space if you want one."""
    suffix: str = ""
    """Put behind each text."""
    max_length: Count | None = None
    """Characters of a text, prefix and suffix included; it is cut behind a whole word."""

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
    elif settings.corrections is not None and not (settings.csv or settings.sidecar or settings.embed):
        raise UserError(
            "--corrections is about what is written beside the rows: give --gallery, --csv, --sidecar or --embed too"
        )
    if settings.corrections is not None:
        check_corrections(settings.corrections)
    find_text(settings)
    _check_tables(settings)


def _check_tables(settings: CaptionSettings) -> None:
    if settings.csv is not None:
        check_table(settings.csv, "--csv", DELIMITERS)
    elif settings.csv_excel is not None:
        raise UserError("--csv-excel is about a table: give --csv too")
    if settings.coco_results is not None:
        check_table(settings.coco_results, "--coco-results", [".json"])
    own = set(map(os.path.realpath, own_files(settings.output, num_processes=1)))
    for table in (settings.csv, settings.coco_results):
        if table is not None and os.path.realpath(table) in own:
            raise UserError(f"{table} is a file of the rows already: give the table another name")
    with closing(Written(Path(os.path.realpath(settings.output)))) as written:
        sources, taken = find_sources(settings, written)
        if settings.csv is not None:
            check_unedited(settings.csv, written, taken=taken)
        if settings.coco_results is not None:
            check_unedited(settings.coco_results, written)
    read_corrections(settings.gallery, sources)


def find_sources(settings: CaptionSettings, written: Written) -> tuple[list[Source], str]:
    """The files of corrections: --corrections, and the table of an earlier run; and the checksum of that table.

    Raises OSError.
    """
    sources, taken, table, file = [], "", settings.csv, settings.corrections
    is_one_file = table is not None and file is not None and os.path.realpath(table) == os.path.realpath(file)
    if table is not None and table.exists() and (is_one_file or is_own(table, written)):
        taken = storage.file_sha256(table)  # before it is read: what is saved later is not taken
        sources.append(Source(table, taken))
    if file is not None and not is_one_file:
        entry, now = written.get(Path(os.path.realpath(file))), storage.file_sha256(file)
        sources.append(Source(file, now, is_known=entry is not None and entry.text == now))
    return sources, taken


def find_text(settings: CaptionSettings) -> Callable[[Row], str] | None:
    """What makes the text for a row; None if no flag asks for another text than the caption. Raises UserError."""
    template = settings.template
    if template is None and not (settings.prefix or settings.suffix or settings.max_length):
        return None
    template = "{caption}" if template is None else template
    return Template(template, prefix=settings.prefix, suffix=settings.suffix, max_length=settings.max_length).text


def absolute(settings: CaptionSettings) -> CaptionSettings:
    """The settings with absolute paths of what is written beside the rows."""
    names = ("output", "gallery", "corrections", "csv", "coco_results")
    paths = {name: getattr(settings, name) for name in names}
    return replace(settings, **{name: path.absolute() for name, path in paths.items() if path is not None})


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
    excluded += [path for path in (settings.gallery, settings.csv, settings.coco_results) if path]
    excluded += [edited_path(settings.csv)] if settings.csv else []
    return Listing(
        settings.images,
        lists=settings.list,
        shards=settings.shards,
        excluded=excluded,
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
