"""Train on two machines, lose one, continue with the other, then with both: a rehearsal on one Linux host.

    sudo .venv/bin/python examples/two_machines.py

Three machines are network namespaces, each with its own address and host name, joined by virtual cables: `store`, where
nginx serves packed shards, and `one` and `two`, which train. These two have separate shard caches; the run folder is on
a file system that both see, like NFS in a cluster. The commands that run on each machine are printed. On a real cluster
they are the same with its own addresses, network interface, folders and number of GPUs (--num_processes counts those of
all machines), without ACCELERATE_USE_CPU and --mixed_precision no.

1. An undisturbed run on both machines.
2. The same, but `two` loses its cable and its power in the middle of an epoch. `one` gets no reply, and ends after
   CAPTIONER_PEER_TIMEOUT_SECONDS (default: 10 minutes). Then --resume continues with `one` alone, SIGTERM stops it, and
   --resume continues with both to the end.
3. Both runs must give the same result: all samples of each epoch read once, the loss of each step, the metrics. No
   machine may have downloaded a shard twice.

Dropout is off, because one process draws other masks than two; a checkpoint is written at each step, so that the
history has each step's loss. Needs root, ip, unshare and nginx. Logs and run folders stay in --output. The exit code is
1 if something differs.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File, int_flag

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
RUNS = ("undisturbed", "disturbed")
NETWORK = {"store": "10.77.0.1", "one": "10.77.0.2", "two": "10.77.0.3"}
HTTP_PORT, MAIN_PORT = 8000, 29500
PEER_SECONDS = 15
BATCH = 24
SIZE = 112  # large images, so that few fill several shards of the smallest size
MODEL = (
    "--encoder small_cnn --weights none --finetune-encoder-from-step 0 --crop 64 --embedding-size 32 --hidden-size 32",
    "--learning-rate 5e-3 --encoder-learning-rate 5e-3 --input-dropout 0 --dropout 0",
)
SAME = 1e-4  # relative: one process sums in another order than two
PATIENCE_SECONDS = 180.0
LINE_END = " \\\n    "

NGINX = """
daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;
events {{}}
http {{
    log_format bytes "$remote_addr $uri $body_bytes_sent"; access_log {home}/access.log bytes;
    client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c;
    uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;
    server {{ listen {address}:{port}; root "{home}"; }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class RehearsalSettings:
    """The size of the rehearsal, and its folder."""

    output: File = Path("data/two_machines")
    """New folder for pictures, shards, caches, run folders and logs."""
    pictures: Count = 480
    """Number of drawn training images."""
    epochs: Annotated[int, int_flag(at_least=2)] = 3
    """Epochs; the power cut comes in the second."""


# ---- machines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """A network namespace on a virtual cable, with a host name and a folder."""

    name: str
    folder: Path

    @property
    def namespace(self) -> str:
        """Its name for `ip`."""
        return f"{self.name}-{os.getpid()}"

    def start(self, words: Sequence[object], *, log: Path) -> "subprocess.Popen[bytes]":
        """Run a command there, with its output in a file. The shell is replaced by the command, so signals reach it."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c"]
        enter = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec env "$@"'
        hosts = self.folder.parent / "hosts"
        with log.open("wb") as file:
            return subprocess.Popen(
                [*inside, enter, hosts, self.name, *map(str, words)],
                stdout=file, stderr=file, cwd=REPOSITORY, start_new_session=True,
                env=os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
            )  # fmt: skip

    def kill(self) -> None:
        """Kill all its processes."""
        while pids := ip("netns", "pids", self.namespace).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@contextmanager
def run_machines(output: Path) -> Iterator[dict[str, Machine]]:
    """The three machines, joined by a bridge in the store; afterwards everything is removed, with its processes."""
    machines = {name: Machine(name, output / name) for name in NETWORK}
    (output / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in NETWORK.items()))
    store = machines["store"].namespace
    with ExitStack() as stack:
        for name, machine in machines.items():
            machine.folder.mkdir()
            ip("netns", "add", machine.namespace)
            stack.callback(ip, "netns", "delete", machine.namespace)
            stack.callback(machine.kill)
            ip("-n", machine.namespace, "link", "set", "lo", "up")
            if name == "store":
                ip("-n", store, "link", "add", "eth0", "type", "bridge")
            else:
                ip("-n", store, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", machine.namespace)
                ip("-n", store, "link", "set", name, "master", "eth0", "up")
            ip("-n", machine.namespace, "address", "add", f"{NETWORK[name]}/24", "dev", "eth0")
            ip("-n", machine.namespace, "link", "set", "eth0", "up")
        yield machines


def ip(*words: str) -> str:
    """The output of an `ip` command. Raises UserError if it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"ip {' '.join(words)} failed ({done.stderr.strip()}): run as root on a host that allows network namespaces"
        )
    return done.stdout


def start_store(store: Machine) -> None:
    """Serve the store's folder."""
    address = NETWORK["store"]
    (store.folder / "conf").write_text(NGINX.format(home=store.folder, address=address, port=HTTP_PORT))
    store.start(["nginx", "-p", store.folder, "-c", store.folder / "conf"], log=store.folder / "nginx.log")
    wait_until((store.folder / "pid").exists, what="nginx")


def downloads(store: Machine) -> Counter[tuple[str, str]]:
    """Bytes that the store has sent so far, by machine and shard."""
    names = {address: name for name, address in NETWORK.items()}
    found: Counter[tuple[str, str]] = Counter()
    for line in (store.folder / "access.log").read_text().splitlines():
        address, path, num_bytes = line.split()
        if path.endswith(".tar"):
            found[names[address], path.rpartition("/")[2]] += int(num_bytes)
    return found


# ---- training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One launch: the launchers on its machines, and their logs."""

    launchers: dict[str, "subprocess.Popen[bytes]"]
    logs: dict[str, Path]

    def wait(self, *names: str) -> dict[str, int | None]:
        """The exit codes of the launchers on these machines."""
        launchers = {name: self.launchers[name] for name in names}
        wait_until(lambda: all(launcher.poll() is not None for launcher in launchers.values()), what="end of training")
        return {name: launcher.returncode for name, launcher in launchers.items()}

    def said(self, pattern: str) -> list[str]:
        """What machine one printed that matches the pattern."""
        return re.findall(pattern, self.logs["one"].read_text())

    def failure(self, what: str) -> UserError:
        """An error that names the logs of this launch."""
        return UserError(f"{what}: see {', '.join(map(str, self.logs.values()))}")


def launch(machines: Sequence[Machine], settings: RehearsalSettings, run: str, *flags: str) -> Job:
    """Print the command of each machine, and run it there."""
    launchers, logs = {}, {}
    for rank, machine in enumerate(machines):
        parts = command(machine, settings, run, rank=rank, num_machines=len(machines), flags=flags)
        cli.console.print(f"[bold]{machine.name}$ {LINE_END.join(parts)}[/bold]")
        logs[machine.name] = machine.folder / f"{run}-{len(list(machine.folder.glob('*.log')))}.log"
        launchers[machine.name] = machine.start(" ".join(parts).split(), log=logs[machine.name])
    return Job(launchers, logs)


def command(
    machine: Machine, settings: RehearsalSettings, run: str, *, rank: int, num_machines: int, flags: Sequence[str]
) -> list[str]:
    """What a user types on a machine, line by line."""
    others = (
        f"--num_machines {num_machines} --machine_rank {rank} --main_process_ip {NETWORK['one']} "
        f"--main_process_port {MAIN_PORT}"
    )
    return [
        f"ACCELERATE_USE_CPU=true GLOO_SOCKET_IFNAME=eth0 CAPTIONER_PEER_TIMEOUT_SECONDS={PEER_SECONDS}",
        f"accelerate launch --config_file accelerate_config.yaml --mixed_precision no --num_processes {num_machines}",
        *([others] if num_machines > 1 else []),
        f"train/main.py --shards http://store:{HTTP_PORT}/shards --output {settings.output / run}",
        f"--cache {machine.folder / run} --epochs {settings.epochs} --batch-size {BATCH}",
        *MODEL,
        " ".join(["--workers 1 --checkpoint-steps 1", *flags]),
    ]


def losses(run: Path) -> list[tuple[int, float]]:
    """The steps in the run's history so far, with their losses."""
    path = run / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def wait_until(condition: Callable[[], object], *, what: str) -> None:
    """Return when the condition holds. Raises UserError after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"no {what} after {PATIENCE_SECONDS:.0f} s: see the logs")
        time.sleep(0.05)


def wait_for_step(job: Job, run: Path, step: int) -> None:
    """Return once rank 0 has logged a step. Raises UserError if training ends first."""

    def reached() -> bool:
        if any(launcher.poll() is not None for launcher in job.launchers.values()):
            raise job.failure(f"training ended before step {step}")
        return any(logged >= step for logged, _ in losses(run))

    wait_until(reached, what=f"step {step}")


# ---- the rehearsal --------------------------------------------------------------------------------------------


def main(settings: RehearsalSettings) -> None:
    """Pack, train undisturbed, train disturbed, compare."""
    check_host(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up in that case too
    settings = replace(settings, output=settings.output.absolute())
    settings.output.mkdir(parents=True)
    with run_machines(settings.output) as machines:
        store, *both = machines.values()
        pack(settings, store)
        start_store(store)
        say("1. undisturbed, on two machines")
        job = launch(both, settings, RUNS[0])
        say(f"exit codes {finished(job)}")
        before = downloads(store)
        jobs = [job, *disturbed(both, settings)]
        sent = [before, downloads(store) - before]
        if not compare(settings, jobs, store.folder / "shards", sent):
            raise SystemExit(1)


def check_host(settings: RehearsalSettings) -> None:
    """Raise UserError if this host cannot run the rehearsal."""
    missing = [name for name in ("ip", "unshare", "nginx") if shutil.which(name) is None]
    if sys.platform != "linux" or os.geteuid() != 0 or missing:
        needs = f" and {', '.join(missing)} on the PATH" if missing else ""
        raise UserError(f"network namespaces need Linux and root{needs}: run this on Linux with sudo")
    if settings.epochs < 2:
        raise UserError(f"--epochs is {settings.epochs}: give at least 2, the power cut comes in the second")
    if settings.output.exists():
        raise UserError(f"{settings.output} exists: delete it, or give another --output")


def pack(settings: RehearsalSettings, store: Machine) -> None:
    """Draw images and pack them into the store's folder."""
    pictures = settings.output / "pictures"
    for words in (
        ["examples/scenes.py", "--output", pictures, "--train", settings.pictures, "--val", 16],
        ["sharding/make_shards.py", "--images", pictures, "--captions", pictures / "annotations",
         "--output", store.folder / "shards", "--size", SIZE, "--shard-megabytes", 1, "--workers", 1],
    ):  # fmt: skip
        done = subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, capture_output=True, check=False)
        if done.returncode:
            raise UserError(f"{words[0]} failed: {done.stderr.decode()}")


def disturbed(both: Sequence[Machine], settings: RehearsalSettings) -> list[Job]:
    """The run that loses a machine, continues with the other, and ends with both: its three launches."""
    run, epoch_steps = settings.output / RUNS[1], steps_of(settings)
    one, two = both
    say("2. the same, but machine two is lost in the middle of the second epoch")
    first = launch(both, settings, run.name)
    wait_for_step(first, run, epoch_steps + epoch_steps // 3)
    ip("-n", two.namespace, "link", "set", "eth0", "down")  # first, so that its death is not reported
    two.kill()
    say(f"two has lost its cable and its power; one waits at most {PEER_SECONDS} s")
    lost = time.monotonic()
    words = stopped(first, "lost contact with another process of this job")
    say(f"one, {time.monotonic() - lost:.1f} s later: {words}")

    say("--resume on machine one alone; SIGTERM stops it")
    alone = launch([one], settings, run.name, "--resume")
    wait_for_step(alone, run, epoch_steps + 2 * epoch_steps // 3)
    alone.launchers["one"].terminate()
    say(f"one: {stopped(alone, 'stopped by SIGTERM')}")

    say("--resume on both")
    ip("-n", two.namespace, "link", "set", "eth0", "up")
    together = launch(both, settings, run.name, "--resume")
    say(f"exit codes {finished(together)}")
    return [first, alone, together]


def finished(job: Job) -> dict[str, int | None]:
    """The exit codes of a launch that must succeed. Raises UserError if it does not."""
    codes = job.wait(*job.launchers)
    if any(codes.values()):
        raise job.failure(f"training ended with exit codes {codes}")
    return codes


def stopped(job: Job, words: str) -> str:
    """The line of machine one that begins with these words, and its launcher's exit code. Raises UserError."""
    codes = job.wait("one")
    if not (lines := job.said(f"{words}.*")):
        raise job.failure(f"machine one did not print {words!r}")
    return f"{lines[0]} (accelerate launch ends with {codes['one']})"


def say(text: str) -> None:
    """Print what happens, with the time."""
    cli.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)


# ---- comparing ------------------------------------------------------------------------------------------------


def steps_of(settings: RehearsalSettings) -> int:
    """Steps of an epoch."""
    return math.ceil(settings.pictures / BATCH)


def samples_by_launch(jobs: Sequence[Job], settings: RehearsalSettings) -> list[list[int]]:
    """For each epoch the samples of each launch that count: up to the position where the next one resumed.

    Raises UserError if a ledger differs.
    """
    epoch_steps, rows = steps_of(settings), []
    starts = [int(job.said(r"(\d+) of them done")[0]) for job in jobs]
    ends = [*starts[1:], settings.epochs * epoch_steps]
    for epoch in range(settings.epochs):
        row = []
        for job, *places in zip(jobs, starts, ends, strict=True):
            steps = (min(max(place - epoch * epoch_steps, 0), epoch_steps) for place in places)
            first, last = (min(step * BATCH, settings.pictures) for step in steps)
            row.append(last - first)
            for ledger in job.said(rf"epoch {epoch + 1}: training .*; (planned .*)"):
                if not ledger.startswith(f"planned {row[-1]}, read {row[-1]}, decoded {row[-1]}, skipped 0"):
                    raise UserError(f"{row[-1]} samples of epoch {epoch + 1} expected, but its ledger says {ledger}")
        rows.append(row)
    return rows


def compare(
    settings: RehearsalSettings, jobs: Sequence[Job], shards: Path, sent: Sequence[Counter[tuple[str, str]]]
) -> bool:
    """Print the undisturbed run, the first of the jobs, beside the disturbed one, and return whether they agree.

    `sent` are the bytes by machine and shard in both.
    """
    runs = [settings.output / name for name in RUNS]
    samples = [samples_by_launch(part, settings) for part in (jobs[:1], jobs[1:])]
    rows: list[tuple[str, str, str, bool]] = []
    for epoch, (whole, parts) in enumerate(zip(*samples, strict=True), start=1):
        same = sum(whole) == sum(parts) == settings.pictures
        rows.append((f"samples of epoch {epoch}, by launch", str(sum(whole)), " + ".join(map(str, parts)), same))
    first, second = map(losses, runs)
    every_step = list(range(1, settings.epochs * steps_of(settings) + 1))
    once = all([step for step, _ in found] == every_step for found in (first, second))
    rows.append(("steps with a loss", str(len(first)), str(len(second)), once))
    worst = max(abs(other / loss - 1) for (_, loss), (_, other) in zip(first, second, strict=False))
    rows.append(("last loss", f"{first[-1][1]:.6f}", f"{second[-1][1]:.6f}", worst < SAME))
    rows.append((f"largest relative difference of a loss (bar {SAME:.0e})", "", f"{worst:.1e}", worst < SAME))
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    for name in ("bleu4", "cider"):
        plain, other = (found[name] for found in metrics)
        rows.append((name, f"{plain:.4f}", f"{other:.4f}", math.isclose(plain, other, rel_tol=SAME)))
    sizes = {path.name: path.stat().st_size for path in shards.glob("*.tar")}
    for name in ("one", "two"):
        own = [{shard: size for (machine, shard), size in found.items() if machine == name} for found in sent]
        once = all(own) and all(size <= sizes[shard] for found in own for shard, size in found.items())
        plain, other = (f"{sum(found.values()):,} of {sum(sizes.values()):,}" for found in own)
        rows.append((f"bytes of shards sent to {name}", plain, other, once))
    cli.print_table("two machines", ("", *RUNS, "same"), [(*row, "yes" if same else "NO") for *row, same in rows])
    return all(same for *_, same in rows)


def run() -> None:
    """The command line."""
    cli.run(main, RehearsalSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
