"""What there is to caption: the files of folders, globs, URLs, lists and shards, found while they are being captioned.

On disk and on S3 nothing is held but the open folders, so that the first file comes at once and millions of them take
no memory; other stores give a folder whole. With a list, or several sources, all places are remembered, in about 20
bytes each, since they may name a file again.
"""

import codecs
import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from captioner.errors import UserError
from captioner.files import storage
from captioner.images.loading import ImageError
from captioner.samples import image_spans
from captioner.shards.format import SPLITS, Manifest, ShardIndex, manifest_location, read_manifest

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NO_FILE = (errno.EISDIR, errno.ENXIO, errno.ENODEV)  # a folder, a socket, a device without a driver
WILDCARDS = frozenset("*?[")
NUM_OPEN = 64  # folders, each inside the one before
MAX_DEPTH = 32  # folders on a server: some follow links in circles
NUM_RECENT = 1 << 14  # hashes that are not sorted in yet

Pattern = tuple[str, ...]  # a glob's parts
EVERYTHING: frozenset[Pattern] = frozenset({("**",)})
Kind = Literal["file", "folder", "linked file", "linked folder"]


@dataclass(frozen=True, order=True, slots=True)
class ImageFile:
    """A file, or a span of a tar: the folder it was found through, and its path below that.

    `path` has `/` between its parts, and bytes that are no UTF-8 as `\\udcXX`; behind web addresses it stays quoted.
    A picture in a shard has the path `train-000000.tar/KEY.jpg`, and lies `size` bytes long at byte `start` of the tar.
    """

    root: str
    path: str
    start: int = 0
    size: int | None = None

    @property
    def location(self) -> str:
        """Where the file lies, as a path or URL."""
        return _join(self.root, self.path)

    def read(self, *, max_bytes: int) -> bytes:
        """The file's content.

        Raises ImageError: missing, unreadable, special file (never opened in a way that waits), or too large.
        """
        try:
            if self.size is not None:
                _check_size(self.size, max_bytes)
                tar = _join(self.root, f"{self.path.partition('.tar/')[0]}.tar")
                return storage.read_range(tar, start=self.start, end=self.start + self.size)[: self.size]
            read = _read_remote if storage.is_remote(self.root) else _read_local
            return read(self.location, max_bytes)
        except (OSError, ValueError) as error:
            raise _refusal(error) from error


@dataclass(frozen=True, slots=True)
class Refused:
    """A file or folder that cannot be read, and why."""

    file: ImageFile
    error: ImageError


def locate(root: str, path: str) -> ImageFile:
    """The file of a row; a shard's picture is found through its index."""
    tar, _, name = path.partition(".tar/")
    return ImageFile(root, path, *(_cached_spans(root, tar).get(name, ()) if name else ()))


def list_files(
    images: Sequence[str],
    *,
    lists: Sequence[str] = (),
    shards: Sequence[str] = (),
    excluded: Sequence[Path] = (),
    skip_endings: Sequence[str] = (),
    rank: int = 0,
    world_size: int = 1,
) -> "Listing":
    """This process's share of all that there is to caption, in no certain order, each file once.

    `images` are folders with all below them, files, and globs, on disk or behind URLs. A glob's `**` stands for any
    number of folders, its `*` also for names that begin with a dot; a folder that fits counts with all below it.
    `lists` are text files with a path or URL a line, `-` is the standard input. `shards` are dataset folders.
    `excluded` files and folders are left out, and names that end in `skip_endings`. Links to files count as files,
    links to folders are counted and not followed, since they may lead in circles.

    A file that several sources name keeps the place that comes first. Only its root is resolved for that: it has a
    place for each link below a root that leads to it, and for each way that a list goes up, with `..`. It belongs to
    the process that a hash of its place gives, the root as given joined with the path, so that processes lose and
    repeat none even where their listings differ (but for files that sources spell differently and only some of the
    processes see in the first). Raises UserError for what is not there, matches nothing, or cannot be listed.
    """
    for option, names in (("--images", images), ("--list", lists), ("--shards", shards)):
        if "" in names:
            raise UserError(f"an empty name in {option}: name what you mean, the folder you are in is .")
    roots = dict.fromkeys(map(_find_root, images))
    manifests = [
        (folder, manifest)
        for folder in dict.fromkeys(map(_without_slash, shards))
        for manifest in _read_manifests(folder)
    ]
    return Listing(
        roots,
        lists=[_open_list(name, world_size=world_size) for name in dict.fromkeys(lists)],
        manifests=manifests,
        excluded=excluded,
        skip_endings=skip_endings,
        rank=rank,
        world_size=world_size,
    )


