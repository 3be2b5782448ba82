"""Run the contenders of streaming.py, each turn in its own process.

    python -P contenders/server.py PATHS NAME ... < requests

Answers each request, a line of JSON, with another line; the first line says which of the named contenders can run. A
turn's process is forked from this one, which has imported everything: start-up is not timed, and turns cannot affect
each other. PYTHONPATH names our code, today's or an earlier commit's. The peers' Python finds its own packages before
those in PATHS.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib import metadata
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contenders.loader import Contender

PAGE_BYTES = 4096


def find_contenders(names: Sequence[str]) -> "tuple[dict[str, Contender], dict[str, str]]":
    """The contenders that can be imported, and package and version of each."""
    from contenders.pictures import PICTURE_LOADERS
    from contenders.text import TEXT_LOADERS

    known = {f"pictures/{name}": contender for name, contender in PICTURE_LOADERS.items()}
    known |= {f"text/{name}": contender for name, contender in TEXT_LOADERS.items()}
    contenders, versions = {}, {}
    for name in names:
        contender = known[name]
        try:
            for module in contender.modules:
                importlib.import_module(module)
            versions[name] = f"{contender.package} {metadata.version(contender.package)}"
            contenders[name] = contender
        except ImportError as error:
            print(f"{name} is left out: {error!r}", file=sys.stderr)
    return contenders, versions


# ---- actions ----------------------------------------------------------------------------------------------


def write(contender: "Contender", *, folder: str) -> dict[str, Any]:
    """Write the contender's own format."""
    if contender.write:
        contender.write(Path(folder))
    return {}


def take_turn(
    contender: "Contender", *, folder: str, batch: int, workers: int, epoch: int, warm_up: int, batches: int
) -> dict[str, Any]:
    """Time `batches` batches after a warm-up; one byte of each page of them is read."""
    import torch

    epoch_of = contender.open_epoch(Path(folder), batch=batch, workers=workers, epoch=epoch)
    gc.collect()
    items, wall, cpu = 0, 0.0, 0.0
    with closing(epoch_of) as stream:  # type: ignore[bad-argument-type]
        for number in range(warm_up + batches):
            if number == warm_up:
                items, wall, cpu = 0, time.perf_counter(), cpu_seconds()
            found = next(stream)
            items += batch if found is None else len(found)
            if isinstance(found, torch.Tensor):
                found.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()
        cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
    if items != batches * batch:
        raise RuntimeError(f"{items} samples came, not {batches} batches of {batch}")
    return {"items": items, **cost}


def seek(_contender: "Contender", **request: Any) -> dict[str, float | None]:
    """Call `text.seek`."""
    from contenders import text

    return text.seek(**request)


def cpu_seconds() -> float:
    """CPU time of this process and its workers, including those that have ended; NaN if it is unknown."""
    running = sum(_cpu_seconds_of(worker.pid) for worker in active_children())  # reaps those that have ended
    ended = os.times()
    return time.process_time() + running + ended.children_user + ended.children_system


def _cpu_seconds_of(pid: int | None) -> float:
    try:
        counts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(counts[11]) + int(counts[12])) / os.sysconf("SC_CLK_TCK")


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"write": write, "turn": take_turn, "seek": seek}


# ---- requests ---------------------------------------------------------------------------------------------


def answer(contender: "Contender", action: str, request: dict[str, Any], sender: Connection) -> None:
    """Carry out a request in a process that was forked for it."""
    sender.send(ACTIONS[action](contender, **request))


def in_a_fork(contender: "Contender", action: str, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, once its process and all that it started have ended."""
    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=answer, args=(contender, action, request, sender))
    process.start()
    process.join()
    return receiver.recv() if process.exitcode == 0 and receiver.poll() else {"error": f"exit code {process.exitcode}"}


def main(paths: str, *names: str) -> None:
    """Serve until there are no more requests; all other output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # benchmarks/ comes last: its streaming.py has the name of mosaicml's package.
    sys.path += [*filter(None, paths.split(os.pathsep)), str(Path(__file__).parents[1])]
    import torch

    torch.set_num_threads(1)
    contenders, versions = find_contenders(names)
    print(json.dumps(versions), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        contender = contenders[request.pop("name")]
        print(json.dumps(in_a_fork(contender, request.pop("action"), request)), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
