"""Lists the files to caption, from folders, globs, URLs, lists and shards, while they are being captioned.

On disk and S3 it holds only the names of folders not yet read in memory; other stores list a whole folder at once. With
a list, or several sources, a temporary SQLite database finds files that are named twice.
"""

import codecs
import errno
import os
import pickle
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from io import BytesIO, FileIO
from itertools import chain
from pathlib import Path
from tempfile import mkstemp
from threading import Semaphore, Thread
from typing import BinaryIO, Literal

from captioner.errors import UserError
from captioner.files import storage
from captioner.images.loading import ImageError
from captioner.samples import image_spans
from captioner.shards.format import Manifest, ShardIndex, complete_splits, read_manifest
from infer.results import PARTIAL_SUFFIX, write_all
from infer.row_index import LocationSet, hash_location, real_root

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
WILDCARDS = frozenset("*?[")
MAX_DEPTH = 32  # folders on a server: some follow links in loops

Pattern = tuple[str, ...]  # a glob, split at /
EVERYTHING: frozenset[Pattern] = frozenset({("**",)})
Kind = Literal["file", "folder", "linked file", "linked folder"]


@dataclass(frozen=True, order=True, slots=True)
class ImageFile:
    """A file, or a byte range of a tar: the folder from which it was found (`root`), and its path below that.

    `path` has `/` between its parts, and bytes that are not UTF-8 as `\\udcXX`; URLs stay percent-encoded. An image in
    a shard has the path `train-000000.tar/KEY.jpg`, and is `size` bytes at byte `start` of the tar. An entry with an
    `error` is that of a folder that cannot be listed, or of a shard whose index cannot be read.
    """

    root: str
    path: str
    start: int = 0
    size: int | None = None
    error: ImageError | None = field(default=None, compare=False)

    @property
    def location(self) -> str:
        """The file's path or URL."""
        return _join(self.root, self.path)

    def read(self, *, max_bytes: int) -> bytes:
        """The file's content.

        Raises ImageError: missing, unreadable, special file (never opened in a way that blocks), or too large.
        """
        if self.error is not None:
            raise self.error
        try:
            if self.size is not None:
                _check_size(self.size, max_bytes)
                tar = _join(self.root, f"{self.path.partition('.tar/')[0]}.tar")
                return storage.read_range(tar, start=self.start, end=self.start + self.size)[: self.size]
            if not storage.is_remote(self.root):
                _check_regular(self.location, max_bytes)
                return storage.read_bytes(self.location)
            data = storage.read_bytes(self.location, end=max_bytes + 1)
            _check_size(len(data), max_bytes)
            return data
        except (OSError, ValueError) as error:
            raise _image_error(error) from error

    def open(self, *, max_bytes: int) -> BinaryIO:
        """The file, open for reading: what is on disk is read only as far as needed. Raises ImageError as `read`."""
        if self.error is not None or self.size is not None or storage.is_remote(self.root):
            return BytesIO(self.read(max_bytes=max_bytes))
        try:
            _check_regular(self.location, max_bytes)
            return Path(self.location).open("rb")
        except (OSError, ValueError) as error:
            raise _image_error(error) from error


def _check_regular(location: str, max_bytes: int) -> None:
    status = os.stat(location)  # noqa: PTH116 - a Path takes longer, and changes names
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("special file", "it is a folder, pipe, socket or device, no regular file")
    _check_size(status.st_size, max_bytes)


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ImageError("too large", f"{num_bytes:,} bytes or more, {max_bytes:,} are allowed: shrink it")


def _image_error(error: Exception) -> ImageError:
    """The error of a file or folder that cannot be read; a ValueError means a name that no file can have."""
    missing = isinstance(error, FileNotFoundError | ValueError) or getattr(error, "errno", None) in MISSING
    message = getattr(error, "strerror", None) or str(error)
    return ImageError("missing" if missing else "unreadable", " ".join(message.split()))


def locate(root: str, path: str) -> ImageFile:
    """The file of a row. The range of an image in a shard is read from the shard's index."""
    tar, _, name = path.partition(".tar/")
    spans: dict[str, tuple[int, int]] = {}
    if name:
        with suppress(OSError, UserError):  # the name of a folder may end in `.tar` too
            spans = _read_spans(root, tar)
    start, size = spans.get(name, (0, None))
    return ImageFile(root, path, start, size)


