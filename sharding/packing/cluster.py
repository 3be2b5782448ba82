"""Packs planned shards as tasks of a Ray cluster, which retries those of a worker or node that died.

Every node needs captioner's dependencies (pip install -e '.[ray]'), the same versions of Python and Ray, and must
see images and output under the same names: on a file system that all nodes share, or behind URLs.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import captioner
import sharding
from captioner.errors import UserError
from captioner.files import storage
from captioner.shards.writing import claim_location
from sharding.packing.engine import use_one_thread
from sharding.packing.pack import PackedShard, Report, ShardProgress, pack_shard
from sharding.packing.planning import ShardPlan

MAX_RETRIES = (
    5  # of a shard whose worker or node died: rented nodes are lost often, but an image may crash the decoder too
)
CONNECT_SECONDS = 10.0


def run_ray(plans: Sequence[ShardPlan], folder: str, *, workers: int | None, report: Report) -> Iterator[PackedShard]:
    """Pack all shards of a claimed split on a Ray cluster; yields each as it is finished, in no fixed order.

    At most `workers` at once, or as many as the cluster has CPUs; `report` is called when a shard is finished.
    Raises UserError when a shard cannot be packed or there is no cluster; the finished shards stay.
    """
    with _connection() as ray:
        pack = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_pack)
        waiting = deque(plans)
        running: dict[Any, ShardPlan] = {}
        while waiting or running:
            cpus = int(ray.cluster_resources().get("CPU", 0))  # asked each time: nodes come and go
            while waiting and len(running) < (workers or max(2, 2 * cpus)):  # one runs, one is queued
                plan = waiting.popleft()
                running[pack.remote(plan, folder, str(Path.cwd()))] = plan
            for task in ray.wait(list(running))[0]:
                shard, progress = _result(ray, task, running.pop(task))
                report(progress)
                yield shard


@contextmanager
def _connection() -> Iterator[Any]:
    """The ray module, connected to RAY_ADDRESS or to a cluster of this machine alone. Raises UserError.

    A connection that the caller has made is used, and left open.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}): pip install -e '.[ray]' in Captioner's folder") from error
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here sends no statistics
    try:
        _check_reachable(address)
        # Nodes get this machine's code, as another version could make other bytes. It is the code on disk now, so an
        # edit since this process began reaches the nodes only. Ray sends each folder as a small zip.
        code = {"py_modules": [captioner, sharding], "excludes": ["__pycache__"]}
        ray.init(address, runtime_env=code, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:  # Ray raises SystemExit when what answers is not Ray
        problem = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot use Ray at RAY_ADDRESS={address} ({problem}): is the cluster up?") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError when nothing answers at host:port; Ray itself would retry for two minutes, with many messages."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _pack(plan: ShardPlan, folder: str, cwd: str) -> tuple[PackedShard, ShardProgress] | UserError:
    """The task: a packed shard and its last progress, or a UserError, which no retry fixes."""
    with suppress(OSError):
        os.chdir(cwd)  # so that relative paths mean the same, also in messages
    reported: list[ShardProgress] = []
    try:
        if not storage.exists(claim_location(folder, plan.split)):
            raise UserError(
                f"there is no output folder {folder} (from {cwd}) here: give images and output as folders that all "
                "nodes share, or as URLs"
            )
        use_one_thread()
        shard = pack_shard(plan, folder, report=reported.append)
    except (UserError, OSError) as error:
        return UserError(f"on node {socket.gethostname()}: {error}")
    return shard, reported[-1]


def _result(ray: Any, task: Any, plan: ShardPlan) -> tuple[PackedShard, ShardProgress]:
    """The result of a finished task. Raises UserError."""
    try:
        result = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"while packing {plan.name}:\n{error}") from None
    except ray.exceptions.RayError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"Ray could not pack {plan.name} ({type(error).__name__}: {problem})") from error
    if isinstance(result, UserError):
        raise result
    return result
