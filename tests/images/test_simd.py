"""`make simd` says which formats would be lost, before it builds anything."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = {
    "jpeglib.h": "",
    "zlib.h": "",
    "webp/demux.h": "",
    "tiffio.h": "",
    "openjpeg-2.5/openjpeg.h": "",
    "avif/avif.h": "#define AVIF_VERSION_MAJOR 1\n",
    "lcms2.h": "",
    "freetype2/ft2build.h": "",
}


@pytest.fixture(scope="module")
def simd() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simd", ROOT / "simd.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_headers(folder: Path, *, without: str = "", **changed: str) -> None:
    for name, text in HEADERS.items():
        if name != without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(changed.get(Path(name).stem, text))


def run_make_simd(folder: Path, *, lose: str = "") -> subprocess.CompletedProcess[str]:
    """simd.py with a compiler that sees the headers in `folder` alone, and a pip that finds nothing to build."""
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\nprintf '#include <...> search starts here:\\n {folder}\\n' >&2\n")
    compiler.chmod(0o755)
    command = [
        sys.executable,
        str(ROOT / "simd.py"),
        "no-such-package==1",
        "--into",
        str(folder / "into"),
        "--lose",
        lose,
    ]
    environment = os.environ | {"CC": str(compiler), "PIP_NO_INDEX": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("webp/demux.h", ["WebP", "libwebp-dev", "libwebp-devel", 'LOSE="webp"']),
        ("tiffio.h", ["TIFF", "libtiff-dev", "libtiff-devel", 'LOSE="tiff"']),
        ("openjpeg-2.5/openjpeg.h", ["JPEG 2000", "libopenjp2-7-dev", "openjpeg2-devel", 'LOSE="jpeg2000"']),
        ("avif/avif.h", ["AVIF", "libavif-dev", "libavif-devel", 'LOSE="avif"']),
        ("lcms2.h", ["LAB", "liblcms2-dev", "lcms2-devel", 'LOSE="lcms"']),
        ("freetype2/ft2build.h", ["fonts", "libfreetype-dev", "freetype-devel", 'LOSE="freetype"']),
        ("jpeglib.h", ["JPEG", "libjpeg-dev", "libjpeg-turbo-devel"]),
        ("zlib.h", ["PNG", "zlib1g-dev", "zlib-devel"]),
    ],
)
def test_a_format_that_would_be_lost_is_named_with_its_packages(tmp_path: Path, header: str, words: list[str]) -> None:
    write_headers(tmp_path, without=header)
    done = run_make_simd(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "into").exists()


def test_too_old_a_libavif_is_none(tmp_path: Path) -> None:
    write_headers(tmp_path, avif="#define AVIF_VERSION_MAJOR 0\n")
    assert "AVIF (libavif 1.0 or newer)" in run_make_simd(tmp_path).stderr


def test_what_may_be_lost_is_told_and_then_it_is_built(tmp_path: Path) -> None:
    write_headers(tmp_path, without="webp/demux.h")
    done = run_make_simd(tmp_path, lose="webp, avif")
    assert done.stdout == "building pillow-simd without WebP\n"
    assert "could not be built; Pillow stays as it was" in done.stderr
    assert not (tmp_path / "into").exists()


def test_a_name_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    write_headers(tmp_path)
    assert "LOSE names webpp" in run_make_simd(tmp_path, lose="webpp").stderr


def test_no_compiler_is_said(tmp_path: Path, simd: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simd.include_folders([str(tmp_path / "nothing")])
    assert "apt-get install gcc" in capsys.readouterr().err


def test_every_library_is_one_that_pillow_tells_of(simd: ModuleType) -> None:
    from PIL import features

    known = features.modules.keys() | features.codecs.keys() | {"avif"}
    assert {library.feature for library in (*simd.NEEDED, *simd.OPTIONAL)} <= known
