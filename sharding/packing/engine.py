"""Packs the plan's shards in worker processes of this machine; the shard of a dead worker is packed again by another.

An image at which two workers died is left out as a failure. With one worker this process packs, and is not protected.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext

from captioner.errors import UserError
from captioner.workers import WorkerPool, start_server, use_one_thread
from sharding.packing.pack import PackedShard, Report, ShardProgress, pack_shard
from sharding.packing.planning import ShardPlan

MAX_DEATHS = 3  # of a shard's workers, besides those at images that are left out


def run_local(plans: Sequence[ShardPlan], folder: str, *, workers: int, report: Report) -> Iterator[PackedShard]:
    """Pack all shards with `workers` processes; yields each as it is finished, in no fixed order.

    Raises UserError when a shard cannot be packed; the finished ones stay.
    """
    if workers == 1:
        use_one_thread()
        yield from (pack_shard(plan, folder, report=report) for plan in plans)
        return
    with WorkerPool(prepare(), _pack, folder, size=min(workers, len(plans)), max_deaths=MAX_DEATHS) as pool:
        for message in pool.run((plan.name, plan) for plan in plans):
            if isinstance(message, ShardProgress):
                report(message)
            elif isinstance(message, Exception):
                raise message
            else:
                yield message


def prepare() -> ForkServerContext:
    """Start the server process of the workers, unless it runs; it imports the packing code in the background."""
    return start_server("sharding.packing.engine")


def _pack(
    plan: ShardPlan, folder: str, *, excluded: dict[int, int | None], set_index: Callable[[int], None], report: Report
) -> PackedShard | Exception:
    try:
        return pack_shard(plan, folder, report=report, set_index=set_index, excluded=excluded)
    except UserError as error:
        return error
    except Exception:
        return RuntimeError(f"while packing {plan.name}:\n{traceback.format_exc()}")
