"""Decodes one uploaded image in a worker process. Imports no torch.

Shapes: P side of a view in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from captioner.images import silence_pillow
from captioner.images.loading import MAX_PIXELS, ImageError, read_size
from captioner.images.views import ViewSpec
from infer.listing import ImageFile
from infer.reading import DecodedImage, blame, decode_image


@dataclass(frozen=True, slots=True)
class Upload(ImageFile):
    """An uploaded file: `root` is empty, `path` its name. Its header is checked before `read` returns the bytes."""

    data: bytes = field(default=b"", repr=False, compare=False)
    max_pixels: int = MAX_PIXELS

    def read(self, *, max_bytes: int) -> bytes:
        """The file's bytes. Raises ImageError for an image of more pixels than are allowed."""
        width, height = read_size(self.data)
        if width * height > self.max_pixels:
            raise ImageError("too large", f"{width}x{height} pixels, {self.max_pixels:,} are allowed: shrink it")
        return self.data


def decode_upload(
    upload: Upload,
    view: ViewSpec,
    with_torch: bool,
    max_seconds: float,
    *,
    excluded: dict[int, int | None],
    set_index: Callable[[int], None],
    report: object,
) -> tuple[DecodedImage, np.ndarray]:
    """The image without its bytes, and its view (P, P, 3), uint8, which holds nothing if the image has an error."""
    silence_pillow()
    view_PP3 = np.empty((view.crop, view.crop, 3), np.uint8)
    if excluded:
        image = DecodedImage(upload, error=blame(excluded[0], max_seconds=max_seconds))
    else:
        set_index(0)
        image = decode_image(upload, view, out_PP3=view_PP3, with_torch=with_torch)
    return replace(image, file=ImageFile(upload.root, upload.path)), view_PP3
