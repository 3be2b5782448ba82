"""Loaders of captioned images: ours, that of an earlier commit, peers, the book's, and decoding alone.

All but the book's do the same with a sample: decode natively, crop at random, mirror with probability 1/2, look up the
ids of the stored tokens and pack them; a batch is uint8. They yield the images of their batches.
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from contenders.loader import BATCHES_AHEAD, Contender, loader_options, read_members

OURS, EARLIER, BOOK, DECODE = "ours", "1b46dbb", "the book's loader", "decode as ours"
EARLIER_QUALITY = {"quality": 95, "subsampling": "4:4:4"}
EARLIER_SAMPLE_BYTES = 42_600
PEERS = ("webdataset", "litdata", "mosaicml-streaming")
WITH_OUR_DECODER = "litdata with our decoder"
CROP, MAX_TOKENS = 224, 20
SHUFFLE_BUFFER = 1000  # samples in the shuffle buffer of a webdataset worker
IN_MEMORY = 2560  # images that the loop decodes repeatedly
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAPTIONS = "captions.json"
SHARDS, EARLIER_SHARDS = "shards", "earlier-shards"


# ---- samples as they are stored ---------------------------------------------------------------------------


def read_samples(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """Each sample's image and captions."""
    members = read_members(folder / SHARDS)
    yield from zip(members, members, strict=True)


def find_vocabulary(shards: Path) -> Any:
    """The shards' vocabulary."""
    from captioner.vocabulary import read_vocabulary

    return read_vocabulary(str(shards / "vocabulary.json"), remedy="pack again")


# ---- a sample in the peers' loaders ------------------------------------------------------------------------


class View:
    """Turns a sample's stored bytes into a uint8 view (P, P, 3) and the ids of its captions."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary = find_vocabulary(folder / SHARDS)

    def __call__(self, picture: bytes, text: bytes) -> tuple[Any, list[list[int]]]:
        pixels_HW3 = self.decode(picture)
        top, left = (random.randint(0, side - CROP) for side in pixels_HW3.shape[:2])
        view_PP3 = pixels_HW3[top : top + CROP, left : left + CROP]
        if random.random() < 0.5:
            view_PP3 = view_PP3.flip(1)
        return view_PP3, [self.vocabulary.encode(caption) for caption in json.loads(text)["tokens"]]

    @staticmethod
    def decode(picture: bytes) -> Any:
        """Pixels (height, width, 3), uint8, by torchvision's native decoder."""
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        content = torch.frombuffer(bytearray(picture), dtype=torch.uint8)
        pixels_3HW: Any = decode_jpeg(content, mode=ImageReadMode.RGB)
        return pixels_3HW.permute(1, 2, 0)


class OurDecoderView(View):
    """The same with our decoder, which is simplejpeg's."""

    @staticmethod
    def decode(picture: bytes) -> Any:
        """Pixels (height, width, 3), uint8."""
        import torch

        from captioner.images.loading import decode_stored

        return torch.from_numpy(decode_stored(bytes(picture)))


def collate(samples: Sequence[tuple[Any, list[list[int]]]]) -> tuple[Any, Any]:
    """Stacked views, which a worker writes directly into shared memory, and packed captions."""
    from torch.utils.data import default_collate

    from captioner.model.captions import PackedCaptions

    views, captions = zip(*samples, strict=True)
    texts = list(chain.from_iterable(captions))
    tokens, lengths = list(chain.from_iterable(texts)), list(map(len, texts))
    packed = PackedCaptions.pack(tokens, lengths, list(map(len, captions)), max_tokens=MAX_TOKENS)
    return default_collate(list(views)), packed


# ---- the contenders ---------------------------------------------------------------------------------------


