"""The captioning command's flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from captioner.flags import AnyNumber, Count, File, Fraction, Location, Workers

Several = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Which pictures to caption, with which model, how, and where the captions go."""

    images: tuple[Location, ...] = ()
    """Folders of pictures (with all below them), single files, globs in quotes, or URLs of these."""
    list: tuple[Location, ...] = ()
    """Text files with a path or URL in each line; - is the standard input."""
    shards: tuple[Location, ...] = ()
    """Dataset folders that sharding/make_shards.py wrote, whose pictures are captioned."""
    model: Location = "runs/coco/model"
    """Model folder that train/main.py wrote, or its URL."""
    output: File = Path("captions.jsonl")
    """JSONL file that receives one row for every file; files that have a row already are not captioned again."""
    retry_errors: bool = False
    """Try files again whose row is an error."""
    gallery: File | None = None
    """Folder that receives a page to look at (index.html) with all pictures and captions."""
    sidecar: str | None = None
    """Ending, such as .txt, of files with the caption, written beside the pictures, never over one that is there."""

    beam_size: Count | None = None
    """Beams of the search; 1 is greedy. Without it the model folder's default."""
    length_penalty: AnyNumber | None = None
    """Below 1 the search favours short captions, above 1 long ones. Without it the model folder's default."""
    captions_per_image: Count = 1
    """Different captions for each picture, the best first, in the key captions."""
    abstain_below: Fraction | None = None
    """Leave alt empty and flag the row for review where the confidence is lower than this."""

    batch_size: Count | None = None
    """Pictures that are read and encoded at once. Without it 128 on a GPU, 8 on a CPU."""
    workers: Workers | None = None
    """Processes that read pictures, for each captioning process. Without it one for each of its processors."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers of the encoder; auto is bfloat16 on GPUs that have it, else float32."""