class Listing(Iterator[ImageFile | Refused]):
    """Gives each file once, or why it cannot be read; its counts are of all processes' files, and grow meanwhile.

    `num_found` files are to be captioned, `num_linked_folders` were not followed, `num_skipped` files have an ending
    that is left out, `num_repeated` times a file was named again.
    """

    def __init__(
        self,
        roots: "Iterable[_Root]",
        *,
        lists: Iterable[BinaryIO] = (),
        manifests: Iterable[tuple[str, Manifest]] = (),
        excluded: Sequence[Path] = (),
        skip_endings: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_found = 0
        self.num_linked_folders = 0
        self.num_skipped = 0
        self.num_repeated = 0
        self._excluded = {os.path.realpath(path) for path in excluded}
        self._excluded_names = {Path(path).name for path in (*excluded, *self._excluded)}
        roots, lists, manifests = list(roots), list(lists), list(manifests)
        found = chain(
            chain.from_iterable(chain(self._give_named(root), self._walk(root)) for root in roots),
            chain.from_iterable(map(self._read_list, lists)),
            chain.from_iterable(_list_split(folder, manifest) for folder, manifest in manifests),
        )
        seen = Seen() if lists or len(roots) + len({folder for folder, _ in manifests}) > 1 else None
        self._files = self._share(found, seen, endings=tuple(skip_endings), rank=rank, world_size=world_size)

    def __iter__(self) -> "Listing":
        return self

    def __next__(self) -> ImageFile | Refused:
        return next(self._files)

    def _share(
        self,
        found: Iterable[ImageFile | Refused],
        seen: "Seen | None",
        *,
        endings: tuple[str, ...],
        rank: int,
        world_size: int,
    ) -> Iterator[ImageFile | Refused]:
        real = lru_cache(maxsize=1024)(real_root)
        for item in found:
            file = item.file if isinstance(item, Refused) else item
            if file.path.endswith(endings):
                self.num_skipped += 1
                continue
            if seen and not seen.add(hash_location(_join(real(file.root), file.path))):
                self.num_repeated += 1
                continue
            self.num_found += 1
            if world_size == 1 or hash_location(file.location) % world_size == rank:
                yield item

    def _give_named(self, root: "_Root") -> Iterator[ImageFile | Refused]:
        if root.name:
            location = _join(root.folder, root.name)
            kind = "file" if storage.is_remote(location) else _kind(location)
            if not self._is_excluded(root.name, location, kind):
                yield _result(ImageFile(root.folder, root.name), kind)

    def _walk(self, root: "_Root") -> Iterator[ImageFile | Refused]:
        """All that fits a root's patterns.

        A folder is listed as soon as it is met, so that no others wait, but no more than NUM_OPEN at once.
        """
        folders = [("", root.patterns, _scan(_join(root.folder, "")))] if root.patterns else []
        while folders:
            above, patterns, entries = folders[-1]
            try:
                for name, kind in entries:
                    rests = EVERYTHING if patterns is EVERYTHING else frozenset(_rests(name, patterns))
                    fits = rests is EVERYTHING or () in rests
                    path = above + name
                    location = _join(root.folder, path)
                    if not rests or self._is_excluded(name, location, kind):
                        continue
                    if kind == "folder" and path.count("/") >= MAX_DEPTH and storage.is_remote(location):
                        yield Refused(ImageFile(root.folder, path), _too_deep())
                    elif kind == "folder":
                        below = f"{path}/", EVERYTHING if fits else rests, _scan(f"{location}/")
                        if len(folders) < NUM_OPEN:
                            folders.append(below)
                            break
                        folders.insert(0, below)
                    elif kind == "linked folder":
                        self.num_linked_folders += 1
                    elif fits:
                        yield _result(ImageFile(root.folder, path), kind)
                else:
                    folders.pop()
            except (OSError, ValueError) as error:
                folders.pop()
                yield Refused(ImageFile(root.folder, above.rstrip("/") or "."), _refusal(error))

    def _read_list(self, lines: BinaryIO) -> Iterator[ImageFile]:
        with lines:
            for number, line in enumerate(lines):
                if not number:
                    line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
                if line.strip():
                    file = ImageFile(*_split_line(os.fsdecode(line.rstrip(b"\r\n"))))
                    if not self._is_excluded(file.path.rpartition("/")[2], file.location, "file"):
                        yield file

    def _is_excluded(self, name: str, location: str, kind: Kind | ImageError) -> bool:
        """Only what may be excluded by its name, and links, are resolved: that takes a question of each folder."""
        suspect = name in self._excluded_names or (kind == "linked file" and self._excluded)
        return bool(suspect) and "\0" not in location and os.path.realpath(location) in self._excluded


# ---- roots --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Root:
    """A folder, and what of it is wanted: a single file, or all that fits the patterns."""

    folder: str
    name: str = ""
    patterns: frozenset[Pattern] = frozenset()


def _find_root(place: str) -> _Root:
    """The folder of one of --images, and what is wanted of it. Raises UserError."""
    try:
        if storage.is_folder(place):
            _check_folder(place)
            return _Root(_without_slash(place), patterns=EVERYTHING)
        if not place.endswith("/") and storage.exists(place):
            if storage.is_remote(place) and storage.size_bytes(place) == storage.UNKNOWN:
                storage.read_bytes(place, end=1)  # a server that does not show a folder may refuse to say so
            folder, name = _split_location(place)
            return _Root(_without_slash(folder), name)
    except OSError as error:
        raise UserError(
            f"cannot look at {place} ({error.strerror or error}): mend that, or name other pictures"
        ) from error
    if not WILDCARDS.intersection(place):
        raise UserError(
            f"there is nothing at {place} that can be read or listed: give --images a folder, a file or a glob"
        )
    folder, pattern = _split_glob(place)
    root = _Root(_without_slash(folder), patterns=frozenset({pattern}))
    first = next(Listing([root]), None)
    if isinstance(first, Refused) and first.file.path == ".":
        raise _not_listable(place, first.error)
    if first is None:
        raise UserError(f"no file fits {place}: mend the pattern, or give --images a folder")
    return root


def _check_folder(place: str) -> None:
    """Raise UserError where a folder on disk cannot be listed; one on a server has been asked before."""
    try:
        if not storage.is_remote(place):
            next(_scan(place), None)
    except OSError as error:
        raise _not_listable(place, _refusal(error)) from error


def _not_listable(place: str, error: ImageError) -> UserError:
    return UserError(f"cannot list {place} ({error.message}): make it readable, or name other folders")


def _without_slash(folder: str) -> str:
    """A folder by one name only, whether or not a slash was typed."""
    return folder if folder.endswith("://") else folder.rstrip("/") or "/"


def _split_glob(place: str) -> tuple[str, Pattern]:
    """The folder before the first wildcard, and the parts of the rest."""
    scheme, mark, rest = place.partition("://") if storage.is_remote(place) else ("", "", place)
    parts = rest.split("/")
    num_fixed = next(number for number, part in enumerate(parts) if WILDCARDS.intersection(part))
    folder = scheme + mark + "/".join(parts[:num_fixed])
    return folder or ("/" if place.startswith("/") else "."), tuple(part for part in parts[num_fixed:] if part)


def _split_location(location: str) -> tuple[str, str]:
    """A file's folder and its name there; a web address' query belongs to the name."""
    if not storage.is_remote(location):
        folder, name = os.path.split(location)
        return folder or ".", name
    address, mark, query = location.partition("?") if location.startswith(storage.WEB) else (location, "", "")
    folder, slash, name = address.rpartition("/")
    return folder + slash if folder.endswith("/") else folder, name + mark + query


def _rests(name: str, patterns: Iterable[Pattern]) -> Iterator[Pattern]:
    """What is left of the patterns below an entry of this name; the empty rest where it fits as it is."""
    for pattern in patterns:
        if pattern[0] == "**":
            yield pattern
            yield from _rests(name, [pattern[1:]]) if pattern[1:] else [()]
        elif fnmatchcase(name, pattern[0]):
            yield pattern[1:]


# ---- folders ------------------------------------------------------------------------------------------------------


def _scan(folder: str) -> Iterator[tuple[str, Kind | ImageError]]:
    """The names in a folder and what they are, as the system gives them. Raises OSError."""
    if storage.is_remote(folder):
        yield from ((name, "folder" if is_folder else "file") for name, is_folder in storage.scan_folder(folder))
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield entry.name, "file"
            elif entry.is_dir(follow_symlinks=False):
                yield entry.name, "folder"
            else:
                yield entry.name, _kind(entry.path, linked=entry.is_symlink())


def _kind(path: str, *, linked: bool = False) -> Kind | ImageError:
    """What a path leads to, or why it is no picture."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - as in storage: there may be a million
    except OSError as error:
        return _refusal(error)
    if stat.S_ISREG(mode):
        return "linked file" if linked else "file"
    return "linked folder" if stat.S_ISDIR(mode) else _special()


def _result(file: ImageFile, kind: Kind | ImageError) -> ImageFile | Refused:
    return Refused(file, kind) if isinstance(kind, ImageError) else file


def _join(root: str, path: str) -> str:
    """`root/path` for paths and URLs alike, as they are."""
    return f"{root}{path}" if root.endswith("/") else f"{root}/{path}"


# ---- lists --------------------------------------------------------------------------------------------------------


def _open_list(name: str, *, world_size: int) -> BinaryIO:
    """A list that was opened once: what a pipe gave cannot be read again. Raises UserError.

    Processes that share an input, or a pipe, would each get only what the others left.
    """
    if name == "-" and sys.stdin is None:
        raise UserError("the list - is the standard input, which is closed: write the list to a file, and name that")
    try:
        if world_size > 1 and (name == "-" or not stat.S_ISREG(Path(name).stat().st_mode)):
            raise UserError(f"several processes cannot share the list {name}: write it to a file, and name that")
        return sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: PTH123
    except OSError as error:
        raise UserError(
            f"cannot read the list {name} ({error.strerror}): give a text file with a path a line"
        ) from error


def _split_line(line: str) -> tuple[str, str]:
    """The root and path of a list's line."""
    if storage.is_remote(line):
        return _split_location(line)
    path = "/".join(part for part in line.split("/") if part not in ("", ".")) or "."
    return "/" if line.startswith("/") else ".", path


def hash_location(location: str) -> int:
    """64 bits of a file's place that are the same in all processes and versions."""
    place = location.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(place, digest_size=8).digest(), "little")


