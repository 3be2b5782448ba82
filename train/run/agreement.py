"""What all ranks must agree on before a run starts: settings, data, and one run folder that each of them sees."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import gather_object

from captioner.errors import UserError
from captioner.files.storage import write_atomic
from captioner.flags import flag_name
from train.settings import OF_A_MACHINE
from train.uneven import in_main

VISIBLE_SECONDS = 75.0  # NFS clients may serve a folder from their cache for a minute
ENCODER_WEIGHTS = "encoder weights"


def check_same_start(settings: Mapping[str, Any], inputs: Mapping[str, str | None]) -> None:
    """Raise UserError unless all ranks have the same data and settings, except for those that may differ by machine.

    A weights file need not be on all machines.
    """
    own = {name: value for name, value in inputs.items() if name != ENCODER_WEIGHTS}
    own |= {flag_name(name): value for name, value in settings.items() if name not in OF_A_MACHINE}
    hosts_and_values = gather_object([(socket.gethostname(), own)])
    first_host, first = hosts_and_values[0]
    for rank, (host, values) in enumerate(hosts_and_values):
        for name, value in first.items():
            if values[name] != value:
                raise UserError(
                    f"rank {rank} on {host} has {name} {values[name]}, rank 0 on {first_host} has {value}: give all "
                    "machines the same shards and the same flags"
                )


def check_shared(run: Path) -> None:
    """Raise UserError unless all ranks see what the main process writes into the run folder."""
    if PartialState().num_processes == 1:
        return

    def write_probe() -> str:
        name = f".seen-by-all-{uuid4().hex}"  # a new name is in no machine's cache
        write_atomic(str(run / name), "")
        return name

    probe = run / in_main(write_probe)
    try:
        wait_until_all_see(probe)
    finally:
        if PartialState().is_main_process:
            probe.unlink(missing_ok=True)


def wait_until_all_see(path: Path) -> None:
    """Return when all ranks see a file; all must call it. Raises UserError where one does not in time."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = {host for host, sees in gather_object([(socket.gethostname(), path.exists())]) if not sees}
    if blind:
        raise UserError(
            f"{', '.join(sorted(blind))} cannot see {path}, which rank 0 wrote: --output must be a folder on a file "
            "system that all machines share"
        )
