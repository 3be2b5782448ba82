"""The captioning command's flags."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Which pictures to caption, with which model, and where the captions go."""

    images: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """Folder of pictures, sub-folders included; give the flag again for further folders."""
    model: Path = Path("runs/coco/model")
    """Model folder that train/main.py wrote."""
    output: Path = Path("captions.jsonl")
    """JSONL file that receives one row for every file; files that have a row already are not captioned again."""
    gallery: Path | None = None
    """Folder that receives a page to look at (index.html) with all pictures and captions."""
    batch_size: int = 64
    """Pictures that each process captions at once."""
    beam_size: int | None = None
    """Beams of the search; 1 is greedy. Without it the model folder's default."""
    workers: int = 2
    """Processes that read pictures, for each captioning process; 0 reads in the captioning process."""
