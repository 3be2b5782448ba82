"""A text file beside each captioned picture, a format that training tools read."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from captioner.errors import UserError
from captioner.files import storage
from infer.results import Row
from infer.row_index import Seen

SHARED = "left out, since another picture of the same name has it"
UNREMARKABLE = frozenset(("written", "kept", "abstained", "not local"))
SHOWN_NAMES = 5  # of each other outcome


def check_ending(ending: str) -> None:
    """Raise UserError for an ending that makes no file name beside the picture's."""
    if not ending.startswith(".") or ending == "." or "/" in ending or ending.lower() in Image.registered_extensions():
        raise UserError(f"{ending!r} is no ending of sidecar files: give one such as .txt")


@dataclass(kw_only=True)
class Sidecars:
    """Counts of sidecars by outcome; `num_failed` could not be written.

    `names` has the first pictures of each outcome that the user should know about.
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


def write_sidecars(rows: Iterable[Row], *, ending: str) -> Sidecars:
    """Write `photo.txt` with the caption beside each captioned `photo.jpg`; failures have no sidecar.

    A file or link that has the name is kept. Of pictures with the same name but for its ending, which would have the
    same sidecar, the first one gets it. A sidecar is whole or absent. Raises UserError for an impossible ending.
    """
    check_ending(ending)
    sidecars, seen = Sidecars(), Seen()
    for row in rows:
        if "error" in row:
            continue
        try:
            outcome = _write_sidecar(row, ending, seen)
        except FileExistsError:
            outcome = "kept"
        except NotADirectoryError:  # the tar that holds the picture
            outcome = "not local"
        except OSError as error:
            outcome = f"could not be written ({error.strerror or error})"
            sidecars.num_failed += 1
        sidecars.counts[outcome] += 1
        if outcome not in UNREMARKABLE:
            names = sidecars.names.setdefault(outcome, [])
            names += [storage.join(row["root"], row["path"])][: SHOWN_NAMES - len(names)]
    return sidecars


def _write_sidecar(row: Row, ending: str, seen: Seen) -> str:
    """Write a row's sidecar; returns the outcome. `seen` has earlier rows' pictures and sidecars. Raises OSError."""
    if not row["alt"]:
        return "abstained"
    if storage.is_remote(row["root"]):
        return "not local"
    picture = Path(os.path.abspath(Path(row["root"], row["path"])))  # noqa: PTH100 - a link is a name of its own
    target = picture.with_suffix(ending)
    if not seen.add(str(picture)):  # by another root
        return "kept"
    if not seen.add(str(target)):
        return SHARED
    storage.write_new(str(target), row["caption"] + "\n")
    return "written"
