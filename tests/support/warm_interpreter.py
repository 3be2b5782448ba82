"""The server of `warm.py`: forks a process for each command, and makes it what a new interpreter would be.

Until then it has computed nothing and started no thread, which a forked process would miss.
"""

import atexit
import fcntl
import gc
import io
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
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.machinery import SourceFileLoader
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import warm


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
                    own, connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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
    """Have this process start its Python commands, and those of `multiprocessing`, from a server of its own."""
    warm.server = warm.Server(connection)
    subprocess.Popen._execute_child = warm.Popen._execute_child  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = warm.spawn


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
        file: Any = open(number, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
        lines = number == 2 or os.isatty(number)
        stream = io.TextIOWrapper(file, "utf-8", errors, line_buffering=lines, write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def execute(command: list[str], base_path: list[str]) -> None:
    """Run `SCRIPT ...`, `-m MODULE ...` or `-c CODE ...` as `__main__`."""
    options = [*takewhile(warm.OPTIONS.__contains__, command)]
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
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "an import has started a thread"
    gc.collect()
    gc.freeze()
    end_with(execute, serve(socket.socket(fileno=int(sys.argv[1]))), sys.path[1:])
