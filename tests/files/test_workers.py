"""The server of worker processes; how many processors a process may use, by affinity and by control groups' quotas."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captioner.workers import count_processors

ROOT = Path(__file__).resolve().parents[2]
PLENTY = 64
OWN = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


@pytest.fixture(autouse=True)
def _many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(PLENTY)), raising=False)


def count_in(tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    """The number of processors for a process with these lines in /proc/self/cgroup, and these files of groups."""
    (tmp_path / "cgroup").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return count_processors(membership=tmp_path / "cgroup", cgroups=tmp_path / "groups")


@pytest.mark.parametrize(
    ("quota", "processors"),
    [
        ("max 100000", PLENTY),
        ("400000 100000", 4),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("50000 10000", 5),
        ("9900000 100000", PLENTY),
    ],
)
def test_a_quota_of_version_2_counts_rounded_up(tmp_path: Path, quota: str, processors: int) -> None:
    assert count_in(tmp_path, "0::/job/step\n", {"job/step/cpu.max": f"{quota}\n"}) == processors


@pytest.mark.parametrize(("quota", "processors"), [(-1, PLENTY), (400_000, 4), (150_000, 2), (20_000, 1)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_a_quota_of_version_1_counts_rounded_up(tmp_path: Path, controllers: str, quota: int, processors: int) -> None:
    files = {"cpu/job/cpu.cfs_quota_us": f"{quota}\n", "cpu/job/cpu.cfs_period_us": "100000\n"}
    assert count_in(tmp_path, f"7:memory:/else\n3:{controllers}:/job\n0::/\n", files) == processors


def test_the_smallest_quota_of_a_group_and_those_around_it_counts(tmp_path: Path) -> None:
    files = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "500000 100000"}
    assert count_in(tmp_path, "0::/a/b/c\n", files) == 3


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    assert count_in(tmp_path, "0::/docker/0123\n", {"cpu.max": "200000 100000"}) == 2
    files = {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}
    assert count_in(tmp_path, "4:cpu,cpuacct:/docker/0123\n", files) == 1


@pytest.mark.parametrize("membership", ["", "0::/\n", "5:cpuset:/x\n1:name=systemd:/y\n"])
def test_without_a_quota_affinity_counts(tmp_path: Path, membership: str) -> None:
    assert count_in(tmp_path, membership, {"cpu.max": "nonsense"}) == PLENTY
    assert count_processors(membership=tmp_path / "absent", cgroups=tmp_path) == PLENTY


@pytest.mark.skipif(shutil.which("taskset") is None, reason="there is no taskset")
def test_a_process_bound_to_one_processor_counts_one() -> None:
    code = "from captioner.workers import count_processors; print(count_processors())"
    line = ["taskset", "-c", str(OWN), sys.executable, "-c", code]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "1\n"


INTERRUPTED_START = """
import multiprocessing.forkserver as forkserver, os, signal, sys, time
from pathlib import Path
from captioner.workers import start_server

if __name__ == "__main__":
    start_server("slow_module", with_torch=False)
    while not Path("importing").exists():
        time.sleep(0.01)
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
"""


def test_ctrl_c_while_the_workers_server_imports_is_the_main_process_s_alone(tmp_path: Path) -> None:
    """The terminal sends it to both; a server that dies of it would print a traceback."""
    (tmp_path / "slow_module.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(1)\npathlib.Path('imported').touch()\n"
    )
    (tmp_path / "main.py").write_text(INTERRUPTED_START)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.count("Traceback") == 1, done.stderr  # the main process's own
    assert (tmp_path / "imported").exists()


FORKED_START = """
import os, signal, sys, threading, time
from functools import partial
from pathlib import Path
from captioner import workers

def work(task, excluded, set_index, report):
    if task == "busy":
        Path("worker").write_text(str(os.getpid()))
        time.sleep(600)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return getattr(workers, "MARK", "other memory"), os.getppid(), handlers == [signal.SIG_DFL, signal.SIG_IGN]

if __name__ == "__main__":
    case = sys.argv[1]
    workers.MARK = "the same memory"
    print("once")
    signal.signal(signal.SIGTERM, lambda *_: None)
    start = partial(workers.start_server, "captioner.workers", with_torch=False)
    if case == "thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    context = start(may_fork=case != "never")
    for _ in range(2):
        with workers.WorkerPool(context, work, size=2, max_deaths=1) as pool:
            found = set(pool.run((str(number), number) for number in range(4)))
        (memory, server, has_usual_handlers), = found
        print(memory, has_usual_handlers)
        if case == "server dies":
            os.kill(server, signal.SIGKILL)
            while Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
        context = start(may_fork=True)
    Path("server").write_text(str(server))
    if case == "busy":
        pool = workers.WorkerPool(context, work, size=1, max_deaths=1)  # never left
        threading.Thread(target=lambda: next(pool.run(iter([("busy", "busy")]))), daemon=True).start()
        while not (Path("worker").exists() and Path("worker").read_text()):
            time.sleep(0.01)
    if case == "killed":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="servers are forked on Linux only")
@pytest.mark.parametrize(
    ("case", "memories"),
    [
        ("alone", ["the same memory"] * 2),
        ("never", ["other memory"] * 2),
        ("thread", ["other memory"] * 2),
        ("server dies", ["the same memory"] * 2),
        ("killed", ["the same memory"] * 2),
        ("busy", ["the same memory"] * 2),
    ],
)
def test_a_server_is_forked_from_a_process_that_allows_it_and_ends_with_it(
    tmp_path: Path, case: str, memories: list[str]
) -> None:
    """So do its workers, even busy ones. They have the usual signal handlers, and print nothing of the process's."""
    (tmp_path / "main.py").write_text(FORKED_START)
    done = subprocess.run(
        [sys.executable, "main.py", case],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if case != "busy":  # a thread may report that its worker is gone
        assert done.stderr == ""
    assert done.stdout.splitlines() == ["once", *(f"{memory} True" for memory in memories)]
    deadline = time.monotonic() + 10
    ended = [(tmp_path / name).read_text() for name in ("server", *(["worker"] if case == "busy" else []))]
    while any(Path("/proc", process).exists() for process in ended):
        assert time.monotonic() < deadline
        time.sleep(0.01)
