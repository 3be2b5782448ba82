"""Packing on a real Ray cluster of this machine: a head that does no work, and two nodes that can be killed."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import write_coco

from captioner.errors import UserError
from sharding import make_shards
from sharding.packing import cluster, pack_split
from sharding.packing.pack import PackedShard, Report
from sharding.packing.planning import ShardPlan
from sharding.settings import ShardSettings

pytestmark = [pytest.mark.slow, pytest.mark.external]

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")

NODE: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}  # for a small /dev/shm
WATCHFUL = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture(scope="module")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster whose head has no CPU and sees soon that a node is dead; its processes start in another folder."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": WATCHFUL, **NODE})
    try:
        yield found
    finally:
        found.shutdown()


@pytest.fixture
def two_nodes(started_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster with two nodes of one CPU; RAY_ADDRESS names it."""
    while len(started_cluster.worker_nodes) < 2:
        started_cluster.add_node(num_cpus=1, **NODE)
    monkeypatch.setenv("RAY_ADDRESS", started_cluster.address)
    return started_cluster


def pack(coco: Path, output: Path | str, **changed: Any) -> None:
    """Shards of 3 pictures each."""
    paths: dict[str, Any] = {"images": str(coco), "captions": str(coco / "annotations"), "output": str(output)}
    plain: dict[str, Any] = {
        "size": 680,
        "quality": 100,
        "shard_megabytes": 1,
        "threshold": 1,
        "workers": None,
        "engine": "ray",
    }
    make_shards.main(ShardSettings(**(paths | plain | changed)))


def pack_locally(coco: Path, output: Path | str) -> None:
    pack(coco, output, engine="local", workers=1)


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@needs_ray
def test_the_cluster_makes_the_same_bytes_and_relative_paths_mean_the_same(
    tmp_path: Path, two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_coco(Path("coco"), num_train=12, num_val=0)
    (data / "train2014" / "COCO_train2014_000000000001.jpg").unlink()  # a failure's message holds the path
    pack(data, "ray")
    pack_locally(data, "local")
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert len(files(tmp_path / "ray")) == 2 * 4 + 3


@needs_ray
def test_a_node_that_dies_while_it_packs_changes_nothing(
    tmp_path: Path, two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is frozen before its node is killed, so that its shard is certainly unfinished then."""
    data = write_coco(tmp_path / "coco", num_train=72, num_val=0)
    finished_before: list[int] = []
    run_ray = cluster.run_ray

    def run_and_kill(
        plans: Sequence[ShardPlan], folder: str, *, workers: int | None, report: Report
    ) -> Iterator[PackedShard]:
        for number, shard in enumerate(run_ray(plans, folder, workers=workers, report=report), start=1):
            yield shard
            if not finished_before and kill_a_node(two_nodes):
                finished_before.append(number)

    monkeypatch.setattr(cluster, "run_ray", run_and_kill)
    pack(data, tmp_path / "ray")
    assert len(two_nodes.worker_nodes) == 1
    assert 0 < finished_before[0] < 24
    pack_locally(data, tmp_path / "local")
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def kill_a_node(nodes: Any) -> bool:
    """Kill a node that is in the middle of a shard, if one is."""
    for node in list(nodes.worker_nodes):
        packer = freeze_a_packer(node.all_processes["raylet"][0].process.pid)
        if packer is not None:
            nodes.remove_node(node, allow_graceful=False)
            with suppress(ProcessLookupError):
                os.kill(packer, signal.SIGKILL)
            return True
    return False


def freeze_a_packer(raylet: int) -> int | None:
    """Stop a worker process of a node while it packs; its process id, or None when none packs just now."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            process = int(entry.name)
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == raylet and is_packing(process):
                os.kill(process, signal.SIGSTOP)
                if is_packing(process):
                    return process
                os.kill(process, signal.SIGCONT)
    return None


def is_packing(process: int) -> bool:
    """Whether a worker is at a task: Ray writes that into its title."""
    return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_pack")


@needs_ray
def test_an_output_that_the_nodes_do_not_see_is_refused_in_one_line(tmp_path: Path, two_nodes: Any) -> None:
    data = write_coco(tmp_path / "coco", num_train=6, num_val=0)
    with pytest.raises(UserError, match="there is no output folder memory://nowhere") as caught:
        pack(data, "memory://nowhere")
    assert "\n" not in str(caught.value)


@needs_ray
def test_without_an_address_a_cluster_is_started_here_and_ended_when_packing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = write_coco(tmp_path / "coco", num_train=6, num_val=0)
    (tmp_path / "shards" / "train-000001.tar").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot read .*train-000001\.tar \(Is a directory\)"):
        pack(data, tmp_path / "shards", workers=1)
    monkeypatch.setattr(pack_split, "find_packed", lambda plan, folder: None)  # as if it came while shards are packed
    with pytest.raises(UserError, match=r"cannot write .*train-000001\.tar") as caught:
        pack(data, tmp_path / "shards", workers=1)
    assert "\n" not in str(caught.value)
    assert not ray.is_initialized()
    assert (tmp_path / "shards" / "train-000000.index").exists()
    assert not (tmp_path / "shards" / "train.manifest.json").exists()


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no address"])
def test_a_cluster_that_does_not_answer_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address}") as caught:
        pack(write_coco(tmp_path / "coco", num_train=3, num_val=0), tmp_path / "shards")
    assert "\n" not in str(caught.value)


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'") as caught:
        pack(write_coco(tmp_path / "coco", num_train=3, num_val=0), tmp_path / "shards")
    assert "\n" not in str(caught.value)
