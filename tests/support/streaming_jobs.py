"""Training loops of others that stream text samples: plain PyTorch with DDP, Accelerate, Lightning, Hugging Face.

    python tests/support/streaming_jobs.py LOOP FOLDER OUTPUT

For each line `RANKS WORKERS START_METHOD PORT` on standard input so many ranks are forked, as a launcher would start
them, but with the imports behind them. Their process ids are printed, and their exit codes when all have ended.

Each rank writes what it consumes to OUTPUT/rank-R.jsonl before gradients are averaged: all ranks have written a step
before any of them goes on. The state is kept after each step; where there is one, the loop goes on from it.
"""

import importlib
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
        callbacks=[checkpoint], enable_progress_bar=False, enable_model_summary=False,
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


def run_trainer(folder: str, output: Path, workers: int, start_method: str) -> None:
    """The Trainer of transformers, whose callback stores the loader's state beside each checkpoint."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    loader = open_loader(folder, workers, start_method)
    latest = output / "state.json"

    class StreamingTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return loader

        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            texts, numbers = inputs
            consume(output, loader, texts)
            return model(numbers).sum()

    class SaveLoader(TrainerCallback):
        def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
                keep(latest, {"folder": checkpoint, **loader.state_dict()})

    arguments = TrainingArguments(
        str(output / "trainer"), num_train_epochs=EPOCHS, save_steps=1, ignore_data_skip=True, use_cpu=True,
        per_device_train_batch_size=BATCH // int(os.environ["WORLD_SIZE"]), disable_tqdm=True, report_to="none",
    )  # fmt: skip
    checkpoint = None
    if latest.exists():
        state = json.loads(latest.read_text())
        loader.load_state_dict(state)
        checkpoint = state["folder"]
    trainer = StreamingTrainer(nn.Linear(1, 1), arguments, callbacks=[SaveLoader()])
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == EPOCHS * len(loader)


LOOPS = {
    "plain": (run_plain, "torch"),
    "accelerate": (run_accelerate, "accelerate"),
    "lightning": (run_lightning, "lightning"),
    "trainer": (run_trainer, "transformers.trainer"),
}


def start_ranks(loop: str, folder: str, output: Path) -> None:
    """Fork ranks and wait for them, for each line of standard input."""
    run, module = LOOPS[loop]
    importlib.import_module(module)
    for line in sys.stdin:
        ranks, workers, start_method, port = line.split()
        processes = []
        for rank in range(int(ranks)):
            processes.append(os.fork())
            if processes[-1] == 0:
                become_rank(rank, int(ranks), port, output / f"output-{rank}.txt")
                run(folder, output, int(workers), start_method)
                sys.exit()
        print(*processes, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes), flush=True)


def become_rank(rank: int, world_size: int, port: str, printed: Path) -> None:
    """Give this process what torchrun gives, and a file for what it prints."""
    launched = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in launched.items()})
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


if __name__ == "__main__":
    start_ranks(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
