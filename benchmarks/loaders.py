"""The contenders of streaming.py, each turn in a process of its own: `python -P loaders.py PATHS NAME ... < requests`.

Answers each request, a line of JSON, with another; the first line says which of the named contenders are there. A
turn's process is forked from this one, which has imported everything: start-up is not counted, and nothing is left of
it for the next turn. The peers' Python runs it on its own packages first, and behind them on those in PATHS.

All but the book's loader do the same with a sample: decode natively, crop at random, mirror every other picture, look
up the ids of the stored tokens and pack them; a batch is uint8.
"""

import gc
import importlib
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, cycle, islice, repeat
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BATCH, CROP, MAX_TOKENS = 128, 224, 20
BATCHES_AHEAD = 3  # that each worker makes before they are asked for, as ours does
SHUFFLE_BUFFER = 1000  # samples that a worker of webdataset shuffles among
IN_MEMORY = 20  # batches of pictures that a ceiling decodes over and over
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TAR_BLOCK, PAGE_BYTES = 512, 4096
CAPTIONS = "captions.json"
SHARDS = "shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """`open_epoch(folder, workers=, epoch=)` gives the pictures of its batches, or None for a batch of nothing to keep.

    `folder` holds the shards, and what `write(folder)` made of them where a contender has a format of its own.
    """

    package: str
    modules: tuple[str, ...]
    open_epoch: Callable[..., Iterator[Any]]
    write: Callable[[Path], None] | None = None


# ---- samples as they are stored ---------------------------------------------------------------------------


def read_samples(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """Each sample's picture and captions, out of our own tars: plain USTAR, two members a sample. Checks nothing."""
    for path in sorted((folder / SHARDS).glob("*.tar")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            members = walk_tar(tar)
            yield from zip(members, members, strict=True)


def walk_tar(tar: mmap.mmap) -> Iterator[bytes]:
    """The content of each member of a mapped tar, by its headers."""
    place = 0
    while tar[place]:
        size = int(tar[place + 124 : place + 135], 8)
        place += TAR_BLOCK
        yield tar[place : place + size]
        place += -(-size // TAR_BLOCK) * TAR_BLOCK


def in_batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    """The items in lists of a batch's length; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def find_vocabulary(folder: Path) -> Any:
    """The shards' vocabulary."""
    from captioner.vocabulary import read_vocabulary

    return read_vocabulary(str(folder / SHARDS / "vocabulary.json"), remedy="pack again")


# ---- what the peers do with a sample ----------------------------------------------------------------------


class View:
    """A sample's stored bytes to a uint8 view (P, P, 3) and the ids of its captions."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary = find_vocabulary(folder)

    def __call__(self, picture: bytes, text: bytes) -> tuple[Any, list[list[int]]]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        content = torch.frombuffer(bytearray(picture), dtype=torch.uint8)
        pixels_3HW: Any = decode_jpeg(content, mode=ImageReadMode.RGB)
        top, left = (random.randint(0, side - CROP) for side in pixels_3HW.shape[1:])
        view_3PP = pixels_3HW[:, top : top + CROP, left : left + CROP]
        if random.random() < 0.5:
            view_3PP = view_3PP.flip(2)
        return view_3PP.permute(1, 2, 0), [self.vocabulary.encode(caption) for caption in json.loads(text)["tokens"]]


def collate(samples: Sequence[tuple[Any, list[list[int]]]]) -> tuple[Any, Any]:
    """Stacked views, which a worker puts right into shared memory, and packed captions."""
    from torch.utils.data import default_collate

    from captioner.model import PackedCaptions

    views, captions = zip(*samples, strict=True)
    return default_collate(list(views)), PackedCaptions.pack(captions, max_tokens=MAX_TOKENS)


def loader_options(workers: int) -> dict[str, Any]:
    """Processes, and batches that each makes ahead: the same for every DataLoader."""
    return {"num_workers": workers, "prefetch_factor": BATCHES_AHEAD if workers else None}


# ---- the contenders ---------------------------------------------------------------------------------------


def ours(folder: Path, *, workers: int, epoch: int) -> Iterator[Any]:
    """What train/main.py iterates."""
    from captioner.streaming.dataset import read_split
    from train.batches import caption_loader

    loader = caption_loader(
        read_split([str(folder / SHARDS)], "train", remedy="pack again"), batch_size=BATCH, training=True, crop=CROP,
        max_tokens=MAX_TOKENS, vocabulary=find_vocabulary(folder), num_workers=workers,
    )  # fmt: skip
    loader.set_epoch(epoch)
    for (batch,) in loader:
        yield batch.inputs


def plain_webdataset(folder: Path, *, workers: int, epoch: int) -> Iterator[Any]:
    """webdataset's own reading of the same tars: they are shuffled, then samples in a buffer; workers make batches."""
    import webdataset as wds

    view = View(folder)
    tars = sorted(map(str, (folder / SHARDS).glob("*.tar")))
    dataset: Any = wds.WebDataset(tars, shardshuffle=len(tars), seed=epoch)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).map(lambda sample: view(sample["jpg"], sample["json"]))
    dataset = dataset.batched(BATCH, collation_fn=collate, partial=False)
    for views_BPP3, _ in wds.WebLoader(dataset, batch_size=None, **loader_options(workers)):
        yield views_BPP3


def litdata(folder: Path, *, workers: int, epoch: int) -> Iterator[Any]:
    """Chunks that litdata's `optimize` wrote, of the JPEGs' bytes."""
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore

    view = View(folder)

    class Samples(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            picture, text = super().__getitem__(index)
            return view(picture, bytes(text))

    dataset = Samples(str(folder / "litdata"), shuffle=True, drop_last=True, seed=epoch)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, collate_fn=collate, **loader_options(workers))
    for views_BPP3, _ in loader:
        yield views_BPP3


def write_litdata(folder: Path) -> None:
    """litdata's chunks."""
    from litdata import optimize  # type: ignore

    optimize(read_samples, inputs=[folder], output_dir=str(folder / "litdata"), chunk_bytes="64MB", num_workers=1)


def mosaicml(folder: Path, *, workers: int, epoch: int) -> Iterator[Any]:
    """Shards in MosaicML's format, of the JPEGs' bytes."""
    from streaming.base.util import clean_stale_shared_memory  # type: ignore
    from torch.utils.data import DataLoader

    from streaming import StreamingDataset  # type: ignore

    view = View(folder)

    class Samples(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return view(sample["jpg"], sample["json"])

    clean_stale_shared_memory()
    dataset = Samples(local=str(folder / "mds"), shuffle=True, shuffle_seed=epoch, batch_size=BATCH)
    for views_BPP3, _ in DataLoader(dataset, batch_size=BATCH, collate_fn=collate, **loader_options(workers)):
        yield views_BPP3


def write_mosaicml(folder: Path) -> None:
    """MosaicML's shards."""
    from streaming import MDSWriter  # type: ignore

    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "json": "bytes"}) as writer:
        for picture, text in read_samples(folder):
            writer.write({"jpg": picture, "json": text})


