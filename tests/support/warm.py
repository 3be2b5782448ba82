"""Python commands as processes of their own, without the seconds that each of them needs to import torch.

`Popen` and `run` are used as those of `subprocess`. The first command starts a server, one for each pytest process: an
interpreter that has imported `PRELOADED`, but has computed nothing and started no thread. For each command it forks a
process, which becomes what `python SCRIPT`, `python -m MODULE` or `python -c CODE` would be: standard streams, working
folder, environment, `sys.path`, `sys.argv`, `__main__`, and the end of an interpreter. The process is a child of
pytest: signals, exit codes and waiting are the kernel's. It has its own random seeds, but for that of `hash`.

A launcher (`nested`) gets a server of its own, which forks the Python commands that it starts, as its children, and
the servers of its worker processes.

`subprocess` itself starts what is no Python, and what has a variable that is only read when an interpreter starts. A
test of what a command imports, or of its memory, uses `subprocess`: here torch has been imported already.
"""

import atexit
import ctypes
import fcntl
import gc
import inspect
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.machinery import SourceFileLoader
from itertools import dropwhile, takewhile
from pathlib import Path
from types import ModuleType
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
PARAMETERS = inspect.signature(EXECUTE)
UNSUPPORTED = {"executable": None, "preexec_fn": None, "pass_fds": (), "shell": False, "process_group": -1, "umask": -1,
               "uid": None, "gid": None, "gids": None}  # fmt: skip


# ---- in pytest ----------------------------------------------------------------------------------------------


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
        self.pid = server.fork(
            [command, folder, environment, given["start_new_session"], getattr(self, "_nested", False)],
            files,
            numbers=range(3),
        )
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
        self._environment = dict(os.environ)

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether the variables that are read at the start are those that the server has (or will have)."""
        with self._lock:
            if self._connection is None:
                self._environment = dict(os.environ)
        return read_at_start(environment) == read_at_start(self._environment)

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
                raise RuntimeError(
                    f"the server of tests/support/warm.py has died before it forked {request[0]}"
                ) from error
            finally:
                prctl(SET_CHILD_SUBREAPER, 0)

    def _start(self) -> socket.socket:
        own, other = socket_pair()
        environment = {name: value for name, value in self._environment.items() if name not in READ_BY_FORK}
        environment |= OF_ALL
        with other:
            subprocess.Popen([sys.executable, __file__, str(other.fileno()), *PRELOADED], pass_fds=[other.fileno()],
                             env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        return own


def read_at_start(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items()
            if name.startswith(READ_AT_START) and name not in READ_BY_FORK | OF_ALL.keys()}  # fmt: skip


def socket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


server = Server()


# ---- in the server, and in the processes that it forks ------------------------------------------------------


def serve(connection: socket.socket) -> list[Any]:
    """Fork a process for each request, until pytest has ended; in that process the request's command is returned."""
    while True:
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 100)
        if not message:
            os._exit(0)
        request = json.loads(message)
        reader, writer = os.pipe()
        if (between := os.fork()) == 0:
            if (number := os.fork()) == 0:
                for file in (reader, writer, connection.detach()):
                    os.close(file)
                if request[4]:
                    own, connection = socket_pair()
                    if os.fork() == 0:
                        own.close()
                        for file in files:
                            os.close(file)
                        continue
                    connection.close()
                    use_server(own)
                become(request, files)
                return request[0]
            os.write(writer, b"%d" % number)
            os._exit(0)  # so that pytest is the parent
        os.waitpid(between, 0)
        connection.send(os.read(reader, 100))
        for file in (reader, writer, *files):
            os.close(file)


def use_server(connection: socket.socket) -> None:
    """Have `subprocess` start this process's Python commands from a server of its own."""
    global server  # noqa: PLW0603
    server = Server(connection)
    subprocess.Popen._execute_child = Popen._execute_child  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = spawn


def spawn(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """As `multiprocessing.util.spawnv_passfds`, which starts fork servers and spawned processes."""
    numbers = [0, 1, 2, *passfds]
    return server.fork([find_command(args), str(Path.cwd()), dict(os.environ), False, False], numbers, numbers)


def become(request: list[Any], files: list[int]) -> None:
    """Give this process the streams, folder, environment and session of its command."""
    _, folder, environment, new_session, _, parent, numbers = request
    copies = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for file in files]
    for file in files:
        os.close(file)
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number, inheritable=number < 3)
        os.close(copy)
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    while os.getppid() != parent:
        time.sleep(0.0002)


def open_streams(*, unbuffered: bool) -> None:
    """Standard streams as those of a new interpreter."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        lines = number == 2 or os.isatty(number)
        stream: Any = open(number, "w", buffering=1 if lines else -1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        if unbuffered:
            stream.reconfigure(write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def execute(command: list[str], base_path: list[str]) -> None:
    """Run `SCRIPT ...`, `-m MODULE ...` or `-c CODE ...` as `__main__`."""
    options = [*takewhile(OPTIONS.__contains__, command)]
    first, *rest = command[len(options) :]
    open_streams(unbuffered="-u" in options or bool(os.environ.get("PYTHONUNBUFFERED")))
    paths = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    folder = {"-c": "", "-m": str(Path.cwd())}.get(first, str(Path(first).resolve().parent))
    sys.path[:] = [*([] if "-P" in options else [folder]), *dict.fromkeys([*paths, *base_path])]
    main = sys.modules["__main__"] = ModuleType("__main__")
    if first == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        return
    if first == "-c":
        code, sys.argv = compile(rest[0], "<string>", "exec"), ["-c", *rest[1:]]
    else:
        script = str(Path(first).absolute())
        code, sys.argv = compile(Path(script).read_bytes(), script, "exec"), [first, *rest]
        vars(main).update(__file__=script, __cached__=None, __loader__=SourceFileLoader("__main__", script))
    exec(code, vars(main))


def end_with(action: Callable[..., None], *arguments: Any) -> None:
    """End this process as an interpreter does after `action`, but for the 1.5 s in which it frees imported modules."""
    code, interrupted = 0, False
    try:
        action(*arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    vars(sys.modules["__main__"]).clear()
    gc.collect()  # without what the server has imported
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        with suppress(ImportError):  # as at the tests that need it
            import_module(name)
    assert threading.active_count() == len([*Path("/proc/self/task").iterdir()]) == 1, (
        "a forked process would miss the other threads"
    )
    gc.collect()
    gc.freeze()
    end_with(execute, serve(socket.socket(fileno=int(sys.argv[1]))), sys.path[1:])
