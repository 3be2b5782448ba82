"""Every format that carries an orientation x all eight x every way in: the picture stands upright, as does its size."""

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from odd_pictures import READS_AVIF, READS_HEIC, chunk, file_of
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, features

from captioner.describe import Captioner, Description
from captioner.images import loading
from captioner.images.views import ViewSpec
from infer.gallery import write_gallery
from infer.listing import locate
from infer.reading import decode_image
from sharding import make_shards
from sharding.settings import ShardSettings

WIDTH, HEIGHT = 96, 64
CORNERS = np.array([[(250, 20, 20), (20, 250, 20)], [(20, 20, 250), (250, 250, 20)]])
ORIENTATIONS = range(1, 9)
VIEW = ViewSpec(size=64, crop=64)


def drawn() -> np.ndarray:
    return CORNERS.repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1).astype(np.uint8)


def stored(orientation: int) -> Image.Image:
    """What a camera stores so that a viewer that follows the EXIF standard shows `drawn()`."""
    upright = drawn()
    pixels = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(pixels))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def xmp_of(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def with_exif(kind: str, **options: Any) -> Callable[[int], bytes]:
    return lambda orientation: file_of(stored(orientation), kind, exif=exif_of(orientation), **options)


def with_xmp(kind: str, **options: Any) -> Callable[[int], bytes]:
    return lambda orientation: file_of(stored(orientation), kind, xmp=xmp_of(orientation), **options)


def png_with(*contents: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """A PNG with these chunks behind its header."""

    def make(orientation: int) -> bytes:
        data = file_of(stored(orientation), "PNG")
        return data[:33] + b"".join(content(orientation) for content in contents) + data[33:]

    return make


def raw_profile(orientation: int) -> bytes:
    """EXIF as ImageMagick writes it into a PNG."""
    exif = exif_of(orientation).tobytes()
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def tiff_with_xmp(orientation: int) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = xmp_of(orientation)
    return file_of(stored(orientation), "TIFF", tiffinfo=tags)


def several_pages(orientation: int) -> bytes:
    more = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
    return file_of(stored(orientation), "TIFF", exif=exif_of(orientation), **more)


def heic(orientation: int) -> bytes:
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(stored(orientation)).save(buffer, exif=exif_of(orientation).tobytes(), quality=95)
    return buffer.getvalue()


FILES: dict[str, Callable[[int], bytes]] = {
    "exif.jpg": with_exif("JPEG", quality=95),
    "xmp.jpg": with_xmp("JPEG", quality=95),
    "frames.mpo": with_exif("MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "exif.png": with_exif("PNG"),
    "xmp.png": png_with(lambda orientation: chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(orientation))),
    "raw_profile.png": png_with(raw_profile),
    "plain.tif": with_exif("TIFF"),
    "big.tif": with_exif("TIFF", big_tiff=True),
    "pages.tif": several_pages,
    "xmp.tif": tiff_with_xmp,
}
if features.check("libtiff"):
    FILES["lzw.tif"] = with_exif("TIFF", compression="tiff_lzw")
    FILES["jpeg.tif"] = with_exif("TIFF", compression="jpeg", quality=95)
if features.check("webp"):
    FILES["exif.webp"] = with_exif("WEBP", quality=95)
    FILES["xmp.webp"] = with_xmp("WEBP", quality=95)
if READS_AVIF:
    FILES["container.avif"] = with_exif("AVIF", quality=95)
if READS_HEIC:
    FILES["container.heic"] = heic


def check_upright(pixels: Any, *, name: str = "") -> None:
    """The middle of each quarter has the colour of its corner."""
    shown = np.asarray(pixels).astype(int)
    height, width = shown.shape[:2]
    found = shown[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2]
    assert np.abs(found - CORNERS).max() <= 40, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of all orientations, as ORIENTATION-NAME."""
    folder = tmp_path_factory.mktemp("turned")
    for orientation in ORIENTATIONS:
        for name, make in FILES.items():
            (folder / f"{orientation}-{name}").write_bytes(make(orientation))
    return folder


def paths(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir())
    assert len(found) == len(ORIENTATIONS) * len(FILES)
    return found


def test_the_files_are_what_they_say(folder: Path) -> None:
    """Shown as they are stored, those of the orientations 5 to 8 lie on their side."""
    turned = {path.name for path in paths(folder) if not _stands_as_stored(path.read_bytes())}
    decoded_upright = ("heic", "tif")
    assert len(turned) >= 7 * sum(not name.endswith(decoded_upright) for name in FILES)


def _stands_as_stored(data: bytes) -> bool:
    try:
        shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    except OSError:  # HEIC, which only our own code opens
        return True
    height, width = shown.shape[:2]
    found = shown[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2]
    return bool(np.abs(found - CORNERS).max() <= 40)


def test_decoding_turns_once(folder: Path) -> None:
    for path in paths(folder):
        for at_least in (None, 16):
            picture, size = loading.decode_rgb(path.read_bytes(), at_least=at_least)
            check_upright(picture, name=path.name)
            assert size == (WIDTH, HEIGHT), path.name
            assert (picture.size == size) == (at_least is None or ("jpg" not in path.name and "mpo" not in path.name))


@pytest.mark.parametrize("resize", ["none", "keep-ratio", "squash"])
def test_packing_turns_once(folder: Path, tmp_path: Path, resize: loading.Resize) -> None:
    rows = [{"path": path.name, "caption": "a picture"} for path in paths(folder)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_shards.main(
        ShardSettings(
            images=str(folder), captions=str(tmp_path / "captions.jsonl"), split="train", output=str(tmp_path / "s"),
            resize=resize, size=32, threshold=1, workers=1,
        )
    )  # fmt: skip
    assert not (tmp_path / "s" / "train.failures.jsonl").read_text()
    samples = list(webdataset.WebDataset(str(tmp_path / "s" / "train-000000.tar"), shardshuffle=False))
    assert len(samples) == len(rows)
    for sample in samples:
        content = json.loads(sample["json"])
        picture = Image.open(io.BytesIO(sample["jpg"]))
        check_upright(picture, name=content["file_name"])
        check_upright(loading.decode_stored(sample["jpg"]))
        assert (content["width"], content["height"]) == (WIDTH, HEIGHT), content["file_name"]
        assert picture.size == {"none": (WIDTH, HEIGHT), "keep-ratio": (48, 32), "squash": (32, 32)}[resize]


@pytest.mark.parametrize("name", ["exif.jpg", "xmp.jpg"])
def test_only_a_jpeg_that_stands_upright_is_stored_untouched(name: str) -> None:
    for orientation in ORIENTATIONS:
        data = FILES[name](orientation)
        (found,) = loading.to_stored_jpegs([data], size=32, resize="none", quality=95)
        assert isinstance(found, loading.StoredJpeg)
        assert (found.data == data) == (orientation == 1)
        check_upright(loading.decode_stored(found.data))
        assert found.original_size == (WIDTH, HEIGHT)


def test_captioning_turns_once(folder: Path) -> None:
    for path in paths(folder):
        view_PP3 = np.zeros((64, 64, 3), np.uint8)
        found = decode_image(locate(str(folder), path.name), VIEW, out_PP3=view_PP3)
        assert (found.error, found.complaint, found.size) == (None, "", (WIDTH, HEIGHT)), path.name
        check_upright(view_PP3, name=path.name)


def test_thumbnails_turn_once(folder: Path, tmp_path: Path) -> None:
    rows: list[Any] = []
    names = {}
    for path in paths(folder):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        names[f"{sha256[:32]}.jpg"] = path.name
        row = {"root": str(folder), "path": path.name, "format_version": 2, "model": "m", "caption": "c", "alt": "C."}
        row |= {"score": -1.0, "token_scores": [-1.0], "confidence": None, "review": None, "duplicate_of": None}
        rows.append(row | {"width": WIDTH, "height": HEIGHT, "sha256": sha256})
    write_gallery(rows, tmp_path / "gallery", title="t", model="m")
    thumbnails = list((tmp_path / "gallery" / "thumbnails").iterdir())
    assert {thumbnail.name for thumbnail in thumbnails} == set(names)
    for thumbnail in thumbnails:
        picture = Image.open(thumbnail)
        assert picture.size == (WIDTH, HEIGHT)
        check_upright(picture, name=names[thumbnail.name])


# ---- the library ------------------------------------------------------------------------------------------


class Looking(Captioner):
    """A captioner that keeps what its model would see."""

    def __init__(self) -> None:
        self.bundle: Any = type("Bundle", (), {"view": VIEW, "uses_torch": True})
        self.seen: list[np.ndarray] = []

    def describe_views(self, views_BPP3: np.ndarray) -> list[Description]:
        self.seen += list(views_BPP3)
        return []


def views_of(pictures: list[Any]) -> list[np.ndarray]:
    looking = Looking()
    looking(pictures)
    return looking.seen


def opened(path: Path) -> Image.Image:
    if path.suffix == ".heic":
        import pillow_heif

        return pillow_heif.HeifImageFile(str(path))
    return Image.open(path)


def loaded(path: Path) -> Image.Image:
    image = opened(path)
    image.load()
    return image


WAYS_IN: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "name": str,
    "bytes": lambda path: path.read_bytes(),
    "image": opened,
    "loaded image": loaded,
    "copy": lambda path: opened(path).copy(),
    "RGBA": lambda path: opened(path).convert("RGBA"),
    "resized": lambda path: loaded(path).resize((50, 50)),
    "turned by Pillow": lambda path: ImageOps.exif_transpose(opened(path)),
    "array": lambda path: np.asarray(loading.decode_rgb(path.read_bytes())[0]),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_the_library_turns_once(folder: Path, way: str) -> None:
    for path, view_PP3 in zip(paths(folder), views_of(list(map(WAYS_IN[way], paths(folder)))), strict=True):
        check_upright(view_PP3, name=f"{path.name} as {way}")


def test_the_library_leaves_images_as_they_are(folder: Path) -> None:
    for path in paths(folder):
        image, other = opened(path), loaded(path)
        views_of([image])
        assert (image.size, image.mode) == (other.size, other.mode)
        assert image.tobytes() == other.tobytes()
        check_upright(views_of([image])[0], name=path.name)


def test_the_reported_picture_of_a_tiff(folder: Path) -> None:
    case = Path(__file__).resolve().parents[3] / "shared/data/cases/orientation6.tif"
    if not case.exists():
        pytest.skip(f"there is no {case}")
    _, size = loading.load_resized(case.read_bytes(), size=32, resize="squash")
    assert size == loading.decode_rgb(case.read_bytes())[1] == Image.open(case).size


def test_a_damaged_orientation_turns_nothing_and_costs_no_picture() -> None:
    """Of a tag that is no number, and of numbers beyond the standard."""
    upright = file_of(Image.fromarray(drawn()), "TIFF", exif=exif_of(1))
    entry = struct.pack("<HHIHH", 274, 3, 1, 1, 0)
    for kind, count, value in ((2, 1, 6), (3, 0, 6), (3, 9, 6), (3, 1, 0), (3, 1, 9), (5, 1, 0)):
        data = upright.replace(entry, struct.pack("<HHIHH", 274, kind, count, value, 0))
        assert data != upright
        picture, size = loading.decode_rgb(data)
        assert size == (WIDTH, HEIGHT)
        check_upright(picture)