def ours(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[Any]:
    """Iterate as train/main.py does."""
    from captioner.streaming.dataset import read_split
    from train.data.batches import caption_loader

    shards = folder / SHARDS
    loader = caption_loader(
        read_split([str(shards)], "train"),
        batch_size=batch,
        vocabulary=find_vocabulary(shards),
        crop=CROP,
        max_tokens=MAX_TOKENS,
        training=True,
        references=False,
        num_workers=workers,
        prefetch_batches=BATCHES_AHEAD,
    )
    loader.set_epoch(epoch)
    for parts in loader:
        yield parts[0].inputs


def earlier(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[Any]:
    """Iterate as train/main.py did at commit EARLIER, with that commit's code."""
    from train.split import read_split  # type: ignore
    from train.stream import BatchStream, Share, ViewRules  # type: ignore

    split: Any = read_split([str(folder / EARLIER_SHARDS)], "train", remedy="pack again")  # of that commit
    stream = BatchStream(
        split,
        plan=split.plan(seed=0, epoch=epoch, global_batch=batch),
        share=Share(batch),
        rules=ViewRules(crop=CROP, max_tokens=MAX_TOKENS, training=True),
        vocabulary=find_vocabulary(folder / EARLIER_SHARDS),
        workers=workers,
    )
    for made in stream:
        yield made.inputs


def plain_webdataset(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[Any]:
    """webdataset's own reader on the same tars: shuffled tars, a shuffle buffer, batches made in workers."""
    import webdataset as wds

    view = View(folder)
    tars = sorted(map(str, (folder / SHARDS).glob("*.tar")))
    dataset: Any = wds.WebDataset(tars, shardshuffle=len(tars), seed=epoch)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).map(lambda sample: view(sample["jpg"], sample["json"]))
    dataset = dataset.batched(batch, collation_fn=collate, partial=False)
    for views_BPP3, _ in wds.WebLoader(dataset, batch_size=None, **loader_options(workers)):
        yield views_BPP3


def litdata(folder: Path, *, batch: int, workers: int, epoch: int, view_type: type[View] = View) -> Iterator[Any]:
    """Chunks of the JPEGs' bytes, written by litdata's `optimize`."""
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore

    view = view_type(folder)

    class Samples(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            picture, text = super().__getitem__(index)
            return view(picture, bytes(text))

    dataset = Samples(str(folder / "litdata"), shuffle=True, drop_last=True, seed=epoch)
    loader = StreamingDataLoader(dataset, batch_size=batch, collate_fn=collate, **loader_options(workers))
    for views_BPP3, _ in loader:
        yield views_BPP3


def write_litdata(folder: Path) -> None:
    """Write litdata's chunks."""
    from litdata import optimize  # type: ignore

    optimize(read_samples, inputs=[folder], output_dir=str(folder / "litdata"), chunk_bytes="64MB", num_workers=1)


def mosaicml(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[Any]:
    """Shards of the JPEGs' bytes in MosaicML's format."""
    from streaming.base.util import clean_stale_shared_memory  # type: ignore
    from torch.utils.data import DataLoader

    from streaming import StreamingDataset  # type: ignore

    view = View(folder)

    class Samples(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return view(sample["jpg"], sample["json"])

    clean_stale_shared_memory()
    dataset = Samples(local=str(folder / "mds"), shuffle=True, shuffle_seed=epoch, batch_size=batch)
    for views_BPP3, _ in DataLoader(dataset, batch_size=batch, collate_fn=collate, **loader_options(workers)):
        yield views_BPP3


def write_mosaicml(folder: Path) -> None:
    """Write MosaicML's shards."""
    from streaming import MDSWriter  # type: ignore

    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "json": "bytes"}) as writer:
        for picture, text in read_samples(folder):
            writer.write({"jpg": picture, "json": text})


def book(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[Any]:
    """The book's loader: loose files, one caption a sample, Pillow, floats, NLTK for each sample.

    NLTK needs no downloaded model here (`preserve_line`), which saves it a little time.
    """
    import torch
    from nltk.tokenize import word_tokenize
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from captioner.vocabulary import END, START

    vocabulary = find_vocabulary(folder / SHARDS)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    captions_of: dict[str, list[str]] = json.loads((folder / "loose" / CAPTIONS).read_text())

    class Captions(Dataset):
        samples = tuple((name, caption) for name, captions in captions_of.items() for caption in captions)

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            name, caption = self.samples[index]
            image = transform(Image.open(folder / "loose" / name).convert("RGB"))
            tokens = word_tokenize(caption.lower(), preserve_line=True)
            return image, torch.Tensor([START, *vocabulary.encode(tokens), END])

    def collate_captions(samples: list[tuple[Any, Any]]) -> tuple[Any, Any, list[int]]:
        samples.sort(key=lambda sample: len(sample[1]), reverse=True)
        pictures, captions = zip(*samples, strict=True)
        lengths = [len(caption) for caption in captions]
        targets = torch.zeros(len(captions), max(lengths)).long()
        for number, caption in enumerate(captions):
            targets[number, : lengths[number]] = caption
        return torch.stack(pictures, 0), targets, lengths

    torch.manual_seed(epoch)
    options = loader_options(workers) | {"shuffle": True, "collate_fn": collate_captions}
    for images_B3PP, _, _ in DataLoader(Captions(), batch_size=batch, **options):
        yield images_B3PP


def write_loose(folder: Path) -> None:
    """Write the book's files: one JPEG an image, and all captions in one file."""
    loose = folder / "loose"
    loose.mkdir()
    captions = {}
    for number, (picture, text) in enumerate(read_samples(folder)):
        name = f"{number:06d}.jpg"
        (loose / name).write_bytes(picture)
        captions[name] = json.loads(text)["captions"]
    (loose / CAPTIONS).write_text(json.dumps(captions))


# ---- decoding alone ---------------------------------------------------------------------------------------


def decode(folder: Path, *, batch: int, workers: int, epoch: int) -> Iterator[None]:
    """Our decoder on stored JPEGs in memory; `batch` images per iteration."""
    from captioner.images import loading

    pictures = cycle([picture for picture, _ in islice(read_samples(folder), IN_MEMORY)])
    buffer = np.empty(1 << 20, dtype=np.uint8)  # new memory for each image would take longer
    while True:
        for picture in islice(pictures, batch):
            loading.decode_stored(picture, buffer=buffer)
        yield None


PICTURE_LOADERS = {
    OURS: Contender(package="torch", modules=("train.data.batches",), open_epoch=ours),
    EARLIER: Contender(package="torch", modules=("train.stream",), open_epoch=earlier),
    "webdataset": Contender(package="webdataset", modules=("captioner.model.captions",), open_epoch=plain_webdataset),
    "litdata": Contender(
        package="litdata", modules=("litdata", "captioner.model.captions"), open_epoch=litdata, write=write_litdata
    ),
    WITH_OUR_DECODER: Contender(
        package="litdata",
        modules=("litdata", "captioner.model.captions", "captioner.images.loading"),
        open_epoch=partial(litdata, view_type=OurDecoderView),
    ),
    "mosaicml-streaming": Contender(
        package="mosaicml-streaming",
        modules=("streaming", "captioner.model.captions"),
        open_epoch=mosaicml,
        write=write_mosaicml,
    ),
    BOOK: Contender(
        package="pillow", modules=("nltk.tokenize", "torchvision.transforms"), open_epoch=book, write=write_loose
    ),
    DECODE: Contender(package="simplejpeg", modules=("captioner.images.loading",), open_epoch=decode),
}
