"""Runs the plan's shards on the processes of this machine."""

import multiprocessing
import os
import threading
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
    with ProcessPoolExecutor(min(workers, len(plans)), mp_context=context, initializer=_leave_with_parent) as pool:
        waiting = [pool.submit(pack_shard, plan, folder) for plan in plans]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()


def _leave_with_parent() -> None:
    """End this worker when the main process was killed; it would wait for further shards for ever."""

    def leave() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