def book(folder: Path, *, workers: int, epoch: int) -> Iterator[Any]:
    """The book's loader: loose files, a caption a sample, Pillow, floats, NLTK when a sample is read.

    NLTK here needs no downloaded model (`preserve_line`), which spares it a little.
    """
    import torch
    from nltk.tokenize import word_tokenize
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from captioner.vocabulary import END, START

    vocabulary = find_vocabulary(folder)
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
    for images_B3PP, _, _ in DataLoader(Captions(), batch_size=BATCH, **options):
        yield images_B3PP


def write_loose(folder: Path) -> None:
    """The book's files: a JPEG a picture, and all captions in one file."""
    loose = folder / "loose"
    loose.mkdir()
    captions = {}
    for number, (picture, text) in enumerate(read_samples(folder)):
        name = f"{number:06d}.jpg"
        (loose / name).write_bytes(picture)
        captions[name] = json.loads(text)["captions"]
    (loose / CAPTIONS).write_text(json.dumps(captions))


# ---- ceilings, in a single loop ---------------------------------------------------------------------------


def decoded_by(decode: Callable[[bytes], Any], folder: Path) -> Iterator[None]:
    """Stored JPEGs that are in memory to whole pictures, a batch's number at a time."""
    pictures = [picture for picture, _ in islice(read_samples(folder), IN_MEMORY * BATCH)]
    for batch in in_batches(cycle(pictures)):
        for picture in batch:
            decode(picture)
        yield None


