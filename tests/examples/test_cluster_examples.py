"""The SLURM and Kubernetes examples: their own tools take them, and what they start is what train/main.py takes."""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from accelerate.commands.launch import launch_command_parser
from servers import free_port

from train.settings import TrainSettings

SBATCH, MANIFEST = (Path(__file__).parents[2] / "examples/cluster" / name for name in ("train.sbatch", "train.yaml"))
SLURMCTLD = shutil.which("slurmctld", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
STUBS = {
    # runs its command as the second machine would, then ends as an attempt of the launcher ends
    "srun": '[ -z "$CHECKPOINT" ] || { mkdir -p "$CHECKPOINT"; touch "$CHECKPOINT/complete.json"; }\n'
    'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 "$@"; exit "${SRUN_EXIT:-0}"',
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" > "$REQUEUED"; fi',
    "accelerate": 'printf "%s\\0" "$@" > "$LAUNCHED"',
}
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
StateSaveLocation={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
GresTypes=gpu
SelectType=select/cons_tres
NodeName=node[1-2] CPUs=64 Gres=gpu:8 State=CLOUD
PartitionName=all Nodes=ALL Default=YES
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What `accelerate launch` was given, and what it would give to train/main.py."""

    launcher: Any
    training: TrainSettings


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """An environment in which the cluster's commands, and the launcher, are stubs."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    files = {name: str(tmp_path / name.lower()) for name in ("LAUNCHED", "REQUEUED", "RUN")}
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "USER": "me", "CHECKPOINT": ""} | files


def start(command: Sequence[object], variables: Mapping[str, str]) -> int:
    """The exit code of a command, which must not complain."""
    done = subprocess.run([*map(str, command)], env=variables, capture_output=True, text=True, timeout=30, check=False)
    assert not done.stderr, done.stderr
    return done.returncode


def submit(variables: Mapping[str, str], *flags: str) -> int:
    """Run the batch script as SLURM does on the first of two machines with eight GPUs each."""
    slurm = {"SLURM_GPUS_ON_NODE": 8, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "first,second", "SLURM_NNODES": 2}
    own = {name: str(value) for name, value in slurm.items()} | {"SLURM_CPUS_PER_TASK": "64"}
    return start(["bash", SBATCH, *flags], {**variables, **own})


def launched(variables: Mapping[str, str]) -> Launch:
    """What the stub of the launcher was given; an unknown flag ends the test."""
    arguments = Path(variables["LAUNCHED"]).read_text().rstrip("\0").split("\0")
    assert arguments.pop(0) == "launch"
    launcher = launch_command_parser().parse_args(arguments)
    assert launcher.training_script == "train/main.py"
    return Launch(launcher=launcher, training=tyro.cli(TrainSettings, args=launcher.training_script_args))


# ---- SLURM --------------------------------------------------------------------------------------------------


def test_batch_script_starts_the_launcher_of_each_machine(variables: dict[str, str]) -> None:
    assert submit(variables, "--encoder", "a b") == 0

    found = launched(variables)
    assert (found.launcher.num_machines, found.launcher.machine_rank, found.launcher.num_processes) == (2, 1, 16)
    assert (found.launcher.main_process_ip, found.launcher.main_process_port) == ("first", 20007)
    assert found.training.resume
    assert (found.training.output, found.training.encoder) == (variables["RUN"], "a b")


@pytest.mark.parametrize(
    ("code", "folder", "requeued"),
    [("1", "epoch-1", True), ("1", "", False), ("0", "epoch-1", False)],
    ids=["stopped after a checkpoint", "stopped before the first", "finished"],
)
def test_batch_script_requeues_itself_when_it_got_further(
    variables: dict[str, str], code: str, folder: str, requeued: bool
) -> None:
    checkpoints = Path(variables["RUN"]) / "checkpoints"
    (checkpoints / "epoch-0").mkdir(parents=True)
    (checkpoints / "epoch-0/complete.json").touch()
    os.utime(checkpoints / "epoch-0/complete.json", (1, 1))  # of an earlier start
    checkpoint = str(checkpoints / folder) if folder else ""

    assert submit({**variables, "CHECKPOINT": checkpoint, "SRUN_EXIT": code}) == int(code)
    assert Path(variables["REQUEUED"]).exists() == requeued


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which SLURM's commands ask a controller of two machines, which does not start any."""
    if not SLURMCTLD or not shutil.which("sbatch"):
        pytest.skip("needs SLURM: apt-get install slurmctld slurm-client")
    config = tmp_path / "slurm.conf"
    config.write_text(SLURM_CONF.format(port=free_port(), user=getpass.getuser(), folder=tmp_path))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([SLURMCTLD, "-D", "-c", "-f", config], stdout=log, stderr=log)
    try:
        yield {**os.environ, "SLURM_CONF": str(config)}
    finally:
        process.kill()  # faster than its own end
        process.wait(10)


def test_sbatch_takes_the_batch_script(controller: dict[str, str]) -> None:
    deadline = time.monotonic() + 20
    while subprocess.run(["scontrol", "ping"], env=controller, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the controller does not answer"
        time.sleep(0.05)

    done = subprocess.run(
        ["sbatch", "--test-only", SBATCH], env=controller, capture_output=True, text=True, check=False
    )

    assert "on nodes node[1-2]" in done.stderr
    assert done.returncode == 0


# ---- Kubernetes ---------------------------------------------------------------------------------------------


@pytest.fixture
def manifest() -> dict[str, Any]:
    """The objects by their kinds."""
    return {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text())}


def test_manifest_fits_the_schemas_of_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs: pip install -e '.[dev]'")

    for found in manifest.values():
        kubernetes_validate.validate(found, "1.37", strict=True)


def test_pods_start_the_launcher_of_each_machine(manifest: dict[str, Any], variables: dict[str, str]) -> None:
    job = manifest["Job"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    num_machines, num_gpus = job["completions"], container["resources"]["limits"]["nvidia.com/gpu"]

    code = start(container["command"] + container["args"], variables | given | {"JOB_COMPLETION_INDEX": "1"})

    assert code == 0
    found = launched(variables)
    assert (found.launcher.num_machines, found.launcher.machine_rank) == (num_machines, 1)
    assert found.launcher.num_processes == num_machines * num_gpus
    assert found.launcher.main_process_ip == f"{manifest['Job']['metadata']['name']}-0.{pod['subdomain']}"
    assert found.training.resume


def test_names_in_the_manifest_lead_somewhere(manifest: dict[str, Any]) -> None:
    job, service = manifest["Job"], manifest["Service"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]

    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["metadata"]["name"] == pod["subdomain"]
    assert claims == [{"claimName": manifest["PersistentVolumeClaim"]["metadata"]["name"]}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
