"""What waits is captioned together, and what fails inside costs only the images that were in it."""

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import crash
import numpy as np
import pytest
from tiny import picture
from tiny_model import write_model

from captioner.describe import Captioner
from captioner.errors import UserError
from captioner.images.views import read_eval_view
from captioner.model.bundle import load_bundle
from infer.serving import service
from infer.serving.service import Service

OPTIONS: dict[str, Any] = {"num_workers": 2, "max_pixels": 10_000}


class Gated(Captioner):
    """Waits before each batch until the gate is open, and fails at those of `bad_size`; `sizes` are all batches'."""

    gate: threading.Event
    sizes: list[int]
    bad_size = 0

    def describe_views(self, views_BPP3: np.ndarray) -> Any:
        self.sizes.append(len(views_BPP3))
        assert self.gate.wait(60)
        if len(views_BPP3) == self.bad_size:
            raise RuntimeError("a bad batch")
        return super().describe_views(views_BPP3)


@pytest.fixture
def captioner(tmp_path: Path) -> Iterator[Gated]:
    captioner = Gated(load_bundle(str(write_model(tmp_path / "model"))))
    captioner.gate, captioner.sizes = threading.Event(), []
    yield captioner
    captioner.gate.set()


def submit(to: Service, seed: int, *, side: int = 40) -> Future[Any]:
    buffer = io.BytesIO()
    picture(seed, width=side, height=side).save(buffer, "PNG")
    buffer.seek(0)
    return to.submit(f"{seed}.png", buffer)


def wait_until_decoded(to: Service, number: int) -> None:
    deadline = time.monotonic() + 60
    while to._decoded.qsize() < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_that_wait_are_captioned_together_up_to_the_batch_size(captioner: Gated) -> None:
    with Service(captioner, batch_size=4, **OPTIONS) as running:
        rows = [submit(running, 0)]
        while not captioner.sizes:
            time.sleep(0.01)
        rows += [submit(running, seed) for seed in range(1, 9)]
        wait_until_decoded(running, 8)
        captioner.gate.set()
        assert [row.result(60)["path"] for row in rows] == [f"{seed}.png" for seed in range(9)]
        captions = [row.result()["caption"] for row in rows]
    assert captioner.sizes == [1, 4, 4]
    views = np.stack([read_eval_view(picture(n, width=40, height=40), captioner.bundle.view)[0] for n in range(9)])
    assert captions == [description.caption for description in captioner.describe_views(views)]


def test_a_batch_that_fails_costs_no_other(captioner: Gated) -> None:
    captioner.bad_size = 2
    with Service(captioner, batch_size=2, **OPTIONS) as running:
        first = submit(running, 0)
        while not captioner.sizes:
            time.sleep(0.01)
        rows = [submit(running, seed) for seed in (1, 2, 3)]
        wait_until_decoded(running, 3)
        captioner.gate.set()
        results = [row.exception(60) for row in (first, *rows)]
    assert sorted(map(str, results)) == ["None", "None", "a bad batch", "a bad batch"]


def test_workers_that_always_die_fail_one_image_and_are_replaced(
    captioner: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner.gate.set()
    monkeypatch.setattr(service, "MAX_DEATHS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(service, "decode_upload", crash.always)
        running = Service(captioner, batch_size=4, **(OPTIONS | {"num_workers": 1}))
        row = submit(running, 0)
        while not running._uploads.empty():
            time.sleep(0.01)
    with running:
        with pytest.raises(UserError, match="worker processes died 2 times"):
            row.result(60)
        assert submit(running, 1).result(60)["caption"]


def test_a_closed_service_has_answered_everything(captioner: Gated) -> None:
    captioner.gate.set()
    with Service(captioner, batch_size=4, **OPTIONS) as running:
        rows = [submit(running, seed) for seed in range(20)]
        large = submit(running, 21, side=101)
    assert all(row.done() and row.result()["caption"] for row in rows)
    assert large.result()["message"] == "101x101 pixels, 10,000 are allowed: shrink it"