def decode_as_ours(folder: Path, *, workers: int, epoch: int) -> Iterator[None]:
    """The decoder that we ship."""
    from captioner import images
    from captioner.decoder_output import own_stderr

    with own_stderr():
        yield from decoded_by(images.decode_stored, folder)


def decode_by_simplejpeg(folder: Path, *, workers: int, epoch: int) -> Iterator[None]:
    """libjpeg-turbo's own interface."""
    import simplejpeg  # type: ignore

    return decoded_by(lambda picture: simplejpeg.decode_jpeg(picture, "RGB"), folder)


def walk_shards(folder: Path, *, workers: int, epoch: int) -> Iterator[None]:
    """The shards' bytes in order, by their tar headers alone."""
    for _ in in_batches(chain.from_iterable(map(read_samples, repeat(folder)))):
        yield None


CONTENDERS = {
    "ours": Contender(package="torch", modules=("train.batches",), open_epoch=ours),
    "webdataset": Contender(package="webdataset", modules=("captioner.model",), open_epoch=plain_webdataset),
    "litdata": Contender(
        package="litdata", modules=("litdata", "captioner.model"), open_epoch=litdata, write=write_litdata
    ),
    "mosaicml-streaming": Contender(
        package="mosaicml-streaming",
        modules=("streaming", "captioner.model"),
        open_epoch=mosaicml,
        write=write_mosaicml,
    ),
    "the book's loader": Contender(
        package="pillow", modules=("nltk.tokenize", "torchvision.transforms"), open_epoch=book, write=write_loose
    ),
    "decode as ours": Contender(package="torchvision", modules=("captioner.images",), open_epoch=decode_as_ours),
    "decode by simplejpeg": Contender(package="simplejpeg", modules=("simplejpeg",), open_epoch=decode_by_simplejpeg),
    "walk the tars": Contender(package="numpy", modules=(), open_epoch=walk_shards),
}


# ---- turns ------------------------------------------------------------------------------------------------


def take_turn(name: str, *, folder: str, workers: int, epoch: int, warm_up: int, batches: int) -> dict[str, float]:
    """What so many batches take after a warm-up; a byte of each page of them is read."""
    import torch

    epoch_of = CONTENDERS[name].open_epoch(Path(folder), workers=workers, epoch=epoch)
    gc.collect()
    items, wall, cpu = 0, 0.0, 0.0
    with closing(epoch_of) as stream:  # type: ignore[bad-argument-type]
        for number in range(warm_up + batches):
            if number == warm_up:
                items, wall, cpu = 0, time.perf_counter(), time.process_time()
            pictures = next(stream)
            items += BATCH if pictures is None else len(pictures)
            if pictures is not None:
                pictures.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()
        cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    if items != batches * BATCH:
        raise RuntimeError(f"{name} gave {items} samples, not {batches} batches of {BATCH}")
    return {"items": items, **cost}


def answer(request: dict[str, Any], sender: Connection) -> None:
    """Do what is asked, in a process forked for it."""
    name = request.pop("name")
    write = CONTENDERS[name].write
    if "workers" in request:
        sender.send(take_turn(name, **request))
        return
    if write:
        write(Path(request["folder"]))
    sender.send({})


def in_a_fork(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, given when its process and all that it started have ended."""
    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=answer, args=(request, sender))
    process.start()
    process.join()
    return receiver.recv() if process.exitcode == 0 and receiver.poll() else {"error": f"exit code {process.exitcode}"}


def find_contenders(names: Sequence[str]) -> dict[str, str]:
    """Package and version of each contender that is there, which is imported."""
    found = {}
    for name in names:
        contender = CONTENDERS[name]
        try:
            for module in contender.modules:
                importlib.import_module(module)
            found[name] = f"{contender.package} {metadata.version(contender.package)}"
        except ImportError as error:
            print(f"{name} is left out: {error!r}", file=sys.stderr)
    return found


def main(paths: str, *names: str) -> None:
    """Serve until there are no more requests; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path += paths.split(os.pathsep)
    import torch

    torch.set_num_threads(1)
    print(json.dumps(find_contenders(names)), file=answers)
    for line in sys.stdin:
        print(json.dumps(in_a_fork(json.loads(line))), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
