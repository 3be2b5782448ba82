"""Python commands as processes of their own, without the seconds that each of them needs to import torch.

`Popen` and `run` are used as those of `subprocess`. The first command starts a server, one for each pytest process: an
interpreter (`warm_interpreter.py`) that has imported `PRELOADED`. It forks a process for each command, which becomes
what `python SCRIPT`, `python -m MODULE` or `python -c CODE` would be: standard streams, working folder, environment,
`sys.path`, `sys.argv`, `__main__`, and the end of an interpreter. The process is a child of pytest: signals, exit codes
and waiting are the kernel's. It has its own random seeds, but for that of `hash`.

A launcher (`nested`) gets a server of its own, which forks the Python commands that it starts, as its children, and
the servers of its worker processes.

`subprocess` itself starts what is no Python, and what has a variable that is only read when an interpreter starts. A
test of what a command imports, or of its memory, uses `subprocess`: here torch has been imported already.
"""

import ctypes
import inspect
import json
import multiprocessing.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch.distributed.launcher.api", "torch.utils.data", "torch.utils.tensorboard", "torchvision.models",
    "torchvision.transforms.v2", "accelerate.commands.launch", "safetensors.torch", "webdataset", "PIL.Image", "tyro",
    "rich.progress", "jinja2", "fsspec", "filelock", "tenacity", "nltk", "pycocotools.coco",
)  # fmt: skip
OPTIONS = ("-B", "-P", "-u")
READ_AT_START = ("LD_", "MALLOC_", "OMP_", "MKL_", "OPENBLAS_", "PYTHON", "HF_")
READ_BY_FORK = {"PYTHONPATH", "PYTHONUNBUFFERED"}
OF_ALL = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}  # which commands may set or not: no test needs the hub
SET_CHILD_SUBREAPER = 36  # of prctl: this process becomes the parent of its descendants whose parent has ended
EXECUTE: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
SPAWN = multiprocessing.util.spawnv_passfds
PARAMETERS = inspect.signature(EXECUTE)
UNSUPPORTED = {"executable": None, "preexec_fn": None, "pass_fds": (), "shell": False, "process_group": -1, "umask": -1,
               "uid": None, "gid": None, "gids": None}  # fmt: skip


class Popen(subprocess.Popen):
    """A process that the server forks, with all methods of `subprocess.Popen`."""

    def __init__(self, *arguments: Any, nested: bool = False, **options: Any) -> None:
        self._nested = nested
        super().__init__(*arguments, **options)

    def _execute_child(self, *arguments: Any) -> None:
        given = PARAMETERS.bind(self, *arguments).arguments
        environment = dict(os.environ if given["env"] is None else given["env"])
        command = find_command(given["args"])
        plain = any(given.get(name, default) != default for name, default in UNSUPPORTED.items())
        if command is None or plain or sys.platform != "linux" or not server.suits(environment):
            EXECUTE(self, *arguments)
            return
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        files = [own if pipe == -1 else pipe for own, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        folder = str(Path(given["cwd"] or ".").absolute())
        nested = getattr(self, "_nested", False)
        self.pid = server.fork([command, folder, environment, given["start_new_session"], nested], files, range(3))
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(command: Any, *, check: bool = False, timeout: float | None = None, capture_output: bool = False,
        **options: Any) -> subprocess.CompletedProcess:  # fmt: skip
    """As `subprocess.run`, for a command without input."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, printed, errors)
    if check:
        done.check_returncode()
    return done


def find_command(words: Any) -> list[str] | None:
    """What follows `python` in a command of this Python, or the script of this Python that a command is, else None."""
    if isinstance(words, str | bytes | os.PathLike):
        return None
    first, *rest = map(os.fsdecode, words)
    if first == sys.executable:
        return rest if is_known(rest) else None
    with suppress(OSError), open(first, "rb") as file:  # noqa: PTH123
        if file.readline().strip() == b"#!" + os.fsencode(sys.executable):
            return [first, *rest]
    return None


def is_known(words: list[str]) -> bool:
    """Whether `execute` knows the options before the script."""
    own = [*dropwhile(OPTIONS.__contains__, words)][:1]
    return bool(own) and (own[0] in ("-c", "-m") or not own[0].startswith("-"))


class Server:
    """The process that forks others; it ends with this one."""

    def __init__(self, connection: socket.socket | None = None) -> None:
        self._lock, self._connection = threading.Lock(), connection
        self._environment, self._owner = dict(os.environ), os.getpid()

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether the variables that are read at the start are the server's, and it forks for this process."""
        return os.getpid() == self._owner and read_at_start(environment) == read_at_start(self._environment)

    def fork(self, request: list[Any], files: Sequence[int], numbers: Sequence[int]) -> int:
        """The number of a new process, a child of this one, in which `files` have these `numbers`."""
        with self._lock:
            connection = self._connection = self._connection or self._start()
            prctl(SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(connection, [json.dumps([*request, os.getpid(), [*numbers]]).encode()], files)
                return int(connection.recv(100))
            except (OSError, ValueError) as error:
                self._connection = None
                raise RuntimeError(f"warm_interpreter.py has died before it forked {request[0]}") from error
            finally:
                prctl(SET_CHILD_SUBREAPER, 0)

    def _start(self) -> socket.socket:
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in self._environment.items() if name not in READ_BY_FORK}
        command = [sys.executable, Path(__file__).with_name("warm_interpreter.py"), str(other.fileno()), *PRELOADED]
        null = subprocess.DEVNULL
        with other:
            subprocess.Popen(command, env=environment | OF_ALL, pass_fds=[other.fileno()], stdin=null, stdout=null)
        return own


def spawn(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """As `multiprocessing.util.spawnv_passfds`, which starts fork servers and spawned processes."""
    environment, numbers = dict(os.environ), [0, 1, 2, *passfds]
    if not server.suits(environment):
        return SPAWN(path, args, passfds)
    return server.fork([find_command(args), str(Path.cwd()), environment, False, False], numbers, numbers)


def read_at_start(environment: dict[str, str]) -> dict[str, str]:
    """The variables that only an interpreter which starts, or a library which is loaded, reads."""
    return {name: value for name, value in environment.items()
            if name.startswith(READ_AT_START) and name not in READ_BY_FORK | OF_ALL.keys()}  # fmt: skip


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


server = Server()
