"""What a captioned picture's JSON says, and the index of a shard of such samples. Imports no torch."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from captioner.shards.format import Member, ShardIndex
from captioner.vocabulary import count_words, tokenize

MAX_LENGTH = 65_535  # a longer caption's length, in tokens, is written as this
CAPTION_ENDINGS = ("json", "txt", "caption", "captions", "text")  # of the fields that hold captions

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The content of `KEY.json`; `width` and `height` are the original picture's, in pixels, upright.

    `tokens` holds each caption's token strings, `annotation_ids` the source's id of each caption (or None).
    """

    image_id: int | str
    file_name: str
    width: int
    height: int
    captions: list[str]
    tokens: list[list[str]]
    annotation_ids: list[int | str | None]

    def to_json(self) -> bytes:
        """The member's bytes, pure ASCII so that any text survives; equal samples give equal bytes."""
        fields = {name: getattr(self, name) for name in Sample.__slots__}  # asdict would copy every token
        return json.dumps(fields, separators=(",", ":")).encode()


SAMPLE_FIELDS = frozenset(field.name for field in fields(Sample))
CAPTION_FIELDS = ("captions", "caption", "text")  # where the JSON of other people's shards has them


def read_content(data: bytes | bytearray, *, key: str) -> dict[str, Any]:
    """A caption member's `image_id`, `captions` and `tokens`, with whatever else a `Sample` has.

    Of shards made elsewhere it is a JSON object with one of CAPTION_FIELDS, or text with a caption in each line that
    is not empty; their `image_id` is the key, and their captions are tokenized here. Raises ValueError where there is
    no caption.
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


# ---- index ------------------------------------------------------------------------------------------------


def is_caption_field(field: str) -> bool:
    """Whether a field of a captioned picture's index (it has two) holds the captions, not the picture."""
    return field.rpartition(".")[2] in CAPTION_ENDINGS


class CaptionFields:
    """The fields that hold captions, for a ShardReader that needs no pictures."""

    def __contains__(self, field: object) -> bool:
        return isinstance(field, str) and is_caption_field(field)


def split_pair(sample: Mapping[str, Content]) -> tuple[Content, Content]:
    """What a captioned picture's two fields hold: the picture's and the captions'. Raises ValueError for others."""
    (picture,) = (content for field, content in sample.items() if not is_caption_field(field))
    (captions,) = (content for field, content in sample.items() if is_caption_field(field))
    return picture, captions


def build_index(
    keys: Sequence[str],
    members: Sequence[Mapping[str, Member]],
    tokens: Sequence[Sequence[Sequence[str]]],
    facts: dict[str, Any],
) -> ShardIndex:
    """The index of captioned pictures in order: keys, members (picture and captions) and the tokens of the captions.

    The lengths of sample s's captions, in tokens, are `caption_lengths[first_caption[s]:first_caption[s + 1]]`; `words`
    is JSON that counts the shard's tokens.
    """
    num_captions = [len(captions) for captions in tokens]
    lengths = [min(len(caption), MAX_LENGTH) for captions in tokens for caption in captions]
    words = count_words(caption for captions in tokens for caption in captions)
    words_json = json.dumps(words, sort_keys=True, separators=(",", ":"))
    optional = {
        "first_caption": np.cumsum([0, *num_captions], dtype=np.int64),
        "caption_lengths": np.array(lengths, dtype=np.uint16),
        "words": np.frombuffer(words_json.encode(), dtype=np.uint8),
    }
    return ShardIndex.of(list(zip(keys, members, strict=True)), facts, optional)


def picture_spans(index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """The offsets and sizes, (S,) in bytes, of a shard's pictures. Raises ValueError where it holds other samples."""
    is_picture = np.array([not is_caption_field(field) for field in index.fields], dtype=bool)
    pictures = np.flatnonzero(is_picture[index.member_fields_M])
    places = np.arange(len(index) + 1)
    if not (np.array_equal(index.first_member, 2 * places) and np.array_equal(pictures // 2, places[:-1])):
        raise ValueError("its samples are not a picture with captions each")
    return index.offsets_M[pictures], index.sizes_M[pictures]


def words_of(index: ShardIndex) -> Counter[str]:
    """How often each token occurs in the captions of a shard."""
    return Counter(json.loads(index.optional["words"].tobytes() if "words" in index.optional else "{}"))
