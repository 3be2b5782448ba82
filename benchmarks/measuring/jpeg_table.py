"""What a stored JPEG's quality and colour resolution cost: bytes, encoding, reading, and truth to the picture."""

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
    ways = [(quality, colour) for quality in QUALITIES for colour in COLOURS]
    stored = {way: [encode(picture, *way) for picture in pictures] for way in ways}
    contenders: dict[tuple[str, int, str], Callable[[int], Cost | None]] = {}
    for way in ways:
        contenders["encode", *way] = over(pictures, lambda picture, way=way: encode(picture, *way))
        contenders["Pillow", *way] = over(stored[way], decode)
        if loading._has_native_lanczos():
            contenders["torchvision", *way] = over(stored[way], decode_natively)
    costs = take_turns({" ".join(map(str, name)): turn for name, turn in contenders.items()}, rounds=rounds)

    def cpu_ms(task: str, way: tuple[int, str]) -> float | None:
        return median_of(costs.get(f"{task} {way[0]} {way[1]}", []), figure="cpu_ms")

    rows = []
    for way in ways:
        pairs = zip(pictures, stored[way], strict=True)
        differences = [np.abs(pixels(picture) - pixels(decode(data))).mean() for picture, data in pairs]
        rows.append(
            {
                "quality": way[0],
                "colour": way[1],
                "kB": sum(map(len, stored[way])) / len(stored[way]) / 1000,
                "encode_ms": cpu_ms("encode", way),
                "decode_ms_Pillow": cpu_ms("Pillow", way),
                "a_CPU_second_Pillow": per_second(cpu_ms("Pillow", way)),
                "decode_ms_torchvision": cpu_ms("torchvision", way),
                "a_CPU_second_torchvision": per_second(cpu_ms("torchvision", way)),
                "mean_difference": float(np.mean(differences)),
                "worst_picture": float(np.max(differences)),
            }
        )
    return rows


def over(items: Sequence[Any], action: Callable[[Any], object]) -> Callable[[int], Cost]:
    """A contender that does the same to all items in each round."""
    return lambda number: time_here(len(items), lambda: [action(item) for item in items])


def encode(picture: Image.Image, quality: int, colour: str) -> bytes:
    """A JPEG of the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=COLOURS[colour])
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The picture in a JPEG, as Pillow reads it."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def decode_natively(data: bytes) -> object:
    """The pixels in a JPEG, as torchvision reads them."""
    import torch
    from torchvision.io import ImageReadMode

    return torch.ops.image.decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB.value, False
    )


def pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) as signed numbers."""
    return np.asarray(picture, dtype=np.int16)


def per_second(milliseconds: float | None) -> float | None:
    """How many fit into a second."""
    return 1000 / milliseconds if milliseconds else None
