"""A command that `tests/support/warm.py` forks is what a new interpreter makes of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm

TELL = """
import json, os, sys
import telling
print(json.dumps([sys.argv, sys.path, os.getcwd(), sorted(os.environ.items()), __name__, globals().get("__file__"),
                  os.getppid(), os.getsid(0) == os.getpid(), sys.stdin.read(), telling.__file__,
                  sys.modules["__main__"].__dict__ is globals()]))
print("an error", file=sys.stderr)
"""
ENDS = {
    "well": "print('x', end='')",
    "with a number": "import sys; sys.exit(7)",
    "with words": "import sys; sys.exit('no')",
    "with None": "raise SystemExit",
    "traceback": "import atexit; atexit.register(print, 'at exit'); raise ValueError('wrong')",
    "interrupted": "raise KeyboardInterrupt",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "killed with output": "import os; print('x'); os.kill(os.getpid(), 9)",
    "terminated": "import os; os.kill(os.getpid(), 15)",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
    "deleted": "class A:\n    def __del__(self): print('deleted')\na = A()",
}
PARENT = """
import multiprocessing, os, subprocess, sys
code = "import os, sys; print(os.getppid(), 'torch' in sys.modules)"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
for method in ("spawn", "forkserver", "fork"):
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(abs, range(-9, 0)) == [*range(9, 0, -1)]
if (child := os.fork()) == 0:  # it has no server
    os._exit(subprocess.run([sys.executable, "-c", "raise SystemExit(5)"]).returncode)
assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 5
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [["tell.py", "a"], ["-m", "tell", "a"], ["-c", TELL, "a"], ["-P", "-u", "tell.py"]])
@pytest.mark.parametrize("new_session", [False, True])
def test_a_command_finds_itself_as_in_a_new_interpreter(words: list[str], new_session: bool, tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "telling.py").write_text("")
    found = []
    for popen in (subprocess.Popen, warm.Popen):
        process = popen(
            [sys.executable, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": "library", "MINE": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=new_session,
        )  # fmt: skip
        printed, _ = process.communicate("given")
        assert process.returncode == 0, printed
        found.append(sorted(printed.splitlines()))
    assert found[0] == found[1]
    assert json.loads(found[0][0])[6] == os.getpid()


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize("end", ENDS)
def test_a_command_ends_as_an_interpreter_does(end: str, options: list[str]) -> None:
    plain, forked = (
        start([sys.executable, *options, "-c", ENDS[end]], capture_output=True, text=True)
        for start in (subprocess.run, warm.run)
    )
    assert (forked.returncode, forked.stdout) == (plain.returncode, plain.stdout)
    assert forked.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_a_command(number: signal.Signals) -> None:
    code = "import time; print('ready', flush=True)\nwhile True: time.sleep(0.01)"  # pause() could miss an early one
    with warm.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.poll() is None
        assert process.stdout
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(10) == -number


def test_a_launchers_commands_are_its_children_and_it_may_have_workers() -> None:
    with warm.Popen([sys.executable, "-c", PARENT], nested=True, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0].split() == [str(process.pid), "True"]
    assert process.returncode == 0


def test_what_is_read_at_the_start_is_read() -> None:
    code = "import sys; print(sys.flags.optimize)"
    command = [sys.executable, "-c", code]
    assert warm.run(command, env=os.environ | {"PYTHONOPTIMIZE": "2"}, capture_output=True, text=True).stdout == "2\n"
    assert warm.run(["echo", "2"], capture_output=True, text=True).stdout == "2\n"


def test_a_dead_server_fails_the_test_that_needs_it_and_not_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "server", server := warm.Server())
    monkeypatch.setattr(warm, "PRELOADED", ())
    assert warm.run([sys.executable, "-c", ""]).returncode == 0
    assert server._connection
    server._connection.shutdown(2)
    with pytest.raises(RuntimeError, match="has died"):
        warm.run([sys.executable, "-c", ""])
    assert warm.run([sys.executable, "-c", ""]).returncode == 0