def real_root(root: str) -> str:
    """A root by one name only, whatever links and dots lead to it."""
    return root if storage.is_remote(root) else os.path.realpath(root)


class Seen:
    """A set of 64-bit hashes in about 20 bytes each: a sorted array, and a set of the few that came last."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older = np.empty(0, np.uint64)

    def add(self, key: int) -> bool:
        """Whether the key was not there yet."""
        place = int(self._older.searchsorted(np.uint64(key)))
        if key in self._recent or (place < len(self._older) and int(self._older[place]) == key):
            return False
        self._recent.add(key)
        if len(self._recent) >= max(NUM_RECENT, len(self._older) // 16):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._older = np.concatenate((self._older, recent))
            self._older.sort()
            self._recent.clear()
        return True


# ---- shards -------------------------------------------------------------------------------------------------------


def _read_manifests(folder: str) -> list[Manifest]:
    """The manifests of a dataset folder's splits. Raises UserError."""
    remedy = "give --shards a folder that sharding/make_shards.py made"
    try:
        splits = [split for split in SPLITS if storage.exists(manifest_location(folder, split))]
    except OSError as error:
        raise UserError(f"cannot look at {folder} ({error.strerror or error}): {remedy}") from error
    if not splits:
        raise UserError(f"there is no manifest of a split in {folder}: {remedy}")
    return [read_manifest(folder, split, remedy=remedy) for split in splits]


