"""Captioned images to batches of views, or of cached features, and packed captions: what the loader's workers do.

Shapes: B samples, P sides of a view in pixels, F features of an image or of a position, R positions of a grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from captioner.errors import UserError
from captioner.images import loading, silence_pillow, views
from captioner.model.captions import PackedCaptions
from captioner.samples import CaptionedFields, CaptionTokens, is_caption_field, is_image_field, read_content
from captioner.shards.format import INDEX, RESTORE
from captioner.shards.splitmix import random_bits
from captioner.streaming import SampleError, StreamingLoader, batch_buffer
from captioner.streaming.dataset import Split
from captioner.streaming.order import SAMPLE_CHANCE
from captioner.streaming.worker import MAX_OPEN_FILES
from captioner.vocabulary import Vocabulary
from train.data.features import FeatureFile, FeatureFiles

if TYPE_CHECKING:
    from accelerate import Accelerator

Function = TypeVar("Function", bound=Callable[..., Any])

PINNED_FOR = ("cuda", "xpu")  # device types that copy from page-locked memory asynchronously


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """A rank's samples of a global batch, or a micro-batch of them: uint8 views (B, P, P, 3), or features.

    Features are pooled, float32 (B, F), or grids, float16 (B, R, F). All captions of the samples come with them. A rank
    without samples of a micro-batch gets a filler: one row of zeros and an empty caption, with `num_samples` 0, so that
    it joins the step with zero loss. `positions` are those in the epoch, `num_cut` counts the captions that were cut.
    `image_ids` and the raw captions, `references`, are empty unless the loader reads them.
    """

    inputs: Tensor
    captions: PackedCaptions
    positions: list[int]
    keys: list[str]
    image_ids: list[int | str]
    references: list[list[str]]
    num_cut: int

    @property
    def num_samples(self) -> int:
        """Samples in the batch, none in a filler."""
        return len(self.positions)

    @property
    def num_targets(self) -> int:
        """Tokens to be predicted, none in a filler."""
        return len(self.captions.targets_M) if self.positions else 0

    def to(self, device: torch.device) -> "CaptionBatch":
        """The batch with its tensors on `device`; the copy from page-locked memory is asynchronous.

        Other memory might be reused before it is copied, so that copy is waited for.
        """
        may_pin = device.type in PINNED_FOR  # `is_pinned` would load CUDA for a run on the CPU
        return self._map(lambda tensor: tensor.to(device, non_blocking=may_pin and tensor.is_pinned()))

    def pin_memory(self) -> "CaptionBatch":
        """The batch with its tensors in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "CaptionBatch":
        return replace(self, inputs=change(self.inputs), captions=self.captions.map(change))


def _not_random(function: Function) -> Function:
    """The function, marked so that the loader seeds no generators for it: its random bits come from the position."""
    function.is_random = False  # type: ignore[attr-defined]
    return function


class FilledRow(NamedTuple):
    """A sample whose view, or features, is in the buffer: its micro-batch, position, key and captions as ids."""

    micro_batch: int
    position: int
    key: str
    tokens: np.ndarray
    lengths: list[int]
    content: dict[str, Any]


