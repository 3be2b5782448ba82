"""What a captioned picture's JSON says, and the index of a shard of such samples. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from captioner.shards.format import Member, ShardIndex
from captioner.vocabulary import count_words, tokenize

MAX_LENGTH = 65_535  # a longer caption's length, in tokens, is written as this


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


def build_index(
    keys: Sequence[str],
    members: Sequence[tuple[Member, Member]],
    tokens: Sequence[Sequence[Sequence[str]]],
    facts: dict[str, Any],
) -> ShardIndex:
    """The index of samples in order: their keys, (image, JSON) members and the tokens of their captions."""
    num_captions = [len(captions) for captions in tokens]
    lengths = [min(len(caption), MAX_LENGTH) for captions in tokens for caption in captions]
    words = count_words(caption for captions in tokens for caption in captions)
    pairs = [(image.offset, text.offset, image.size, text.size, image.crc32, text.crc32) for image, text in members]
    table = np.array(pairs, dtype=np.int64).reshape(len(keys), 3, 2)
    names = [key.encode(errors="surrogateescape") for key in keys]
    return ShardIndex(
        keys_S=np.array(names, dtype=f"S{max(map(len, names), default=1)}"),
        offsets_S2=np.ascontiguousarray(table[:, 0]),
        sizes_S2=np.ascontiguousarray(table[:, 1]),
        crc32s_S2=table[:, 2].astype(np.uint32),
        first_caption=np.cumsum([0, *num_captions], dtype=np.int64),
        caption_lengths=np.array(lengths, dtype=np.uint16),
        facts=facts,
        words_json=json.dumps(words, sort_keys=True, separators=(",", ":")),
    )