def _list_split(folder: str, manifest: Manifest) -> Iterator[ImageFile | Refused]:
    for shard in manifest.shards:
        try:
            spans = _read_spans(folder, shard.name, sha256=shard.sha256)
        except (OSError, UserError) as error:
            yield Refused(ImageFile(folder, f"{shard.name}.tar"), _refusal(error))
            continue
        for name, (start, size) in spans.items():
            yield ImageFile(folder, f"{shard.name}.tar/{name}", start, size)


def _read_spans(folder: str, shard: str, *, sha256: str | None = None) -> dict[str, tuple[int, int]]:
    """Start and size in bytes of a shard's pictures, by name. Raises OSError and UserError."""
    origin = storage.join(folder, f"{shard}.index")
    index = ShardIndex.from_bytes(storage.read_bytes(origin), origin=origin)
    if sha256 not in (None, index.facts.get("sha256")):
        raise UserError(f"{origin} is of another shard than its manifest says: pack the split again")
    names = (f"{key.decode(errors='surrogateescape')}.jpg" for key in index.keys_S.tolist())
    try:
        offsets_S, sizes_S = image_spans(index)
    except ValueError as error:
        raise UserError(f"{origin} cannot be used ({error}): give the folder of the pictures") from error
    return dict(zip(names, zip(offsets_S.tolist(), sizes_S.tolist(), strict=True), strict=True))


