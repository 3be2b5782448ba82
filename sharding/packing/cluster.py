"""Runs the plan's shards as tasks of a Ray cluster; the shard of a worker or node that died is given to another.

Every node needs captioner's dependencies (pip install -e '.[ray]'), the same versions of Python and Ray, and must
see pictures and output under the same names: on a file system that all nodes share, or behind URLs.
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
from sharding.packing.pack import PackedShard, Progress, Report, pack_shard
from sharding.packing.planning import ShardPlan

MAX_RETRIES = 5  # of a shard whose worker or node died: rented nodes go often, but a picture may crash the decoder too
CONNECT_SECONDS = 10.0


def run_ray(plans: Sequence[ShardPlan], folder: str, *, workers: int | None, report: Report) -> Iterator[PackedShard]:
    """Pack all shards of a claimed split on a Ray cluster; yields each as it is finished, in no fixed order.

    At most `workers` at once, or as many as the cluster has CPUs; `report` hears of a shard when it is finished.
    Raises UserError when a shard cannot be packed or there is no cluster; the finished shards stay.
    """
    with _connection() as ray:
        pack = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_pack)
        waiting = deque(plans)
        running: dict[Any, ShardPlan] = {}
        while waiting or running:
            cpus = int(ray.cluster_resources().get("CPU", 0))  # asked each time: nodes come and go
            while waiting and len(running) < (workers or max(2, 2 * cpus)):  # one works, one waits at the door
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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here tells nobody of itself
    try:
        _knock(address)
        # Nodes get this machine's code, whatever version they have installed: another could make other bytes. It is
        # what lies on disk now, so an edit since this process began would reach the nodes only. Ray hands on each
        # folder as a small zip by itself; nothing is downloaded or installed.
        code = {"py_modules": [captioner, sharding], "excludes": ["__pycache__"]}
        ray.init(address, runtime_env=code, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:  # Ray leaves by SystemExit when what answers is no Ray
        problem = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot use Ray at RAY_ADDRESS={address} ({problem}): is the cluster up?") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError when nobody answers at host:port; Ray itself would try for two minutes, and loudly."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _pack(plan: ShardPlan, folder: str, cwd: str) -> tuple[PackedShard, Progress] | UserError:
    """The task: a packed shard and its last progress, or what the user must mend, which no retry would."""
    with suppress(OSError):
        os.chdir(cwd)  # relative paths start here as they do there, and messages stay the same
    heard: list[Progress] = []
    try:
        if not storage.exists(claim_location(folder, plan.split)):
            raise UserError(
                f"there is no output folder {folder} (from {cwd}) here: give pictures and output as folders that all "
                "nodes share, or as URLs"
            )
        use_one_thread()
        shard = pack_shard(plan, folder, report=heard.append)
    except (UserError, OSError) as error:
        return UserError(f"on node {socket.gethostname()}: {error}")
    return shard, heard[-1]


def _result(ray: Any, task: Any, plan: ShardPlan) -> tuple[PackedShard, Progress]:
    """What a finished task has brought. Raises UserError."""
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
