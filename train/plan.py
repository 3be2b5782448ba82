"""What an epoch reads, printed before any GPU is taken:

    python train/plan.py --shards data/shards --batch-size 256 --processes 8
    python train/plan.py --shards coco s3://bucket/cc3m --weights 1 3

The order itself is in `captioner/streaming/order.py`. Imports no torch.
"""

from dataclasses import dataclass

from captioner import cli
from captioner.flags import Count, CountOrZero, Location, Positive, Seed
from captioner.streaming.mixture import make_order
from captioner.streaming.order import SHUFFLE_SHARDS, ShardOrder
from train.data.folders import check_batch_size, read_filled_split
from train.data.order_table import RANK_COLUMNS, epoch_rows, rank_rows, window_advice


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What would be read, and by how many processes."""

    shards: tuple[Location, ...] = ("data/shards",)
    """Dataset folders (or URLs) of any samples, as for train/main.py."""
    split: str = "train"
    """Which split."""
    batch_size: Count = 128
    """Samples of a *global* batch, over all processes."""
    processes: Count = 1
    """Training processes (GPUs) in all."""
    shuffle_shards: Count = SHUFFLE_SHARDS
    """Shuffle window in shards, as for train/main.py."""
    seed: Seed = 0
    """The run's seed."""
    epoch: CountOrZero = 0
    """Which epoch, from 0; each has an order of its own."""
    weights: tuple[Positive, ...] = ()
    """For a mixture, one for each folder: its weight in the samples. Without them the folders are read as one."""


def main(settings: PlanSettings) -> None:
    """Print what an epoch would read, and what each process of it."""
    batch_size, world_size, epoch = settings.batch_size, settings.processes, settings.epoch
    check_batch_size(batch_size, world_size=world_size)
    split = read_filled_split(settings.shards, settings.split)
    order = make_order(
        split,
        weights=settings.weights,
        seed=settings.seed,
        batch_size=batch_size,
        shuffle_shards=settings.shuffle_shards,
    )
    rows = epoch_rows(split, order, epoch=epoch, batch_size=batch_size, world_size=world_size)
    cli.print_table(f"epoch {epoch} of {', '.join(settings.shards)}", ("", settings.split), rows)
    if isinstance(order, ShardOrder):
        epoch_order = order.of_epoch(epoch)
        if advice := window_advice(epoch_order, world_size=world_size):
            cli.console.print(advice.strip())
        shard_bytes = [entry.bytes for _, entry in split.shards]
        cli.print_table("each process", RANK_COLUMNS, rank_rows(epoch_order, shard_bytes, world_size=world_size))


def run() -> None:
    """The console entry."""
    cli.run(main, PlanSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
