"""What an epoch reads, in words and rows for people. Imports no torch."""

from collections.abc import Sequence

from captioner.streaming.dataset import Split
from captioner.streaming.mixture import MixtureOrder
from captioner.streaming.order import EpochOrder, ShardOrder, num_steps, rank_positions
from captioner.streaming.quality import first_shards, measure_mixing

RANK_COLUMNS = ("rank", "samples", "reads MB", "opens shards", "of MB", "share")


def epoch_rows(
    split: Split, order: ShardOrder | MixtureOrder, *, epoch: int, batch_size: int, world_size: int
) -> list[tuple[str, str]]:
    """Names and values: samples, shards, steps, and how well the order mixes."""
    steps = num_steps(order.num_samples, global_batch=batch_size)
    last = order.num_samples - max(0, steps - 1) * batch_size
    if isinstance(order, ShardOrder):
        lanes = ("lanes", lanes_text(order.of_epoch(epoch), split.bytes))
    else:
        lanes = ("weights", f"{order}; each process reads from all shards")
    first = first_shards(order, range(min(batch_size, order.num_samples)), epoch=epoch)
    first_bytes = sum(split.shards[shard][1].bytes for shard in first)
    return [
        ("samples", f"{order.num_samples:,}"),
        ("shards", f"{len(split.shards):,}, {split.bytes / 1e9:,.2f} GB"),
        lanes,
        ("global batch", f"{batch_size:,} samples, {batch_size // world_size:,} a process"),
        ("steps", f"{steps:,}"),
        ("last batch", last_batch_text(last, world_size=world_size)),
        ("repeated, dropped", "0, 0"),
        ("before the first step", f"{len(first):,} shards, {first_bytes / 1e9:,.2f} GB, are opened"),
        ("mixing", str(measure_mixing(order, batch_size=batch_size, epoch=epoch))),
    ]


def lanes_text(order: EpochOrder, num_bytes: int) -> str:
    """The lanes and their windows, and how many bytes are read from at the same time."""
    num_open = min(len(order.shard_sizes), order.num_lanes * order.window_shards)
    size = num_bytes * num_open / max(1, len(order.shard_sizes))
    return (
        f"{order.num_lanes:,}, in windows of {order.window_shards:,} shards: {num_open:,} shards, {size / 1e9:,.2f} "
        "GB, are read from at once"
    )


def last_batch_text(num_samples: int, *, world_size: int) -> str:
    """How the last batch is split over the ranks."""
    fewer, num_longer = divmod(num_samples, world_size)
    if not num_longer:
        return f"{num_samples:,} samples: {fewer:,} for each process"
    return f"{num_samples:,} samples: {fewer + 1:,} for {num_longer:,} of the processes, {fewer:,} for the others"


def window_advice(order: EpochOrder, *, world_size: int) -> str:
    """A line that says how to give each process lanes of its own; empty where it has them."""
    better = order.better_window(world_size=world_size)
    if better is None:
        return ""
    return (
        f"\n{world_size:,} processes share {order.num_lanes:,} lanes and read some of each other's shards: "
        f"better give --shuffle-shards {better}"
    )


def rank_rows(order: EpochOrder, shard_bytes: Sequence[int], *, world_size: int) -> list[tuple[object, ...]]:
    """A row of RANK_COLUMNS for each rank; the last is the fraction of all bytes that is in the shards it opens."""
    total = sum(shard_bytes)
    full_batches = order.num_samples // order.global_batch
    rows: list[tuple[object, ...]] = []
    for rank in range(world_size):
        last = rank_positions(
            full_batches,
            rank=rank,
            num_samples=order.num_samples,
            global_batch=order.global_batch,
            world_size=world_size,
        )
        samples = full_batches * (order.global_batch // world_size) + len(last)
        opened = order.shards_of_rank(rank, world_size=world_size)
        opened_bytes = sum(shard_bytes[shard] for shard in opened)
        read = total * samples / max(1, order.num_samples)
        rows.append((rank, samples, read / 1e6, len(opened), opened_bytes / 1e6, opened_bytes / max(1, total)))
    return rows