class Listing(Iterator[ImageFile]):
    """Iterates over this process's files, each once, in the order in which they are found.

    `images` are files, globs, and folders with everything below them, on disk or behind URLs. A glob's `**` matches any
    number of folders, its `*` also names that begin with a dot; a matching folder counts with everything below it.
    `lists` are text files with one path or URL per line; `-` is standard input. `shards` are dataset folders.
    `excluded` files and folders are left out, and names with one of `skip_suffixes`, also in capitals. Links to files
    are files; links to folders are counted but not followed, because they may form loops.

    A file that several sources name belongs to the first one. To compare names only roots are resolved: with `..` in a
    list, or links below a root, a file has several names. A hash of root and path, as given, decides which process
    captions a file, so that none is lost or repeated if the processes' listings differ.

    `num_found` (files to caption) and `left_out` (by reason) count the files of all processes, and grow during
    iteration. Raises UserError for a source that does not exist or matches nothing, and OSError if it cannot be read.
    """

    def __init__(
        self,
        images: Sequence[str],
        *,
        lists: Sequence[str] = (),
        shards: Sequence[str] = (),
        excluded: Sequence[Path] = (),
        skip_suffixes: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if "" in (*images, *lists, *shards):
            raise UserError("an empty name in --images, --list or --shards: the current folder is .")
        self._excluded = {os.path.realpath(path) for path in excluded}
        self._skip_suffixes = tuple(skip_suffixes)
        self._real_root = lru_cache(maxsize=1024)(real_root)
        self._rank, self._world_size = rank, world_size
        self.num_found = 0
        self.left_out: Counter[str] = Counter()
        self._roots = roots = list(dict.fromkeys(map(_find_root, images)))
        folders = dict.fromkeys(map(_without_slash, shards))
        splits = [(folder, manifest) for folder in folders for manifest in _read_manifests(folder)]
        open_lists = [_open_list(name, world_size=world_size) for name in dict.fromkeys(lists)]
        self._seen = LocationSet() if lists or len(roots) + len(folders) > 1 else None
        self._found = chain(
            chain.from_iterable(_walk(root, excluded=self._excluded) for root in roots),
            chain.from_iterable(map(_read_list, open_lists)),
            chain.from_iterable(_list_split(folder, manifest) for folder, manifest in splits),
        )

    def __next__(self) -> ImageFile:
        for file in self._found:
            if file is None:
                self.left_out["links to folders were not followed (name these with --images)"] += 1
            elif self._is_wanted(file):
                self.num_found += 1
                if int.from_bytes(hash_location(file.location)) % self._world_size == self._rank:
                    return file
        raise StopIteration

    def sort(self, files: Iterable[ImageFile]) -> list[ImageFile]:
        """The files in the order of their sources; those of a folder or a glob are sorted by path."""

        def order(file: ImageFile) -> tuple[int, str]:
            for number, root in enumerate(self._roots):
                if root.folder == file.root and _leads_to(root, file.path):
                    return number, file.path
            return len(self._roots), ""  # of a list, or in shards: as it was found

        return sorted(files, key=order)

    def lines_of_left_out(self) -> list[str]:
        """One line per reason, with the number of files that were left out for it."""
        return [f"{count:,} {reason}" for reason, count in self.left_out.items()]

    def _is_wanted(self, file: ImageFile) -> bool:
        location = _join(self._real_root(file.root), file.path)
        for suffix in self._skip_suffixes:
            if file.path.endswith((suffix, suffix.upper())):
                self.left_out[f"{suffix} files are no images"] += 1
                return False
        if file.path.endswith(PARTIAL_SUFFIX):
            self.left_out[f"{PARTIAL_SUFFIX} files are unfinished: a job still runs, or was killed (delete them)"] += 1
            return False
        if location in self._excluded:
            return False
        if self._seen is None or self._seen.add(location):
            return True
        self.left_out["files were named again"] += 1
        return False


class Ahead(Iterator[ImageFile]):
    """Iterates over the files in order, while a thread lists them ahead and then calls `on_end` with their number.

    So the number is known long before the last file is captioned. The files are queued in a temporary file, so memory
    stays constant and nothing is listed twice. An exception of the listing is raised after the last file. Raises
    UserError if the temporary file cannot grow.
    """

    def __init__(self, files: Iterator[ImageFile], *, on_end: Callable[[int], None]) -> None:
        handle, name = mkstemp()
        self._reader = open(name, "rb")  # noqa: PTH123, SIM115 - closed with this object
        Path(name).unlink()  # now, so that a kill leaves no file
        self._ready = Semaphore(0)  # one for each file in the queue, and one at its end
        self._error: BaseException | None = None
        Thread(target=self._list, args=(files, FileIO(handle, "w"), on_end), daemon=True).start()

    def __next__(self) -> ImageFile:
        self._ready.acquire()
        try:
            return pickle.load(self._reader)
        except (EOFError, pickle.UnpicklingError):  # the end, or an entry that a full disk cut
            self._ready.release()
            raise self._error or StopIteration from None

    def _list(self, files: Iterator[ImageFile], queue: FileIO, on_end: Callable[[int], None]) -> None:
        num_listed = 0
        try:
            with queue:
                for num_listed, file in enumerate(files, start=1):  # noqa: B007
                    _append(queue, pickle.dumps(file))
                    self._ready.release()
            on_end(num_listed)
        except BaseException as error:
            self._error = error
        finally:
            self._ready.release()


def _append(file: FileIO, data: bytes) -> None:
    """Write all of `data`. Raises UserError."""
    try:
        write_all(file, data)
    except OSError as error:
        raise UserError(
            f"the temporary file of the listing cannot grow ({error.strerror}): set TMPDIR to a folder with room"
        ) from error


# ---- roots --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Root:
    """A folder, and which of its files are wanted: the one called `name`, those that match `pattern`, or all."""

    folder: str
    name: str = ""
    pattern: Pattern = ()


def _find_root(source: str) -> _Root:
    """The root of one of --images. Raises UserError if there is no such file, OSError if its folder is unreadable."""
    nothing = UserError(f"nothing at {source} can be read or listed: give --images a folder, a file or a glob")
    try:
        if storage.is_folder(source):
            root = _Root(_without_slash(source))
        elif not source.endswith("/") and storage.exists(source):
            if storage.is_remote(source) and storage.size_bytes(source) == storage.UNKNOWN:
                storage.read_bytes(source, end=1)  # some servers refuse only when it is read
            folder, name = _split_location(source)
            return _Root(_without_slash(folder), name)
        else:
            folder, pattern = _split_glob(source)
            root = _Root(_without_slash(folder), pattern=pattern)
            if not (pattern and any(_walk(root))):
                raise nothing
        next(_scan(_join(root.folder, "")), None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise nothing from error
    return root


def _without_slash(folder: str) -> str:
    """The folder without trailing slashes."""
    return folder if folder.endswith("://") else folder.rstrip("/") or "/"


def _split_glob(glob: str) -> tuple[str, Pattern]:
    """The folder before the first wildcard, and the parts from there on; no parts if there is no wildcard."""
    scheme, separator, rest = glob.partition("://") if storage.is_remote(glob) else ("", "", glob)
    parts = rest.split("/")
    num_fixed = next((number for number, part in enumerate(parts) if WILDCARDS.intersection(part)), len(parts))
    folder = scheme + separator + "/".join(parts[:num_fixed])
    return folder or ("/" if glob.startswith("/") else "."), tuple(part for part in parts[num_fixed:] if part)


def _split_location(location: str) -> tuple[str, str]:
    """A file's folder and its name; the query of a URL belongs to the name."""
    if not storage.is_remote(location):
        folder, name = os.path.split(location)
        return folder or ".", name
    address, mark, query = location.partition("?") if location.startswith(storage.WEB) else (location, "", "")
    folder, slash, name = address.rpartition("/")
    return folder + slash if folder.endswith("/") else folder, name + mark + query


def _remaining(name: str, patterns: Iterable[Pattern]) -> Iterator[Pattern]:
    """The patterns that entries of folder `name` must match, without its part; () if `name` itself matches."""
    for pattern in patterns:
        if pattern[0] == "**":
            yield pattern
            yield from _remaining(name, [pattern[1:]]) if pattern[1:] else [()]
        elif fnmatchcase(name, pattern[0]):
            yield pattern[1:]


def _leads_to(root: _Root, path: str) -> bool:
    """Whether the root's file, glob or folder has this path below the root's folder."""
    patterns = {root.pattern}
    for part in path.split("/") if root.pattern else ():
        patterns = set(_remaining(part, patterns))
        if () in patterns:
            return True
    return not root.pattern and root.name in ("", path)


# ---- folders ------------------------------------------------------------------------------------------------------


def _walk(root: _Root, *, excluded: Container[str] = ()) -> Iterator[ImageFile | None]:
    """Yield the root's files. None for a link to a folder, an entry with an error for an unreadable folder."""
    if root.name:
        yield ImageFile(root.folder, root.name)
        return
    pending = [("", frozenset({root.pattern}) if root.pattern else EVERYTHING)]
    while pending:
        above, patterns = pending.pop()
        try:
            if above.count("/") > MAX_DEPTH and storage.is_remote(root.folder):
                raise OSError(f"more than {MAX_DEPTH} folders deep: it may be a loop")
            for name, kind in _scan(_join(root.folder, above)):
                path, remaining = above + name, frozenset(_remaining(name, patterns))
                if not remaining or (kind != "file" and os.path.realpath(_join(root.folder, path)) in excluded):
                    continue
                if kind == "folder":
                    pending.append((f"{path}/", EVERYTHING if () in remaining else remaining))
                elif kind == "linked folder":
                    yield None
                elif () in remaining:
                    yield ImageFile(root.folder, path)
        except (OSError, ValueError) as error:
            yield ImageFile(root.folder, above.rstrip("/") or ".", error=_image_error(error))


def _scan(folder: str) -> Iterator[tuple[str, Kind]]:
    """Yield each name in a folder and its kind, in the system's order; pipes and devices are files. Raises OSError."""
    if storage.is_remote(folder):
        yield from ((name, "folder" if is_folder else "file") for name, is_folder in storage.scan_folder(folder))
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.name, "linked folder" if Path(entry).is_dir() else "linked file"
            else:
                yield entry.name, "folder" if entry.is_dir() else "file"


def _join(root: str, path: str) -> str:
    """`root/path`, for paths and URLs; nothing is percent-encoded."""
    return f"{root}{path}" if root.endswith("/") else f"{root}/{path}"


# ---- lists --------------------------------------------------------------------------------------------------------


def _open_list(name: str, *, world_size: int) -> BinaryIO:
    """The list, opened once, because a pipe cannot be reopened. Raises UserError for a pipe to several processes."""
    if world_size > 1 and (name == "-" or not stat.S_ISREG(Path(name).stat().st_mode)):
        raise UserError(f"several processes cannot read the list {name}: write it to a file, and name that")
    return open(0 if name == "-" else name, "rb")  # noqa: PTH123


def _read_list(lines: BinaryIO) -> Iterator[ImageFile]:
    """Yield the files of a list; empty lines are skipped."""
    with lines:
        for number, line in enumerate(lines):
            text = line if number else line.removeprefix(codecs.BOM_UTF8)
            if text.strip():
                yield ImageFile(*_split_line(os.fsdecode(text.rstrip(b"\r\n"))))


def _split_line(line: str) -> tuple[str, str]:
    """The root and path of a list's line."""
    if storage.is_remote(line):
        return _split_location(line)
    path = "/".join(part for part in line.split("/") if part not in ("", ".")) or "."
    return "/" if line.startswith("/") else ".", path


# ---- shards -------------------------------------------------------------------------------------------------------


def _read_manifests(folder: str) -> list[Manifest]:
    """The manifests of a dataset folder's splits. Raises UserError and OSError."""
    remedy = "give --shards a folder that sharding/make_shards.py made"
    splits = complete_splits(folder)
    if not splits:
        raise UserError(f"there is no manifest of a split in {folder}: {remedy}")
    return [read_manifest(folder, split, remedy=remedy) for split in splits]


def _list_split(folder: str, manifest: Manifest) -> Iterator[ImageFile]:
    """Yield the images in a split's shards, and an entry with an error for a shard whose index cannot be read."""
    for shard in manifest.shards:
        try:
            spans = _read_spans(folder, shard.name, sha256=shard.sha256)
        except (OSError, UserError) as error:
            yield ImageFile(folder, f"{shard.name}.tar", error=_image_error(error))
            continue
        for name, (start, size) in spans.items():
            yield ImageFile(folder, f"{shard.name}.tar/{name}", start, size)


@lru_cache(maxsize=4)
def _read_spans(folder: str, shard: str, *, sha256: str | None = None) -> dict[str, tuple[int, int]]:
    """The (start, size) in bytes of each image in a shard's tar, by member name. Raises OSError and UserError."""
    origin = storage.join(folder, f"{shard}.index")
    index = ShardIndex.from_bytes(storage.read_bytes(origin), origin=origin)
    if sha256 not in (None, index.facts.get("sha256")):
        raise UserError(f"{origin} does not belong to the shard in its manifest: pack the split again")
    names = (f"{key.decode(errors='surrogateescape')}.jpg" for key in index.keys_S.tolist())
    try:
        offsets_S, sizes_S = image_spans(index)
    except ValueError as error:
        raise UserError(f"{origin} cannot be used ({error}): give the folder of the images") from error
    return dict(zip(names, zip(offsets_S.tolist(), sizes_S.tolist(), strict=True), strict=True))
