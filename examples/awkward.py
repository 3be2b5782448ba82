"""Write a folder of images as people have them: sub-folders, many formats, and broken files."""

import random
from pathlib import Path
from typing import Any

from PIL import Image

from scenes import Scene, draw, invent_scene, scene_seed

ODD_NAME = 'it\'s a "scene" – größer, 图.jpg'
SIDES_12_MEGAPIXELS = (4000, 3000)
NUM_PLAIN = 60


def write_folder(folder: Path, *, seed: int) -> dict[str, Scene]:
    """Fill `folder` with unseen scenes; returns what each usable image shows, by its path in the folder."""
    scenes = [invent_scene(scene_seed(seed, "folder", i), unseen=i % 5 == 0) for i in range(NUM_PLAIN + 7)]
    shown: dict[str, Scene] = {}

    def write(name: str, **options: Any) -> Path:
        return _write(folder, name, scenes[len(shown)], shown, **options)

    for index in range(NUM_PLAIN):
        write(f"{('', 'holiday/', 'holiday/day 2/')[index % 3]}scene_{index:03d}.jpg")
    write("formats/grey.png", mode="L")
    write("formats/transparent.png", mode="RGBA")
    write("formats/cmyk.jpg", mode="CMYK")
    write("formats/rotated.jpg", orientation=6)
    write("formats/picture.webp")
    write("formats/twelve_megapixels.jpg", size=SIDES_12_MEGAPIXELS)
    write(ODD_NAME)
    _write_broken(folder, whole=(folder / "scene_000.jpg").read_bytes(), seed=seed)
    return shown


def _write(
    folder: Path,
    name: str,
    scene: Scene,
    shown: dict[str, Scene],
    *,
    mode: str = "RGB",
    orientation: int = 1,
    size: tuple[int, int] | None = None,
) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = draw(scene)
    if size is not None:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation == 6:  # stored rotated; EXIF says to turn it a quarter clockwise
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = orientation
    picture.convert(mode).save(path, quality=92, exif=exif)
    shown[name] = scene
    return path


def _write_broken(folder: Path, *, whole: bytes, seed: int) -> None:
    broken = folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (broken / "text.jpg").write_text("This is no picture.\n", encoding="utf-8")
    (broken / "empty.jpg").write_bytes(b"")
    (broken / "noise.png").write_bytes(random.Random(seed).randbytes(5000))