@dataclass(kw_only=True)
class CaptionPipeline:
    """The `decode`, `transform` and `collate` of a loader whose global batches have `batch_size` samples.

    Views are cropped at random and sometimes mirrored, by functions of (`seed`, epoch, position); without a seed the
    centre is taken. With `features` these are read instead of images; with `mirrored_features`, too, in training one of
    both, as images would be mirrored.

    A rank's batch comes in `accumulation_steps` micro-batches: number m of A has the samples whose offset i in the
    global batch has i mod A = m, of all ranks together: the same ones on any number of ranks. A global batch of n < A
    samples has n micro-batches, and fillers after them.
    """

    split: Split
    vocabulary: Vocabulary
    crop: int
    max_tokens: int
    batch_size: int
    world_size: int = 1
    accumulation_steps: int = 1
    seed: int | None = None
    features: FeatureFiles | None = None
    mirrored_features: FeatureFiles | None = None
    _batch: tuple[int, int] | None = field(init=False, default=None)  # epoch and step of what is in the buffer
    _last: int = field(init=False, default=-1)
    _buffer: Tensor | None = field(init=False, default=None)
    _rows: Any = field(init=False, default=None)  # the buffer as an array, whose rows cost less to take
    _random_bits: list[int] = field(init=False, default_factory=list)  # of the samples of the global batch
    _pixels: np.ndarray = field(init=False, default_factory=lambda: np.empty(0, dtype=np.uint8))  # of a stored image
    _filled: list[int] = field(init=False, default_factory=list)  # rows of each micro-batch
    _open_features: dict[tuple[bool, int], FeatureFile] = field(init=False, default_factory=dict)  # (mirrored, shard)
    _captions: dict[int, CaptionTokens] = field(init=False, default_factory=dict)  # of a shard

    @cached_property
    def recipes(self) -> list[dict[str, Any]]:
        """How each shard was packed."""
        return [manifest.settings for manifest in self.split.manifests for _ in manifest.shards]

    @property
    def micro_batch_rows(self) -> int:
        """Rows of a micro-batch, at most."""
        return self.batch_size // self.world_size // self.accumulation_steps

    def stages(self, *, references: bool) -> dict[str, Any]:
        """The StreamingLoader's options that make it read batches, with the captions themselves if `references`."""
        return {
            "fields": CaptionedFields(images=self.features is None, captions=references),
            "decode": self.parse if references else None,
            "transform": self.transform,
            "collate": self.collate,
        }

    # ---- a sample -----------------------------------------------------------------------------------------

    @staticmethod
    def parse(sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with its captions' `__content__`. Raises SampleError."""
        captions = next((content for name, content in sample.items() if is_caption_field(name)), b"")
        try:
            sample["__content__"] = read_content(captions, key=sample["__key__"])
        except ValueError as error:
            message = f"sample {sample['__key__']} in {sample['__url__']} has no captions ({error}): {RESTORE}"
            raise SampleError("no captions", message) from error
        return sample

    @_not_random
    def transform(self, sample: dict[str, Any], _rng: object = None) -> FilledRow:
        """Write a sample's view, or features, into the batch's buffer. Raises SampleError and UserError."""
        position, index = sample["__position__"], sample["__index_in_shard__"]
        captions = self._captions_of(sample)
        micro_batch = self._micro_batch_of(sample["__epoch__"], position)
        row = self._rows[micro_batch * self.micro_batch_rows + self._filled[micro_batch]]
        bits = self._random_bits[position % self.batch_size] if self._random_bits else None
        mirrored = bits is not None and bool(bits >> 63) and not captions.mentions_sides(index)
        if self.features is None:
            self._fill_view(row, sample, random_bits=bits, mirrored=mirrored)
        else:
            self._feature_file(sample, mirrored=mirrored).read_into(row, index)
        self._filled[micro_batch] += 1
        return FilledRow(micro_batch, position, sample["__key__"], *captions.of(index), sample.get("__content__", {}))

    def _captions_of(self, sample: dict[str, Any]) -> CaptionTokens:
        """The captions of the sample's shard."""
        shard = sample["__shard__"]
        if shard not in self._captions:
            if len(self._captions) == MAX_OPEN_FILES:
                self._captions.pop(next(iter(self._captions)))
            self._captions[shard] = CaptionTokens(sample[INDEX], self.vocabulary)
        return self._captions[shard]

    def _micro_batch_of(self, epoch: int, position: int) -> int:
        """The micro-batch of a sample; the first sample of a batch takes a new buffer."""
        step, offset = divmod(position, self.batch_size)
        if self._batch != (epoch, step) or position <= self._last:
            shape, dtype = self._row_format()
            self._buffer = batch_buffer((self.micro_batch_rows * self.accumulation_steps, *shape), dtype)
            self._rows, self._filled = self._buffer.numpy(), [0] * self.accumulation_steps
            self._batch = epoch, step
            if self.seed is not None:
                positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
                self._random_bits = random_bits(positions, self.seed, epoch, SAMPLE_CHANCE).tolist()
            if get_worker_info() is not None:
                silence_pillow()
        self._last = position
        if self.accumulation_steps == 1:
            return 0
        return offset % min(self.accumulation_steps, self.split.num_samples - step * self.batch_size)

    def _row_format(self) -> tuple[tuple[int, ...], torch.dtype]:
        if self.features is None:
            return (self.crop, self.crop, 3), torch.uint8
        return self.features.row_shape, getattr(torch, self.features.dtype.name)

    def _fill_view(
        self, view_PP3: np.ndarray, sample: dict[str, Any], *, random_bits: int | None, mirrored: bool
    ) -> None:
        pixels_HW3 = self._decode(sample, view_PP3, mirrored=mirrored)
        height, width, _ = pixels_HW3.shape
        if min(height, width) < self.crop:
            raise UserError(f"the shards hold images of {width}x{height}: give a smaller --crop")
        if random_bits is None:
            cut_PP3 = views.eval_view(pixels_HW3, crop=self.crop)
        else:
            cut_PP3 = views.train_view(pixels_HW3, crop=self.crop, random_bits=random_bits)
        if mirrored:
            views.copy_reversed(cut_PP3, view_PP3)
        elif not np.may_share_memory(view_PP3, cut_PP3):
            view_PP3[:] = cut_PP3

    def _feature_file(self, sample: dict[str, Any], *, mirrored: bool) -> FeatureFile:
        """The open file of the sample's features, or of those of its mirror image if there are any."""
        mirrored, shard = mirrored and self.mirrored_features is not None, sample["__shard__"]
        files = self.mirrored_features if mirrored else self.features
        if (mirrored, shard) not in self._open_features:
            if len(self._open_features) == MAX_OPEN_FILES:
                self._open_features.pop(next(iter(self._open_features))).file.close()
            self._open_features[mirrored, shard] = cast(FeatureFiles, files).open(shard)
        return self._open_features[mirrored, shard]

    def _decode(self, sample: dict[str, Any], view_PP3: np.ndarray, *, mirrored: bool) -> np.ndarray:
        """An image's pixels (height, width, 3), uint8, in BGR if they are to be mirrored.

        They are decoded into the view itself if they need no further copy. Images that were stored in their own size
        are squashed here.
        """
        image = next((sample[name] for name in reversed(sample) if is_image_field(name)), b"")
        recipe = self.recipes[sample["__shard__"]]
        size = recipe["size"]
        try:
            if recipe.get("resize") == "none":
                pixels_HW3 = np.array(loading.load_resized(image, size=size, resize="squash")[0])
                return loading.swap_channels(pixels_HW3) if mirrored else pixels_HW3
            if size == self.crop and not mirrored:
                return loading.decode_stored(image, buffer=view_PP3)
            if self._pixels.size < 2 * 3 * size**2:  # enough for a side twice as long as the other
                self._pixels = np.empty(2 * 3 * size**2, dtype=np.uint8)
            return loading.decode_stored(image, channels="BGR" if mirrored else "RGB", buffer=self._pixels)
        except loading.ImageError as error:
            message = f"sample {sample['__key__']} in {sample['__url__']} is not an image ({error}): {RESTORE}"
            raise SampleError("undecodable", message) from error

    # ---- a batch ------------------------------------------------------------------------------------------

    @_not_random
    def collate(self, rows: list[FilledRow]) -> list[CaptionBatch]:
        """The micro-batches of these samples."""
        batches = [
            self._pack([row for row in rows if row.micro_batch == number], number * self.micro_batch_rows)
            for number in range(self.accumulation_steps)
        ]
        self._batch = self._buffer = self._rows = None
        return batches

    def _pack(self, rows: list[FilledRow], first: int) -> CaptionBatch:
        """The micro-batch of samples whose rows begin at `first`; a filler where there are none."""
        if rows and self._buffer is not None:
            inputs = self._buffer[first : first + len(rows)]
        else:
            shape, dtype = self._row_format()
            inputs = torch.zeros((1, *shape), dtype=dtype)
        lengths = [length for row in rows for length in row.lengths] or [0]
        num_captions = [len(row.lengths) for row in rows] or [1]
        tokens_M = np.concatenate([np.empty(0, dtype=np.int64), *(row.tokens for row in rows)])
        return CaptionBatch(
            inputs=inputs,
            captions=PackedCaptions.pack(tokens_M, lengths, num_captions, max_tokens=self.max_tokens),
            positions=[row.position for row in rows],
            keys=[row.key for row in rows],
            image_ids=[row.content["image_id"] for row in rows if row.content],
            references=[row.content["captions"] for row in rows if row.content],
            num_cut=sum(length > self.max_tokens for length in lengths),
        )


def rank_options(accelerator: "Accelerator") -> dict[str, Any]:
    """The options of `caption_loader` that depend on the process and its device."""
    return {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "pin_memory": accelerator.device.type in PINNED_FOR,
    }


def caption_loader(
    split: Split,
    *,
    batch_size: int,
    vocabulary: Vocabulary,
    crop: int,
    max_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    training: bool = False,
    references: bool = True,
    seed: int = 0,
    features: FeatureFiles | None = None,
    mirrored_features: FeatureFiles | None = None,
    **options: Any,
) -> StreamingLoader:
    """The loader of a split's samples; each of its batches is a list of `accumulation_steps` micro-batches.

    For training samples are shuffled, and their views cropped at random; else they come in the split's order. Without
    `references` batches have ids of tokens only, from the shards' indexes: no raw captions and no image ids. `options`
    are those of StreamingLoader. See `CaptionPipeline`.
    """
    pipeline = CaptionPipeline(
        split=split,
        vocabulary=vocabulary,
        crop=crop,
        max_tokens=max_tokens,
        batch_size=batch_size,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        seed=seed if training else None,
        features=features,
        mirrored_features=mirrored_features,
    )
    return StreamingLoader(
        split,
        split=split.name,
        batch_size=batch_size,
        seed=seed,
        shuffle=training,
        **pipeline.stages(references=references),
        rank=rank,
        world_size=world_size,
        **options,
    )
