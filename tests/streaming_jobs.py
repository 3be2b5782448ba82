"""Training loops of others that stream text samples: plain PyTorch with DDP, Accelerate, Lightning.

    python tests/streaming_jobs.py LOOP FOLDER OUTPUT WORKERS START_METHOD

Each rank of the launcher writes what it consumes to OUTPUT/rank-R.jsonl before gradients are averaged: all
ranks have written a step before any of them goes on. The state is kept after each step; where there is one, the loop
goes on from it.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from captioner.streaming import StreamingLoader

EPOCHS = 3
BATCH = 12
STEP_SECONDS = 0.03


def prepare(sample: dict[str, Any], rng: np.random.Generator) -> tuple[str, float]:
    """A sample's text and a random number."""
    return sample["txt"].decode(), rng.random()


def collate(samples: list[tuple[str, float]]) -> tuple[list[str], torch.Tensor]:
    """The texts, and the numbers (B, 1)."""
    return [text for text, _ in samples], torch.tensor([[number] for _, number in samples], dtype=torch.float32)


def open_loader(folder: str, workers: int, start_method: str) -> StreamingLoader:
    """The loader of all loops."""
    return StreamingLoader(
        folder, split="train", batch_size=BATCH, seed=4, transform=prepare, collate=collate, num_workers=workers,
        start_method=start_method if workers else None,
    )  # fmt: skip


def consume(output: Path, loader: StreamingLoader, texts: list[str]) -> None:
    """Write down a batch."""
    line = {"epoch": loader.epoch, "step": loader.steps_done - 1, "texts": texts}
    with (output / f"rank-{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    time.sleep(STEP_SECONDS)


def run_plain(folder: str, output: Path, workers: int, start_method: str) -> None:
    """A loop without any framework."""
    torch.distributed.init_process_group("gloo")
    loader = open_loader(folder, workers, start_method)
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = output / "state.json"
    if kept.exists():
        loader.load_state_dict(json.loads(kept.read_text()))
    while loader.epoch < EPOCHS:
        for texts, numbers in loader:
            consume(output, loader, texts)
            optimizer.zero_grad()
            model(numbers).sum().backward()
            optimizer.step()
            if loader.rank == 0:
                keep(kept, loader.state_dict())


def keep(path: Path, state: dict[str, Any]) -> None:
    """Write a state whole or not at all."""
    path.with_suffix(".new").write_text(json.dumps(state))
    path.with_suffix(".new").replace(path)


def run_accelerate(folder: str, output: Path, workers: int, start_method: str) -> None:
    """A loop of Accelerate's, which stores the loader with its own states."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, open_loader(folder, workers, start_method))
    assert isinstance(loader, StreamingLoader)
    accelerator.register_for_checkpointing(loader)
    latest = output / "state.json"
    if latest.exists():
        accelerator.load_state(json.loads(latest.read_text())["folder"])
    number = 0
    while loader.epoch < EPOCHS:
        for texts, numbers in loader:
            consume(output, loader, texts)
            optimizer.zero_grad()
            accelerator.backward(model(numbers).sum())
            optimizer.step()
            number += 1
            state = output / f"state-{os.getppid()}-{os.environ['MASTER_PORT']}-{number}"
            accelerator.save_state(str(state))
            if accelerator.is_main_process:
                keep(latest, {"folder": str(state), **loader.state_dict()})


def run_lightning(folder: str, output: Path, workers: int, start_method: str) -> None:
    """Lightning's Trainer, which stores the loader with its own checkpoints."""
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    loader = open_loader(folder, workers, start_method)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: Any, _number: int) -> torch.Tensor:
            texts, numbers = batch
            consume(output, loader, texts)
            return self.layer(numbers).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    checkpoint = ModelCheckpoint(dirpath=output / "lightning", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp", max_epochs=EPOCHS, logger=False,
        callbacks=[checkpoint], enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    found = sorted((output / "lightning").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    whole = [path for path in found if is_whole(path)]
    trainer.fit(Module(), loader, ckpt_path=str(whole[-1]) if whole else None, weights_only=False)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end before its process was killed."""
    try:
        torch.load(path, weights_only=False)
    except Exception:  # whatever a cut file raises
        return False
    return True


if __name__ == "__main__":
    loop, folder, output, workers, start_method = sys.argv[1:]
    loops = {"plain": run_plain, "accelerate": run_accelerate, "lightning": run_lightning}
    loops[loop](folder, Path(output), int(workers), start_method)
