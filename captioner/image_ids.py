"""Ids of images as JSON files give them: whole numbers or text, and in some pairs of files the one for the other."""

from collections import Counter
from collections.abc import Collection
from typing import Any

ImageId = int | str


def as_image_id(value: Any) -> ImageId | None:
    """A number or text as an id, 7.0 as 7 (which tables make of it); None for all that is no id."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


class ImageIds:
    """The ids of one file, to find those of another one among them."""

    def __init__(self, known: Collection[ImageId]) -> None:
        self._known = set(known)
        texts = Counter(map(str, self._known))
        self._by_text = {str(own): own for own in self._known if texts[str(own)] == 1}

    def find(self, wanted: ImageId) -> ImageId | None:
        """The same id, or else the only one that reads the same, as 1 for "1"; None where there is none."""
        return wanted if wanted in self._known else self._by_text.get(str(wanted))
