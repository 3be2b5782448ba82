"""Captioned images in shards: the content of the captions' member, and the shard's index. Imports no torch."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from captioner.shards.format import INDEX, Member, ShardIndex
from captioner.vocabulary import Vocabulary, count_words, tokenize

MAX_LENGTH = 65_535  # a longer caption's length, in tokens, is written as this
SIDE_WORDS = re.compile(r"\b(left|right)")  # also "upper-left", "right-hand", "leftmost"
CAPTION_EXTENSIONS = ("json", "txt", "caption", "captions", "text")  # of the fields that hold captions

Content = TypeVar("Content")
ImageId = int | str  # two files may write the same id differently: 1 and "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionContent:
    """The content of `KEY.json`; `width` and `height` are the original image's, in pixels, upright.

    `tokens` holds each caption's token strings, `annotation_ids` the source's id of each caption (or None).
    """

    image_id: ImageId
    file_name: str
    width: int
    height: int
    captions: list[str]
    tokens: list[list[str]]
    annotation_ids: list[int | str | None]

    def to_json(self) -> bytes:
        """The member's bytes, pure ASCII so that any text survives; equal contents give equal bytes."""
        fields = {name: getattr(self, name) for name in CaptionContent.__slots__}  # asdict would copy every token
        return json.dumps(fields, separators=(",", ":")).encode()


SAMPLE_FIELDS = frozenset(field.name for field in fields(CaptionContent))
CAPTION_FIELDS = ("captions", "caption", "text")  # of the JSON in shards of other programs


def read_content(data: bytes | bytearray, *, key: str) -> dict[str, Any]:
    """The `image_id`, `captions` and `tokens` in a caption member, and the rest of a CaptionContent where it is one.

    In shards of other programs the member is a JSON object with one of CAPTION_FIELDS, or text with a caption in each
    line; their `image_id` is the key, and their captions are tokenized here. Raises ValueError if there is no caption.
    """
    text = data.decode("utf-8-sig")
    try:
        content = json.loads(text) if text.lstrip().startswith("{") else None
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except ValueError:
        content = None  # a caption may well start with a bracket
    if content is not None and content.keys() >= SAMPLE_FIELDS:
        return content
    found = text.splitlines() if content is None else next((content[f] for f in CAPTION_FIELDS if content.get(f)), [])
    lines = [found] if isinstance(found, str) else found
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"captions that are no text: {str(found)[:80]}")
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError("there is no caption")
    "".join(captions).encode()  # halves of surrogate pairs can be neither shown nor written
    return {"image_id": key, "captions": captions, "tokens": [tokenize(caption) for caption in captions]}


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


# ---- index ------------------------------------------------------------------------------------------------


def is_caption_field(field: str) -> bool:
    """Whether this one of a captioned image's two fields holds the captions."""
    return field.rpartition(".")[2] in CAPTION_EXTENSIONS


def is_image_field(field: str) -> bool:
    """Whether this field of a sample is the image: neither the captions nor where the sample is."""
    return field[:2] != "__" and not is_caption_field(field)


@dataclass(frozen=True, slots=True)
class CaptionedFields:
    """The set of fields to read of captioned images: images, captions, both or none; always the shard's index."""

    images: bool
    captions: bool

    def __contains__(self, field: object) -> bool:
        return field == INDEX or (self.captions if is_caption_field(str(field)) else self.images)


def split_pair(sample: Mapping[str, Content]) -> tuple[Content, Content]:
    """The contents of the image field and of the caption field. Raises ValueError unless there is one of each."""
    (image,) = (content for field, content in sample.items() if not is_caption_field(field))
    (captions,) = (content for field, content in sample.items() if is_caption_field(field))
    return image, captions


def build_index(
    keys: Sequence[str],
    members: Sequence[Mapping[str, Member]],
    tokens: Sequence[Sequence[Sequence[str]]],
    facts: dict[str, Any],
) -> ShardIndex:
    """The index of captioned images in order: keys, members (image and captions) and the tokens of the captions.

    The lengths of sample s's captions, in tokens, are `caption_lengths[first_caption[s]:first_caption[s + 1]]`. `words`
    is JSON that counts the shard's different tokens, in sorted order; `tokens` holds the captions' tokens one after the
    other, each as its index in `words`.
    """
    captions = [caption[:MAX_LENGTH] for captions in tokens for caption in captions]
    words = dict(sorted(count_words(caption for captions in tokens for caption in captions).items()))
    number_of = {word: number for number, word in enumerate(words)}
    numbers = [number_of[token] for caption in captions for token in caption]
    optional = {
        "first_caption": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        "caption_lengths": np.array([len(caption) for caption in captions], dtype=np.uint16),
        "words": np.frombuffer(json.dumps(words, separators=(",", ":")).encode(), dtype=np.uint8),
        "tokens": np.array(numbers, dtype=np.uint16 if len(words) <= 1 << 16 else np.uint32),
    }
    return ShardIndex.of(list(zip(keys, members, strict=True)), facts, optional)


class CaptionTokens:
    """The captions of a shard as ids of a vocabulary, from the arrays of the shard's index, which are not copied."""

    def __init__(self, optional: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> None:
        words = list(json.loads(optional["words"].tobytes()))
        self._ids = np.array(vocabulary.encode(words), dtype=np.int64)
        self._tokens, self._lengths = optional["tokens"], optional["caption_lengths"]
        self._first_caption = optional["first_caption"].data  # single numbers are read faster from memory views
        first_token = np.concatenate(([0], np.cumsum(self._lengths, dtype=np.int64)))[optional["first_caption"]]
        self._first_token = first_token.data
        is_side = np.array([SIDE_WORDS.search(word) is not None for word in words], dtype=bool)
        num_sides = np.concatenate(([0], np.cumsum(is_side[self._tokens])))[first_token]
        self._mentions_sides = (np.diff(num_sides) > 0).data

    def of(self, sample: int) -> tuple[np.ndarray, list[int]]:
        """The ids of all captions of the shard's sample, and the length of each caption."""
        tokens = self._tokens[self._first_token[sample] : self._first_token[sample + 1]]
        lengths = self._lengths[self._first_caption[sample] : self._first_caption[sample + 1]]
        return self._ids[tokens], lengths.tolist()

    def mentions_sides(self, sample: int) -> bool:
        """Whether a caption would become wrong if its image were mirrored."""
        return bool(self._mentions_sides[sample])


def image_spans(index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """The offsets and sizes, (S,) in bytes, of a shard's images. Raises ValueError where it holds other samples."""
    is_image = np.array([not is_caption_field(field) for field in index.fields], dtype=bool)
    images = np.flatnonzero(is_image[index.member_fields_M])
    indices = np.arange(len(index) + 1)
    if not (np.array_equal(index.first_member, 2 * indices) and np.array_equal(images // 2, indices[:-1])):
        raise ValueError("its samples are not an image with captions each")
    return index.offsets_M[images], index.sizes_M[images]


def words_of(index: ShardIndex) -> Counter[str]:
    """How often each token occurs in the captions of a shard."""
    return Counter(json.loads(index.optional["words"].tobytes() if "words" in index.optional else "{}"))
