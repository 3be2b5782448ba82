"""Builds the pillow-simd that `make simd` installs, and refuses to where formats that Pillow reads would be lost.

    python simd.py pillow-simd==12.1.1.post0 --into .venv/simd
    python simd.py pillow-simd==12.1.1.post0 --into .venv/simd --lose "avif jpeg2000"

pillow-simd has no wheel. What it is built without a library for, it does not read, and it says nothing of that.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

EXIT_USER_ERROR = 2


class Library(NamedTuple):
    """A library that Pillow is built with: its names there, what it is for, its header, and packages that have it."""

    name: str  # of pillow-simd's build option
    feature: str  # of PIL.features
    what: str
    header: str
    debian: str
    fedora: str
    pattern: str = ""  # that the header must contain


NEEDED = (
    Library("jpeg", "jpg", "JPEG", "jpeglib.h", "libjpeg-dev", "libjpeg-turbo-devel"),
    Library("zlib", "zlib", "PNG", "zlib.h", "zlib1g-dev", "zlib-devel"),
)
OPTIONAL = (
    Library("webp", "webp", "WebP", "webp/demux.h", "libwebp-dev", "libwebp-devel"),
    Library("tiff", "libtiff", "compressed TIFF", "tiffio.h", "libtiff-dev", "libtiff-devel"),
    Library("jpeg2000", "jpg_2000", "JPEG 2000", "openjpeg-2*/openjpeg.h", "libopenjp2-7-dev", "openjpeg2-devel"),
    Library(
        "avif", "avif", "AVIF (libavif 1.0 or newer)", "avif/avif.h", "libavif-dev", "libavif-devel",
        pattern=r"#define AVIF_VERSION_MAJOR [1-9]",
    ),
    Library("lcms", "littlecms2", "LAB colours", "lcms2.h", "liblcms2-dev", "lcms2-devel"),
    Library("freetype", "freetype2", "fonts", "freetype2/ft2build.h", "libfreetype-dev", "freetype-devel"),
)  # fmt: skip


def main(requirement: str, *, into: Path, lose: Sequence[str]) -> None:
    """Build the wheel into an empty folder `into`, with all libraries that are there."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    folders = include_folders(compiler)
    check_processor()
    if missing := without_header(NEEDED, folders):
        fail(f"there is no header of {', '.join(one.what for one in missing)}: {packages(missing)}")
    missing = without_header(OPTIONAL, folders)
    check_losses(missing, lose)
    wanted = [library for library in (*NEEDED, *OPTIONAL) if library not in missing]
    with tempfile.TemporaryDirectory() as folder:
        build(requirement, [library.name for library in wanted], compiler, into=Path(folder))
        check_features(Path(folder), wanted)
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(folder, into)


def fail(message: str) -> NoReturn:
    """Leave with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


# ---- before -----------------------------------------------------------------------------------------------


def include_folders(compiler: Sequence[str]) -> list[Path]:
    """Where the compiler looks for headers, and where an environment such as conda's has them."""
    command = [*compiler, "-mavx2", "-E", "-Wp,-v", "-x", "c", os.devnull]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError):
        fail(f"{shlex.join(compiler)} is no C compiler that takes -mavx2: apt-get install gcc (dnf install gcc)")
    return [Path(sys.prefix, "include"), *(Path(line.strip()) for line in found.splitlines() if line.startswith(" "))]


def check_processor() -> None:
    """Refuse on a processor that could not run what is built."""
    facts = Path("/proc/cpuinfo")
    if facts.is_file() and "avx2" not in facts.read_text():
        fail("this processor has no AVX2, which pillow-simd is compiled for: stay with Pillow")


def without_header(libraries: Iterable[Library], folders: Sequence[Path]) -> list[Library]:
    """The libraries that cannot be built with."""
    return [library for library in libraries if not any(has_header(library, folder) for folder in folders)]


def has_header(library: Library, folder: Path) -> bool:
    """Whether a folder has the library's header, in a version that will do."""
    return any(
        re.search(library.pattern, header.read_text(errors="replace")) is not None
        for header in folder.glob(library.header)
    )


def check_losses(missing: Sequence[Library], lose: Sequence[str]) -> None:
    """Refuse to lose what nobody said may be lost; tell what is."""
    names = [library.name for library in OPTIONAL]
    if unknown := sorted(set(lose) - set(names)):
        fail(f"LOSE names {', '.join(unknown)}: it can name {', '.join(names)}")
    if refused := [library for library in missing if library.name not in lose]:
        lost = ", ".join(library.what for library in refused)
        consent = " ".join(dict.fromkeys([*lose, *(library.name for library in refused)]))
        fail(f'pillow-simd would not read {lost}: {packages(refused)}, or do without: make simd LOSE="{consent}"')
    if missing:
        print("building pillow-simd without", ", ".join(library.what for library in missing))


def packages(libraries: Sequence[Library]) -> str:
    """How to get the libraries' headers."""
    debian, fedora = (" ".join(names) for names in zip(*((one.debian, one.fedora) for one in libraries), strict=True))
    return f"apt-get install {debian} (dnf install {fedora})"


# ---- building ---------------------------------------------------------------------------------------------


def build(requirement: str, names: Sequence[str], compiler: Sequence[str], *, into: Path) -> None:
    """Compile the wheel; a library that is named and cannot be used after all is an error."""
    options = [f"--config-settings={name}=enable" for name in names]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", *options]
    environment = os.environ | {"CC": shlex.join([*compiler, "-mavx2"])}
    if subprocess.run([*command, "--wheel-dir", str(into), requirement], env=environment, check=False).returncode:
        fail(f"{requirement} could not be built; Pillow stays as it was")


def check_features(folder: Path, wanted: Sequence[Library]) -> None:
    """Refuse a wheel that lacks what it should have been built with."""
    (wheel,) = folder.glob("*.whl")
    with tempfile.TemporaryDirectory() as unpacked:
        shutil.unpack_archive(wheel, unpacked, "zip")
        command = [sys.executable, "-c", "from PIL import features; print(*features.get_supported())"]
        environment = os.environ | {"PYTHONPATH": unpacked}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if lost := [library.what for library in wanted if library.feature not in done.stdout.split()]:
        fail(f"{wheel.name} was built without {', '.join(lost)}, though the headers are there; Pillow stays as it was")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirement", help="name and version of the package to build")
    parser.add_argument("--into", type=Path, required=True, help="folder for the wheel; what it holds is replaced")
    parser.add_argument("--lose", default="", help="libraries that may be missing, such as 'webp avif'")
    given = parser.parse_args()
    main(given.requirement, into=given.into, lose=given.lose.replace(",", " ").split())
