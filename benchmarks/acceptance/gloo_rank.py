"""Run a training script as one rank of a gloo job on any device: `python -m acceptance.gloo_rank SCRIPT FLAGS`.

Accelerate always uses NCCL for GPUs, and NCCL refuses two ranks on one GPU.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed

start = torch.distributed.init_process_group


def start_with_gloo(backend: str | None = None, **options: Any) -> None:
    """`init_process_group` with the backend gloo."""
    start("gloo", **options)


if __name__ == "__main__":
    setattr(torch.distributed, "init_process_group", start_with_gloo)  # noqa: B010 (its type says more)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
