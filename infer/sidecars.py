"""A text file beside each captioned image, a format that training tools read."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from PIL import Image

from captioner.errors import UserError
from captioner.files import storage
from infer.results import Row
from infer.row_index import LocationSet

SHARED = "left out, since another image of the same name has it"
EMPTY = "left out, since all fields of the template are empty"
UNREMARKABLE = frozenset(("written", "kept", "abstained", "not local"))
SHOWN_NAMES = 5  # of each other outcome


def check_suffix(suffix: str) -> None:
    """Raise UserError for a suffix that makes no file name beside the image's."""
    if not suffix.startswith(".") or suffix == "." or "/" in suffix or suffix.lower() in Image.registered_extensions():
        raise UserError(f"{suffix!r} is no suffix of sidecar files: give one such as .txt")


@dataclass(kw_only=True)
class Sidecars:
    """Counts of sidecars by outcome; `num_failed` could not be written.

    `names` has the first images of each outcome that the user should know about.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    num_failed: int = 0

    def lines(self) -> Iterator[str]:
        """A line for each outcome."""
        for outcome, count in self.counts.most_common():
            names = self.names.get(outcome, [])
            shown = f": {', '.join(map(repr, names))}{', ...' if count > len(names) else ''}" if names else ""
            yield f"sidecars: {count:,} {outcome}{shown}"


def write_sidecars(rows: Iterable[Row], *, suffix: str, text: Callable[[Row], str] | None = None) -> Sidecars:
    """Write `photo.txt` with the `text` (by default the caption) beside each captioned `photo.jpg`, none for failures.

    A file or link that has the name is kept. Of images with the same name but for its suffix, which would have the
    same sidecar, the first one gets it. A sidecar is whole or absent.
    """
    sidecars, seen = Sidecars(), LocationSet()
    for row in rows:
        if "error" in row:
            continue
        try:
            outcome = _write_sidecar(row, suffix, text or itemgetter("caption"), seen)
        except FileExistsError:
            outcome = "kept"
        except NotADirectoryError:  # the tar that holds the image
            outcome = "not local"
        except OSError as error:
            outcome = f"could not be written ({error.strerror or error})"
            sidecars.num_failed += 1
        sidecars.counts[outcome] += 1
        if outcome not in UNREMARKABLE:
            names = sidecars.names.setdefault(outcome, [])
            names += [storage.join(row["root"], row["path"])][: SHOWN_NAMES - len(names)]
    return sidecars


def _write_sidecar(row: Row, suffix: str, text: Callable[[Row], str], seen: LocationSet) -> str:
    """Write a row's sidecar; returns the outcome. `seen` has earlier rows' images and sidecars. Raises OSError."""
    if not row["alt"]:
        return "abstained"
    if storage.is_remote(row["root"]):
        return "not local"
    image = Path(os.path.abspath(Path(row["root"], row["path"])))  # noqa: PTH100 - a link is a name of its own
    target = image.with_suffix(suffix)
    if not seen.add(str(image)):  # by another root
        return "kept"
    if not seen.add(str(target)):
        return SHARED
    content = text(row)
    if not content:
        return EMPTY
    storage.write_new(str(target), content + "\n")
    return "written"
