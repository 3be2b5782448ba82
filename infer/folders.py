"""Which files there are to caption: every file below the given folders, in a fixed order."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner.cli import UserError


@dataclass(frozen=True, order=True, slots=True)
class ImageFile:
    """A file: the folder it was found through, and its path below that with `/` between the parts."""

    root: str
    path: str

    @property
    def location(self) -> Path:
        """Where the file lies."""
        return Path(self.root, self.path)


def list_files(folders: Sequence[Path], *, excluded: Sequence[Path] = ()) -> list[ImageFile]:
    """Every regular file below the folders, sorted, without those in `excluded` files and folders.

    Links to files count as files; links to folders are not followed, since they may lead round in a circle.
    Raises UserError when a folder is not there or cannot be listed.
    """
    left_out = {path.resolve() for path in excluded}
    found: dict[ImageFile, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no picture folder {folder}: give --images a folder")
        for parent, folder_names, file_names in os.walk(folder, onerror=_refuse):
            here = Path(parent)
            folder_names[:] = sorted(name for name in folder_names if (here / name).resolve() not in left_out)
            for name in file_names:
                path = here / name
                if path.is_file() and path.resolve() not in left_out:
                    found[ImageFile(str(folder), path.relative_to(folder).as_posix())] = None
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename} ({error.strerror}): make it readable, or name other folders")
