"""What an epoch reads, printed before any GPU is taken:

    python train/plan.py --shards data/shards --batch-size 256 --processes 8

The order itself is in `captioner/streaming/order.py`. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, CountOrZero, Location, Seed
from captioner.streaming.order import SHUFFLE_SHARDS, EpochOrder, num_steps, rank_positions

PACK_FIRST = (
    "python sharding/make_shards.py packs it (after python sharding/download_coco.py for COCO); tars that are there "
    "already want python sharding/check_shards.py index"
)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What would be trained on, and by how many processes."""

    shards: tuple[Location, ...] = ("data/shards",)
    """Dataset folders (or URLs), as for train/main.py."""
    split: str = "train"
    """Which split."""
    batch_size: Count = 128
    """Images of a *global* batch, over all processes."""
    processes: Count = 1
    """Training processes (GPUs) in all."""
    shuffle_shards: Count = SHUFFLE_SHARDS
    """Shards that are mixed with each other, as for train/main.py."""
    seed: Seed = 0
    """The run's seed."""
    epoch: CountOrZero = 0
    """Which epoch, from 0; each has an order of its own."""


def main(settings: PlanSettings) -> None:
    """Print what an epoch would read, and what each process of it."""
    from captioner.streaming.dataset import check_filled, read_split

    if settings.batch_size % settings.processes:
        raise UserError(
            f"--batch-size {settings.batch_size} is the global batch and must be a multiple of the "
            f"{settings.processes} processes"
        )
    split = read_split(settings.shards, settings.split, remedy=PACK_FIRST)
    check_filled(split)
    plan = split.plan(
        seed=settings.seed,
        epoch=settings.epoch,
        global_batch=settings.batch_size,
        shuffle_shards=settings.shuffle_shards,
    )
    steps = num_steps(plan.num_samples, global_batch=settings.batch_size)
    last = plan.num_samples - max(0, steps - 1) * settings.batch_size
    facts = [
        ("samples", f"{plan.num_samples:,}"),
        ("shards", f"{len(split.shards):,}, {split.bytes / 1e9:,.2f} GB"),
        ("lanes", lanes_text(plan, split.bytes)),
        ("global batch", f"{settings.batch_size:,} images, {settings.batch_size // settings.processes:,} a process"),
        ("steps", f"{steps:,}"),
        ("last batch", last_batch_text(last, settings)),
        ("repeated, dropped", "0, 0"),
    ]
    cli.print_table(f"epoch {settings.epoch} of {', '.join(settings.shards)}", ("", settings.split), facts)
    if advice := plan.advice(world_size=settings.processes):
        cli.console.print(advice.strip())
    shard_bytes = [entry.bytes for _, entry in split.shards]
    rows = rank_rows(plan, shard_bytes, world_size=settings.processes)
    cli.print_table("each process", ("rank", "samples", "reads MB", "opens shards", "of MB", "share"), rows)


def lanes_text(plan: EpochOrder, num_bytes: int) -> str:
    """The lanes and their windows, and how many bytes are read from at the same time."""
    at_once = min(len(plan.shard_sizes), plan.num_lanes * plan.window_shards)
    size = num_bytes * at_once / max(1, len(plan.shard_sizes))
    return (
        f"{plan.num_lanes:,}, in windows of {plan.window_shards:,} shards: {at_once:,} shards, {size / 1e9:,.2f} GB, "
        "are read from at once"
    )


def last_batch_text(num_samples: int, settings: PlanSettings) -> str:
    """How the last batch is split over the ranks."""
    more, fewer = -(-num_samples // settings.processes), num_samples // settings.processes
    longer = num_samples % settings.processes
    text = f"{num_samples:,} images: "
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
