"""Run a command and write the cost of all its processes: `python timed.py RESULT.json COMMAND ...`.

Orphans count too (on Linux), because a pool's server process may outlive the command.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main(result: str, *command: str) -> int:
    """Run the command, return its exit code, and write `wall_seconds` and `cpu_seconds` (or null) to RESULT."""
    adopts = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    started = time.perf_counter()
    code = subprocess.call(command)
    wall_seconds = time.perf_counter() - started
    with suppress(ChildProcessError):
        while adopts:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = used.ru_utime + used.ru_stime if adopts else None
    Path(result).write_text(json.dumps({"wall_seconds": wall_seconds, "cpu_seconds": cpu_seconds}))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
