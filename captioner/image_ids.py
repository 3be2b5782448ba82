"""Image ids in JSON files: integers or text; two files may write the same id differently (1 and "1")."""

from collections import Counter
from collections.abc import Collection
from typing import Any

ImageId = int | str


def as_image_id(value: Any) -> ImageId | None:
    """A number or text as an id; 7.0, as tables write 7, becomes 7. None for any other value."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


class ImageIds:
    """The ids of one file, in which ids of another file can be looked up."""

    def __init__(self, known: Collection[ImageId]) -> None:
        self._known = set(known)
        texts = Counter(map(str, self._known))
        self._by_text = {str(own): own for own in self._known if texts[str(own)] == 1}

    def find(self, wanted: ImageId) -> ImageId | None:
        """The equal id, or else the only id with the same text (1 for "1"); None if there is none."""
        return wanted if wanted in self._known else self._by_text.get(str(wanted))
