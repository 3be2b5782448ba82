"""A text file beside each captioned picture, as tools that read training data want it."""

import errno
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from PIL import Image

from captioner import storage
from captioner.cli import UserError
from infer.results import Row

NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


def check_ending(ending: str) -> None:
    """Raise UserError for an ending that makes no file name beside the picture's."""
    if not ending.startswith(".") or ending == "." or "/" in ending or ending.lower() in Image.registered_extensions():
        raise UserError(f"{ending!r} is no ending of sidecar files: give one such as .txt")


def write_sidecars(rows: Iterable[Row], *, ending: str) -> Counter[str]:
    """Write `photo.txt` with the caption beside each captioned `photo.jpg`; the number of rows by what became of them.

    A file or link that has the name is kept. A sidecar is whole or absent. Counted are "written", "kept", "abstained"
    (no alt text), "not local" (behind a URL or in a shard) and "failed" (a folder that takes no file); rows of failures
    are not. Raises UserError for an impossible ending.
    """
    check_ending(ending)
    return Counter(_write_sidecar(row, ending) for row in rows if "error" not in row)


def _write_sidecar(row: Row, ending: str) -> str:
    if not row["alt"]:
        return "abstained"
    if storage.is_remote(row["root"]):
        return "not local"
    target = Path(row["root"], row["path"]).with_suffix(ending)
    try:
        _write_new(target, row["caption"].encode("utf-8") + b"\n")
    except FileExistsError:
        return "kept"
    except NotADirectoryError:  # the tar that holds the picture
        return "not local"
    except OSError:
        return "failed"
    return "written"


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there, whole or not at all. Raises OSError, FileExistsError when it is there."""
    if os.path.lexists(path):
        raise FileExistsError(path)
    partial = path.with_name(f".{uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, path)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            with path.open("xb") as file:  # as on memory cards; not whole when killed right here
                file.write(content)
    finally:
        partial.unlink(missing_ok=True)
