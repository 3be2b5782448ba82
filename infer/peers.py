"""The processes of a captioning job watch each other through small heartbeat files beside the output.

Each process rewrites its own file sixty times in ten minutes. Rank 0 watches all others, and they watch rank 0: a
process whose file does not change in that time is lost, and the job ends. A slow process is never mistaken for a lost
one, and no process blocks on the network of a dead machine.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread
from types import FrameType
from typing import Any

from captioner.errors import EXIT_PREEMPTED, UserError
from captioner.peers import peer_timeout
from infer.results import find_process_files, process_path

MAX_SILENT_BEATS = 60  # after which a process is lost
POLL_SECONDS = 0.2  # while this process is idle
RECORD_BYTES = 128  # fixed size, so that one write replaces a record
RESUMABLE = "all rows are kept: run the same command again to resume, with fewer processes if needed"


class Peers:
    """This process's view of the job, while entered; a single process writes no files.

    An exception tells the other processes that this one has failed; SIGTERM raises SystemExit with code 75.
    """

    def __init__(self, output: Path, *, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.is_main = rank == 0  # merges the rows of all
        self._output = output
        self._path = process_path(output, rank)
        self._record: dict[str, Any] = {"state": "working", "counts": ()}
        watched = (range(1, world_size) if rank == 0 else range(1)) if world_size > 1 else ()
        self._watched = [_Peer(process_path(output, other), other) for other in watched]
        self._limit_seconds = peer_timeout().total_seconds()
        self._lock = Lock()
        self._left = Event()

    def __enter__(self) -> "Peers":
        signal.signal(signal.SIGTERM, _leave)
        if self._watched:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._look()  # existing files may be from a job that was killed
            self._write()
            Thread(target=self._keep_beating, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        if self._watched and kind is not None:
            with suppress(OSError):
                self._write(state="failed")

    def check(self) -> None:
        """Raise SystemExit with code 75, and say why, when another process is lost."""
        for peer in self._watched:
            loss = peer.loss(self._limit_seconds)
            if loss is not None:
                print(f"process {peer.rank} of this job {loss}; {RESUMABLE}", file=sys.stderr)
                raise SystemExit(EXIT_PREEMPTED)

    def finish(self, *counts: int) -> list[int]:
        """Wait until all processes have finished captioning; in rank 0, returns each count summed over them.

        The others wait until rank 0 dismisses them. Raises SystemExit as `check` does.
        """
        if self._watched:
            self._write(state="finished", counts=counts)
        while not self._is_over():
            self.check()
            time.sleep(POLL_SECONDS)
            self._look()
        others = [peer.record["counts"] for peer in self._watched if self.is_main]
        return [sum(of_all) for of_all in zip(counts, *others, strict=True)]

    def dismiss(self) -> None:
        """End all other processes, whose rows are merged. Call it in rank 0."""
        self._left.set()
        self._watched = []
        with self._lock:
            for path in find_process_files(self._output):
                path.unlink(missing_ok=True)

    def _is_over(self) -> bool:
        if self.is_main:
            return all(peer.record.get("state") == "finished" for peer in self._watched)
        return not self._path.exists()

    def _keep_beating(self) -> None:
        while not self._left.wait(self._limit_seconds / MAX_SILENT_BEATS):
            with suppress(OSError):  # a missing heartbeat
                self._write()
            for peer in self._watched:
                peer.num_silent_beats += 1
            self._look()

    def _write(self, **changes: Any) -> None:
        """Overwrite this process's record. After `finish` a missing file is not created again: rank 0 removed it."""
        with self._lock:
            self._record |= {**changes, "time": time.time()}
            may_create = os.O_CREAT if self._record["state"] == "working" and not self._left.is_set() else 0
            file = os.open(self._path, os.O_WRONLY | may_create, 0o666)
            try:
                os.write(file, json.dumps(self._record).encode().ljust(RECORD_BYTES))
            finally:
                os.close(file)  # NFS then sends it to the server

    def _look(self) -> None:
        for peer in self._watched:
            peer.look()


class _Peer:
    """The last `record` in another process's file; empty until the file changes, as it may be from an earlier job.

    Silence is counted in beats of this process: after it was stopped itself, the others have time to write again.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.rank = rank
        self.record: dict[str, Any] = {}
        self.num_silent_beats = 0
        self._path = path
        self._content: bytes | None = None

    def look(self) -> None:
        """Read the file; a change shows that its process is alive."""
        content = b""
        with suppress(OSError):  # it is missing
            content = self._path.read_bytes()
        if self._content is None:
            self._content = content
        elif len(content) == RECORD_BYTES and content != self._content:
            self._content, self.num_silent_beats = content, 0
            self.record = json.loads(content)

    def loss(self, limit_seconds: float) -> str | None:
        """Why the process counts as lost, or None."""
        if self.record.get("state") == "failed":
            return "has failed: see the end of its output"
        if self.num_silent_beats < MAX_SILENT_BEATS:
            return None
        if self.record:
            return f"was silent for {limit_seconds:.0f} s, so it or its machine is gone"
        return f"has not begun within {limit_seconds:.0f} s (all must see {self._path.parent})"


def find_peers(output: Path) -> Peers:
    """The job described by the variables of torchrun or `accelerate launch`. Raises UserError if RANK is missing."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE announces {world_size} processes, but RANK does not say which one this is: unset it"
        )
    return Peers(output, rank=int(os.environ.get("RANK", "0")) if world_size > 1 else 0, world_size=world_size)


def _leave(_number: int, _frame: FrameType | None) -> None:
    print(f"stopped by SIGTERM: {RESUMABLE}", file=sys.stderr)
    raise SystemExit(EXIT_PREEMPTED)
