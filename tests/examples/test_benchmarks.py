"""Benchmarks run, and write the form that the design promises; what they measure is no matter of tests."""

import html
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from tiny import picture
from tiny_model import write_model

import scaling
import streaming
import training as command
from captioner.errors import UserError
from captioner.vocabulary import START
from captioner.workers import count_processors
from contenders import training
from contenders.pictures import write_loose
from measuring import commands
from measuring.photos import find_photos
from train.step.schedule import make_schedule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]


def packing(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    return benchmark("packing", *flags)


def benchmark(name: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / f"benchmarks/{name}.py", *flags]
    return warm.run(command, capture_output=True, text=True, nested=True)


def test_packing_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    """On so few small pictures that some bars have nothing to stand on; they are listed all the same."""
    for seed in range(3):
        picture(seed, width=640, height=480).save(tmp_path / f"{seed}.jpg", quality=96)
    file = tmp_path / "packing.json"
    done = packing("--quick", "--images", tmp_path, "--pictures", "8", "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert {"rows", "bars"} <= set(content)
    assert {row["contender"] for row in content["rows"]} >= {"the book's loop", "ours, one worker"}
    bars = content["bars"]
    assert len(bars) == len({bar["name"] for bar in bars}) == 8
    for bar in bars:
        assert set(bar) == {"name", "value", "bar", "holds"}
        assert (bar["value"] is None) == (bar["holds"] is None)
    assert bars[0]["value"] > 0
    assert bars[0]["name"] in " ".join(done.stdout.split())


def test_serving_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    file = tmp_path / "serving.json"
    model = write_model(tmp_path / "model")
    done = benchmark("serving", "--quick", "--model", model, "--pictures", "16", "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    rows = {row["contender"]: row for row in content["rows"]}
    assert list(rows) == ["batch captioning", "server, 1 client", "server, 8 clients", "server, 64 clients"]
    assert all(row["images_a_second"] > 0 for row in rows.values())
    assert all(row["p95_ms"] >= row["median_ms"] > 0 for name, row in rows.items() if name.startswith("server"))
    assert [bar["value"] > 0 for bar in content["bars"]] == [True, True]


def test_streaming_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    """Peers and the earlier commit are there or not: a bar that needs a missing one is listed as not measured."""
    for seed in range(3):
        picture(seed, width=640, height=480).save(tmp_path / f"{seed}.jpg", quality=96)
    file = tmp_path / "streaming.json"
    done = benchmark("streaming", "--quick", "--images", tmp_path, "--batches", "1", "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    for part, workers, names in (
        ("pictures", 0, {"ours", "webdataset", "the book's loader", "decode as ours"}),
        ("pictures", 2, {"ours", "webdataset", "the book's loader"}),
        ("text", 0, {"ours", "ours, a transform", "ours, four sources", "ours, reading alone", "webdataset"}),
    ):
        rows = {
            row["contender"]: row for row in content["rows"] if (row["part"], row.get("workers")) == (part, workers)
        }
        assert names <= set(rows)
        assert all(row["wall_us_a_sample"] > 0 for row in rows.values())
    seeks = [row for row in content["rows"] if row["part"] == "seek"]
    assert {row["sources"] for row in seeks} == {1, 4}
    assert {row["num_samples"] for row in seeks} == {10**8}
    bars = {bar["name"]: bar["value"] for bar in content["bars"]}
    assert len(bars) == len(content["bars"]) == 12
    for bar in content["bars"]:
        assert set(bar) == {"name", "value", "bar", "holds"}
        assert (bar["value"] is None) == (bar["holds"] is None)
    assert bars["text: ours / webdataset: at least"] > 0


def test_an_earlier_commit_that_history_lacks_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a shallow clone or an archive."""
    monkeypatch.setattr(commands, "REPOSITORY", tmp_path)
    assert commands.check_out(streaming.pictures.EARLIER, tmp_path / "earlier") is None
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["packing", "streaming", "training"])
def test_a_folder_without_photos_is_a_user_error(name: str, tmp_path: Path) -> None:
    done = benchmark(name, "--quick", "--images", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_training_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    """What this machine cannot measure has a row that says so, or a bar without a value."""
    for seed in range(3):
        picture(seed, width=640, height=480).save(tmp_path / f"{seed}.jpg", quality=96)
    file = tmp_path / "training.json"
    done = benchmark("training", "--quick", "--parts", "cpu", "--images", tmp_path, "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    rows = {(row["encoder"], row["precision"], row["contender"]): row for row in content["rows"] if "contender" in row}
    for precision in ("fp32", "bf16"):
        row = rows["squeezenet1_1", precision, "ours"]
        assert (row["times_the_book_by_cpu"] is None) == row["note"].startswith("not measured")
    assert rows["squeezenet1_1", "fp32", "the book's loop"]["captions_a_second"] > 0
    bars = content["bars"]
    assert len(bars) == len({bar["name"] for bar in bars}) == 16
    for bar in bars:
        assert set(bar) == {"name", "value", "bar", "holds"}
        absent = bar["name"].startswith("GPU") or ("bf16" in bar["name"] and not command.has_bf16())
        assert (bar["value"] is None) == (bar["holds"] is None) == absent


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> training.Job:
    """Four pictures with captions shorter and longer than the cut."""
    folder = tmp_path_factory.mktemp("training")
    for seed in range(4):
        picture(seed, width=640, height=480).save(folder / f"{seed}.jpg", quality=96)
    captions = [[f"A dog, {'very ' * (5 * number + extra)}tired." for extra in range(5)] for number in range(4)]
    training.pack(find_photos(folder), captions, folder / "packed", num_samples=4)
    write_loose(folder / "packed")
    return training.Job(
        folder=folder / "packed", encoder="squeezenet1_1", batch=4, workers=0, precision="no", on_cpu=True
    )


def test_the_book_and_ours_learn_the_same_words(job: training.Job) -> None:
    """Of captions at the cut and beyond it too; the book has `<start>` besides."""
    dataset = training.BookCaptions(job.folder)
    _, tokens_BT, lengths = training.collate_captions([dataset[number] for number in range(len(dataset))])
    assert lengths == sorted(lengths, reverse=True)
    theirs = [row_T[:length].tolist() for row_T, length in zip(tokens_BT, lengths, strict=True)]
    assert {ids[0] for ids in theirs} == {START}
    batch = training.Trainer(job).batch_of(4, None)
    assert sorted(word for ids in theirs for word in ids[1:]) == sorted(batch.captions.targets_M.tolist())
    assert training.num_captions_of(batch) == len(theirs) == 20


def test_padded_and_packed_captions_teach_the_same(job: training.Job) -> None:
    """Without dropout, by a plain gradient step, which hides no scale: weights come out alike, and have moved."""
    weights = []
    for action in (lambda *_: None, training.Trainer.step, training.Trainer.padded_step):
        trainer = training.Trainer(job)
        trainer.model.drop.p = 0.0
        trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=1.0)
        trainer.schedule = make_schedule(trainer.optimizer, "constant", total_steps=20)
        batch = trainer.batch_of(4, None)
        torch.manual_seed(1)
        action(trainer, replace(batch, inputs=torch.rand(4, trainer.model.encoder.num_features)))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    before, packed, padded = weights
    assert (packed - before).abs().max() > 1e-3
    torch.testing.assert_close(padded, packed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", ["{}", "no json", '{"annotations": []}'])
def test_captions_that_are_not_cocos_are_a_user_error(content: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(content)
    with pytest.raises(UserError, match="--captions"):
        training.read_captions(file)


def test_captioning_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    for seed in range(3):
        picture(seed, width=320, height=240).save(tmp_path / f"{seed}.jpg", quality=96)
    flags = ("--quick", "--images", tmp_path, "--pictures", "4", "--large-pictures", "1", "--encoders", "squeezenet1_1")
    done = benchmark("captioning", *flags, "--json", tmp_path / "captioning.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "captioning.json").read_text())
    load = "alone" if count_processors() == 1 else "all cores busy"
    assert {row["contender"] for row in content["rows"]} >= {"the book's way", f"decode and resize, {load}"}
    assert all(row["wall_ms_an_image"] > 0 for row in content["rows"])
    assert all(bar["value"] > 0 for bar in content["bars"])
    assert len(content["bars"]) == 6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory of a process")
def test_scaling_quickly_measured_gives_rows_and_bars(tmp_path: Path) -> None:
    """The parts that want neither pictures nor a server."""
    done = benchmark("scaling", "--quick", "--parts", "plan", "cache", "--json", tmp_path / "scaling.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "scaling.json").read_text())
    plans = [row for row in content["rows"] if row["part"] == "plan"]
    assert [row["samples"] for row in plans] == [10**3, 10**6]
    assert plans[-1]["opens"] == 256
    assert all(bar["value"] > 0 for bar in content["bars"])
    assert len(content["bars"]) == 3
    plot = html.unescape((tmp_path / "scaling.svg").read_text())
    assert all(bar["name"].partition(":")[0][:40] in plot for bar in content["bars"])


def test_the_first_limit_on_paper_is_the_one_that_is_exceeded_most() -> None:
    found = scaling.Figures(worker_us=900, download_us=80, handoff_us=20, image_bytes=50_000)
    machine = scaling.Machine(gpus=8, cores=20, disk_mbs=10_000, network_mbs=10_000, store_mbs=10_000)
    limits = {
        (gpus, rate): scaling.on_paper(found, machine, gpus=gpus, rate=rate)["limit"]
        for gpus, rate in ((1, 2_000), (8, 2_000), (8, 3_000), (104, 2_000), (1_000, 3_000))
    }
    assert list(limits.values()) == ["GPU", "GPU", "decoding cores", "store", "store"]
