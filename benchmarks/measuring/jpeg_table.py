"""What a stored JPEG's quality and colour resolution cost: bytes, encoding and decoding time, and accuracy."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner.images import loading
from measuring.figures import Cost, median_of, take_turns, time_here
from measuring.photos import SIZE

QUALITIES = (75, 85, 90, 92, 95, 97)
COLOURS = {"4:2:0": 2, "4:4:4": 0}


def measure(originals: Sequence[Path], *, rounds: int) -> list[dict[str, Any]]:
    """A row for each quality and colour resolution: medians over the rounds, differences in 255ths."""
    pictures = [loading.load_resized(path.read_bytes(), size=SIZE, resize="squash")[0] for path in originals]
    settings = [(quality, colour) for quality in QUALITIES for colour in COLOURS]
    stored = {setting: [encode(picture, *setting) for picture in pictures] for setting in settings}
    contenders: dict[tuple[str, int, str], Callable[[int], Cost | None]] = {}
    for setting in settings:
        contenders["encode", *setting] = over(pictures, lambda picture, setting=setting: encode(picture, *setting))
        contenders["Pillow", *setting] = over(stored[setting], decode)
        contenders["simplejpeg", *setting] = over(stored[setting], loading.decode_stored)
    costs = take_turns({" ".join(map(str, name)): turn for name, turn in contenders.items()}, rounds=rounds)

    def cpu_ms(task: str, setting: tuple[int, str]) -> float | None:
        return median_of(costs.get(f"{task} {setting[0]} {setting[1]}", []), figure="cpu_ms")

    rows = []
    for setting in settings:
        pairs = zip(pictures, stored[setting], strict=True)
        differences = [np.abs(pixels(picture) - pixels(decode(data))).mean() for picture, data in pairs]
        rows.append(
            {
                "quality": setting[0],
                "colour": setting[1],
                "kB": sum(map(len, stored[setting])) / len(stored[setting]) / 1000,
                "encode_ms": cpu_ms("encode", setting),
                "decode_ms_Pillow": cpu_ms("Pillow", setting),
                "a_CPU_second_Pillow": per_second(cpu_ms("Pillow", setting)),
                "decode_ms_simplejpeg": cpu_ms("simplejpeg", setting),
                "a_CPU_second_simplejpeg": per_second(cpu_ms("simplejpeg", setting)),
                "mean_difference": float(np.mean(differences)),
                "worst_picture": float(np.max(differences)),
            }
        )
    return rows


def over(items: Sequence[Any], action: Callable[[Any], object]) -> Callable[[int], Cost]:
    """A contender that applies `action` to all items in each round."""
    return lambda number: time_here(len(items), lambda: [action(item) for item in items])


def encode(picture: Image.Image, quality: int, colour: str) -> bytes:
    """A JPEG of the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=COLOURS[colour])
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The image in a JPEG, decoded by Pillow."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def pixels(picture: Image.Image) -> np.ndarray:
    """The image as signed integers (H, W, 3)."""
    return np.asarray(picture, dtype=np.int16)


def per_second(milliseconds: float | None) -> float | None:
    """The number per second."""
    return 1000 / milliseconds if milliseconds else None
