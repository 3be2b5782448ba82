"""A command whose start is timed: `python starting.py imports|train|caption|loader ...`.

Writes the times (`time.time()`) at which its parts ended to the file STAMPS as soon as the last one has, then exits.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

stamps = {"start of Python": time.time()}


def stamp(part: str) -> None:
    """Note that a part has ended."""
    stamps[part] = time.time()


def end(part: str) -> None:
    """Note that the last part has ended, write all, and exit."""
    stamp(part)
    Path(os.environ["STAMPS"]).write_text(json.dumps(stamps))
    raise SystemExit


def before(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Call `action` before the function `name` of a module or class."""
    function = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        action()
        return function(*arguments, **options)

    setattr(owner, name, called)


def imports() -> None:
    """Nothing but the imports that no training can do without."""
    import accelerate  # noqa: F401
    import torch  # noqa: F401

    end("torch and accelerate")


def train(*flags: str) -> None:
    """The training command until its first batch is handed to the training step."""
    import accelerate  # noqa: F401
    import torch  # noqa: F401

    stamp("torch and accelerate")
    from train import main
    from train.run.trainer import Trainer
    from train.step.step import TrainStep

    stamp("other imports")
    before(Trainer, "train_epoch", lambda: stamp("manifests, model, run folder"))
    before(TrainStep, "__call__", lambda: end("workers and first batch"))
    sys.argv = ["train/main.py", *flags]
    main.run()


def caption(*flags: str) -> None:
    """The captioning command until its first row is written."""
    from infer import main
    from infer.results import RowWriter

    stamp("imports")
    before(main, "caption_files", lambda: stamp("torch, unless ONNX, and model"))
    before(RowWriter, "write", lambda: end("workers and first row"))
    sys.argv = ["infer/main.py", *flags]
    main.run()


def loader(name: str, folder: str, batch: str, paths: str, action: str = "time") -> None:
    """A loader of images with two workers until its first batch; `write` writes its format."""
    sys.path += [*paths.split(os.pathsep), str(Path(__file__).parents[1])]  # benchmarks/ has a streaming.py: last
    from contenders.pictures import PICTURE_LOADERS

    contender = PICTURE_LOADERS[name]
    if action == "write":
        if contender.write:
            contender.write(Path(folder))
        return
    for module in contender.modules:
        import_module(module)
    stamp("imports")
    next(contender.open_epoch(Path(folder), batch=int(batch), workers=2, epoch=0))
    end("workers and first batch")


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    {"imports": imports, "train": train, "caption": caption, "loader": loader}[kind](*arguments)
