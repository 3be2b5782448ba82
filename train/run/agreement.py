"""What all ranks must have in common before a run starts: settings, data, and one run folder that each of them sees."""

import socket
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import gather_object

from captioner.errors import UserError
from captioner.files.storage import write_atomic
from train.barriers import on_main_rank
from train.settings import OF_A_MACHINE

VISIBLE_SECONDS = 75.0  # NFS clients may serve a folder from their cache for a minute
ENCODER_WEIGHTS = "encoder weights"
MAX_SHOWN = 20  # characters of a value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, ignored: Container[str]) -> list[tuple[str, ...]]:
    """The (name, old value, new value) of what is not ignored and differs; long fingerprints are cut."""
    names = [name for name, value in new.items() if name not in ignored and old.get(name) != value]
    return [(name, str(old.get(name))[:MAX_SHOWN], str(new[name])[:MAX_SHOWN]) for name in names]


def check_same_start(facts: Mapping[str, Any]) -> None:
    """Raise UserError unless all ranks have the same inputs and settings, except for those that may differ by machine.

    A weights file need not be on all machines.
    """
    hosts_and_facts = gather_object([(socket.gethostname(), facts)])
    first_host, first = hosts_and_facts[0]
    for rank, (host, own) in enumerate(hosts_and_facts):
        for name, expected, found in differences(first, own, ignored=(*OF_A_MACHINE, ENCODER_WEIGHTS)):
            raise UserError(
                f"rank {rank} on {host} has {name} {found}, rank 0 on {first_host} has {expected}: give all machines "
                "the same shards and the same flags"
            )


def check_shared(run: Path) -> None:
    """Raise UserError unless all ranks see what the main process writes into the run folder."""
    if PartialState().num_processes == 1:
        return

    probe = run / on_main_rank(lambda: f".seen-by-all-{uuid4().hex}")  # a new name is in no machine's cache
    on_main_rank(lambda: write_atomic(str(probe), ""))
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
