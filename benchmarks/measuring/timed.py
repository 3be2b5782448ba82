"""Run a command and write what it and every process it started took: `python timed.py RESULT.json COMMAND ...`.

Counts orphans as well (Linux): a pool's server process outlives the command that started it by a moment.
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
    """The command's exit code; RESULT gets `wall_seconds` until it ended and `cpu_seconds` of all processes or null."""
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