@lru_cache(maxsize=4)
def _cached_spans(folder: str, shard: str) -> dict[str, tuple[int, int]]:
    """`_read_spans`, and nothing where there is no such shard: folders may be called `.tar` as well."""
    try:
        return _read_spans(folder, shard)
    except (OSError, UserError):
        return {}


# ---- reading ------------------------------------------------------------------------------------------------------


def _read_local(location: str, max_bytes: int) -> bytes:
    with open(location, "rb", opener=_open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise _special()
        _check_size(found.st_size, max_bytes)
        return file.read(found.st_size)


def _open_at_once(path: str, flags: int) -> int:
    """Opening a pipe would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_remote(location: str, max_bytes: int) -> bytes:
    data = storage.read_bytes(location, end=max_bytes + 1)
    _check_size(len(data), max_bytes)
    return data


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ImageError("too large", f"{num_bytes:,} bytes or more, {max_bytes:,} are allowed: shrink it")


def _refusal(error: Exception) -> ImageError:
    """Why a file or folder cannot be read."""
    number = getattr(error, "errno", None)
    message = " ".join(str(getattr(error, "strerror", None) or error).split())
    if number in NO_FILE:
        return _special()
    missing = isinstance(error, FileNotFoundError | UnicodeError) or number in NOT_THERE or "null byte" in message
    return ImageError("missing" if missing else "unreadable", message)


def _too_deep() -> ImageError:
    return ImageError("unreadable", f"more than {MAX_DEPTH} folders deep: it may be a circle")


def _special() -> ImageError:
    return ImageError("special file", "it is a folder, pipe, socket or device: only regular files are read")
