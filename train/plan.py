"""What an epoch reads, printed before any GPU is taken:

    python train/plan.py --shards data/shards --batch-size 256 --processes 8
    python train/plan.py --shards coco s3://bucket/cc3m --weights 1 3

The order itself is in `captioner/streaming/order.py`. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, CountOrZero, Location, Positive, Seed
from captioner.shards.format import PACK_FIRST
from captioner.streaming.dataset import Split, check_filled, read_split
from captioner.streaming.mixture import MixtureOrder, make_order
from captioner.streaming.order import SHUFFLE_SHARDS, EpochOrder, ShardOrder, num_steps, rank_positions
from captioner.streaming.quality import first_shards, measure_mixing


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
    """Shards that are mixed with each other, as for train/main.py."""
    seed: Seed = 0
    """The run's seed."""
    epoch: CountOrZero = 0
    """Which epoch, from 0; each has an order of its own."""
    weights: tuple[Positive, ...] = ()
    """For a mixture, one for each folder: its part of the samples. Without them the folders are read as one."""


def main(settings: PlanSettings) -> None:
    """Print what an epoch would read, and what each process of it."""
    if settings.batch_size % settings.processes:
        raise UserError(
            f"--batch-size {settings.batch_size} is the global batch and must be a multiple of the "
            f"{settings.processes} processes"
        )
    split = read_split(settings.shards, settings.split, remedy=PACK_FIRST)
    check_filled(split)
    batch_size = settings.batch_size
    order = make_order(
        split, weights=settings.weights, seed=settings.seed, batch_size=batch_size,
        shuffle_shards=settings.shuffle_shards,
    )  # fmt: skip
    steps = num_steps(order.num_samples, global_batch=settings.batch_size)
    last = order.num_samples - max(0, steps - 1) * settings.batch_size
    facts = [
        ("samples", f"{order.num_samples:,}"),
        ("shards", f"{len(split.shards):,}, {split.bytes / 1e9:,.2f} GB"),
        (
            ("lanes", lanes_text(order.of_epoch(settings.epoch), split.bytes))
            if isinstance(order, ShardOrder)
            else ("weights", f"{order}; each process reads from all shards")
        ),
        ("global batch", f"{settings.batch_size:,} samples, {settings.batch_size // settings.processes:,} a process"),
        ("steps", f"{steps:,}"),
        ("last batch", last_batch_text(last, settings)),
        ("repeated, dropped", "0, 0"),
        ("before the first step", first_step_text(split, order, settings)),
        ("mixing", str(measure_mixing(order, batch_size=batch_size, epoch=settings.epoch))),
    ]
    cli.print_table(f"epoch {settings.epoch} of {', '.join(settings.shards)}", ("", settings.split), facts)
    if isinstance(order, MixtureOrder):
        return
    plan = order.of_epoch(settings.epoch)
    if advice := window_advice(plan, world_size=settings.processes):
        cli.console.print(advice.strip())
    shard_bytes = [entry.bytes for _, entry in split.shards]
    rows = rank_rows(plan, shard_bytes, world_size=settings.processes)
    cli.print_table("each process", ("rank", "samples", "reads MB", "opens shards", "of MB", "share"), rows)


def window_advice(order: EpochOrder, *, world_size: int) -> str:
    """A line that says what to change so that each process has lanes of its own; empty where it has."""
    better = order.better_window(world_size=world_size)
    if better is None:
        return ""
    return (
        f"\n{world_size:,} processes share {order.num_lanes:,} lanes and read some of each other's shards: "
        f"better give --shuffle-shards {better}"
    )


def lanes_text(plan: EpochOrder, num_bytes: int) -> str:
    """The lanes and their windows, and how many bytes are read from at the same time."""
    at_once = min(len(plan.shard_sizes), plan.num_lanes * plan.window_shards)
    size = num_bytes * at_once / max(1, len(plan.shard_sizes))
    return (
        f"{plan.num_lanes:,}, in windows of {plan.window_shards:,} shards: {at_once:,} shards, {size / 1e9:,.2f} GB, "
        "are read from at once"
    )


def first_step_text(split: Split, order: ShardOrder | MixtureOrder, settings: PlanSettings) -> str:
    """What all processes open for the first batch; behind a URL each of these shards is fetched whole."""
    first = first_shards(order, range(min(settings.batch_size, order.num_samples)), epoch=settings.epoch)
    num_bytes = sum(split.shards[shard][1].bytes for shard in first)
    return f"{len(first):,} shards, {num_bytes / 1e9:,.2f} GB, are opened"


def last_batch_text(num_samples: int, settings: PlanSettings) -> str:
    """How the last batch is split over the ranks."""
    more, fewer = -(-num_samples // settings.processes), num_samples // settings.processes
    longer = num_samples % settings.processes
    text = f"{num_samples:,} samples: "
    if not longer:
        return text + f"{fewer:,} for each process"
    return text + f"{more:,} for {longer:,} of the processes, {fewer:,} for the others"


def rank_rows(plan: EpochOrder, shard_bytes: Sequence[int], *, world_size: int) -> list[tuple[object, ...]]:
    """For each rank: samples, bytes of these, shards opened, bytes of those, their share of all. A row in short."""
    total = sum(shard_bytes)
    rows: list[tuple[object, ...]] = []
    for rank in range(world_size):
        own = {"num_samples": plan.num_samples, "global_batch": plan.global_batch, "world_size": world_size}
        full = plan.num_samples // plan.global_batch
        samples = full * (plan.global_batch // world_size) + len(rank_positions(full, rank=rank, **own))
        opened = plan.shards_of_rank(rank, world_size=world_size)
        opened_bytes = sum(shard_bytes[shard] for shard in opened)
        read = total * samples / max(1, plan.num_samples)
        rows.append((rank, samples, read / 1e6, len(opened), opened_bytes / 1e6, opened_bytes / max(1, total)))
    return rows


def run() -> None:
    """The console entry."""
    cli.run(main, PlanSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
