"""A two-tower model of images and captions in a plain PyTorch loop on streamed tar shards, with an exact resume.

python examples/train_your_own.py data/shards clip.pt 5          # with more epochs: resumes
torchrun --nproc-per-node 4 examples/train_your_own.py data/shards clip.pt 5
"""

import json
import os
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from captioner.streaming import StreamingLoader

SIDE, BUCKETS, WIDTH = 32, 4096, 64


def prepare(sample: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """In a worker: a small image and, for one of its captions, the counts of its hashed words."""
    image = Image.open(BytesIO(sample["jpg"])).convert("RGB").resize((SIDE, SIDE))
    captions = json.loads(sample["json"])["tokens"]
    words = [zlib.crc32(word.encode()) % BUCKETS for word in captions[rng.integers(len(captions))]]
    return np.array(image), np.bincount(words, minlength=BUCKETS).astype(np.float32)


class TwoTowers(nn.Module):
    """Images and captions as unit vectors in one space."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, 16, 4, stride=4), nn.Conv2d(16, 32, 2, stride=2)
        self.see = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 4, WIDTH))
        self.read = nn.Linear(BUCKETS, WIDTH)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """The contrastive loss: which caption belongs to which image of the batch."""
        seen = self.see(images.movedim(-1, 1) / 127.5 - 1)
        scores = 20 * normalize(seen) @ normalize(self.read(words)).T
        right = torch.arange(len(scores), device=scores.device)
        return (cross_entropy(scores, right) + cross_entropy(scores.T, right)) / 2


def main(shards: str, checkpoint: str, epochs: int) -> None:
    """Train to this number of epochs, from the checkpoint if there is one."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = TwoTowers()
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = StreamingLoader(shards, split="train", batch_size=32, transform=prepare, last_batch="drop", num_workers=2)
    if Path(checkpoint).exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["data"])
    while loader.epoch < epochs:
        for images, words in loader:
            loss = wrapped(images, words)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loader.rank == 0 and loader.steps_done in (len(loader) // 2, len(loader)):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "data": loader.state_dict()}
                torch.save(state, f"{checkpoint}.new")
                Path(f"{checkpoint}.new").replace(checkpoint)  # the checkpoint is always complete
                print(f"epoch {loader.epoch}, step {loader.steps_done} of {len(loader)}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
