"""Runs the plan's shards on the processes of this machine."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from sharding.pack import PackedShard, pack_shard
from sharding.plan import ShardPlan


def run_local(plans: Sequence[ShardPlan], folder: str, *, workers: int) -> Iterator[PackedShard]:
    """Pack all shards with `workers` processes; yields each as it is finished, in no fixed order."""
    if workers <= 1 or len(plans) <= 1:
        yield from (pack_shard(plan, folder) for plan in plans)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(plans)), mp_context=context) as pool:
        waiting = [pool.submit(pack_shard, plan, folder) for plan in plans]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()
