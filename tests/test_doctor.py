"""The doctor: a verdict that follows from the numbers, real measurements, and nothing left behind."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from servers import run_nginx
from tiny import write_shards

from captioner.errors import UserError
from train import diagnosis, doctor
from train.diagnosis import Measured, verdict
from train.doctor import DoctorSettings, main, stage_rows

MADE = Measured(
    stage_us={"read": 20.0, "parse": 20.0, "decode": 300.0, "transform": 40.0, "collate": 20.0},
    handoff_us=10.0,
    alone_rate=2500.0,
    alone_cpu_us=395.0,
    workers=2,
    workers_rate=4800.0,
    cores=8,
    image_bytes=30_000.0,
    split_bytes=3 * 10**9,
    memory_bytes=64 * 10**9,
    warm_us=20.0,
    cold_us=200.0,
    loose_us=25.0,
    loose_cold_us=400.0,
    loose_folder="data/shards",
)


def told(measured: Measured, *, wanted: float = 4000.0) -> str:
    return "\n".join(verdict(measured, wanted=wanted))


# ---- verdicts from made-up numbers --------------------------------------------------------------------------


def test_decode_limits_and_the_wanted_workers_are_there() -> None:
    text = told(MADE)
    assert text.startswith("Decode limits: 300 of a worker's 400 µs an image, 75%.")
    assert "One worker makes 2,500 images/s from end to end: 400 µs an image, 395 of them in the processor;" in text
    assert "the stages add up to 400.\n" in text
    assert "2 workers make 4,800 images/s, 1.92 times as many as one alone." in text
    assert "4,000 images/s want 2 workers of 2,400 each; that leaves 6 of the 8 cores to training." in text
    assert "want 1 worker of" in told(MADE, wanted=1000)


def test_more_than_the_cores_can_make() -> None:
    text = told(MADE, wanted=40_000)
    assert "want 17 workers of 2,400 each; the 8 cores make about 19,200, more workers do not help." in text
    assert "They would do if decode took 83 µs, not 300: pack with a smaller --size or a lower --quality." in text
    text = told(MADE, wanted=150_000)
    assert "2 training processes (GPUs), as one takes 100,000 at most" in text
    assert "Even without any decode they would not do: it takes 63 cores." in text


def test_hand_off_limits() -> None:
    text = told(replace(MADE, handoff_us=500.0, workers_rate=1990.0))
    assert text.startswith("Hand-off limits: one training process takes 2,000 images/s, 2 workers could make 5,000.")
    assert "want 2 workers of 2,500 each, and 2 training processes (GPUs), as one takes 2,000 at most" in text


@pytest.mark.parametrize("stage", ["read", "parse", "transform", "collate"])
def test_any_stage_may_limit(stage: str) -> None:
    slow = replace(MADE, stage_us=MADE.stage_us | {stage: 900.0}, workers=4, workers_rate=3000.0, alone_rate=800.0)
    text = told(slow, wanted=10_000)
    assert text.startswith(f"{stage.capitalize()} limits: 900 of a worker's ")
    assert diagnosis.ADVICE[stage] in text


def test_stages_that_do_not_add_up_are_told() -> None:
    waiting = told(replace(MADE, alone_rate=2000.0))
    assert "500 µs an image, 395 of them in the processor; the stages add up to 400. It waits for the disk" in waiting
    changed = told(replace(MADE, alone_rate=2000.0, alone_cpu_us=490.0))
    assert "the stages add up to 400, which is another number: the machine's speed changed" in changed
    assert "another number" in told(replace(MADE, alone_rate=3750.0, alone_cpu_us=260.0))


def test_more_workers_than_cores_do_not_count_as_one_core_each() -> None:
    assert "workers of 2,500 each" in told(replace(MADE, workers=16, workers_rate=9000.0))


def test_cold_reading_and_memory() -> None:
    text = told(MADE)
    assert "Cold reading takes 200 µs an image (150 MB/s), warm 20 (1,500 MB/s)" in text
    assert "a worker makes 1,724 images/s cold, 2,500 warm." in text
    assert "The split has 3.00 GB, the machine 64.00 GB of memory: so later epochs are warm" in text
    assert "each epoch is cold" in told(replace(MADE, memory_bytes=10**9))
    assert "Cold reading was not measured" in told(replace(MADE, cold_us=None))


def test_what_a_server_must_give() -> None:
    assert "server" not in told(MADE)
    text = told(replace(MADE, download_mbs=60.0))
    assert "4,000 images/s want 120.0 MB/s (960 Mbit/s) from the server until all 3.00 GB are in the cache" in text
    assert "one connection gave 60.0 MB/s, for 2,000 images/s." in text


def test_shards_are_praised_only_where_they_help() -> None:
    text = told(MADE)
    assert "warm: reading takes 25 µs an image, 20 from shards, with which a worker is 1.01 times as fast" in text
    assert "1.01 times as fast: that is no difference." in text
    assert "1.34 times as fast: shards help." in text
    assert "shards cost time" in told(replace(MADE, cold_us=600.0))
    assert "not compared" in told(replace(MADE, loose_us=None, loose_cold_us=None))


def test_the_table_has_a_row_for_each_stage() -> None:
    rows = stage_rows(MADE)
    assert [row[0] for row in rows] == ["read", "parse", "decode", "transform", "collate", "hand-off"]
    assert sum(float(str(row[2])) for row in rows) == pytest.approx(100)
    assert rows[2][3] == 3333


# ---- real measurements --------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the system's for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def settings(*shards: str, batch_size: int = 8, crop: int = 24, json: Path | None = None) -> DoctorSettings:
    return DoctorSettings(shards=shards, batch_size=batch_size, crop=crop, seconds=1, workers=2, json=json)


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*"))


def test_it_measures_tells_and_leaves_nothing(
    tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [write_shards(tmp_path / "a", (9, 0, 14)), write_shards(tmp_path / "b", (11,), first=50)]
    before = files(tmp_path)
    main(settings(*shards, json=tmp_path / "out/doctor.json"))
    assert files(tmp_path) == sorted([*before, tmp_path / "out", tmp_path / "out/doctor.json"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out/doctor.json").read_text())
    assert list(found["stage_us"]) == ["read", "parse", "decode", "transform", "collate"]
    assert all(us > 0 for us in found["stage_us"].values())
    assert min(found["handoff_us"], found["alone_rate"], found["workers_rate"], found["loose_us"]) > 0
    assert found["loose_folder"] == shards[0]
    assert found["download_mbs"] is None
    for line in found["verdict"]:
        assert line in printed
    for stage in (*found["stage_us"], "hand-off"):
        assert stage in printed


def test_fewer_samples_than_a_batch(tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(settings(write_shards(tmp_path / "a", (5,)), batch_size=64))
    assert "1,000 images/s want" in capsys.readouterr().out


def test_shards_behind_a_url_are_fetched_first(
    tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "root/a", (9, 14))
    with run_nginx(tmp_path / "root", tmp_path / "nginx") as address:
        main(settings(f"{address}/a", json=tmp_path / "doctor.json"))
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["download_mbs"] > 0
    assert found["loose_folder"] == str(temporary)
    assert "from the server until all" in capsys.readouterr().out
    assert not files(temporary)


@pytest.mark.parametrize("step", ["run_stages", "run_stream", "random_order"])
def test_nothing_is_left_when_it_is_interrupted(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    shards = write_shards(tmp_path / "a", (20,))
    before = files(tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if step == "random_order":  # while loose files are there
        monkeypatch.setattr(doctor, "run_stream", lambda *_, **__: (100.0, 1.0))
    monkeypatch.setattr(doctor, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(settings(shards))
    assert files(tmp_path) == before


def test_errors_are_told_in_one_line(tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*make_shards\.py packs it"):
        main(settings(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"holds no samples: see its train\.failures\.jsonl"):
        main(settings(write_shards(tmp_path / "empty", (0,))))
    shards = write_shards(tmp_path / "a", (9,))
    with pytest.raises(UserError, match="give a smaller --crop"):
        main(settings(shards, crop=64))
    tar = tmp_path / "a/train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe"))
    with pytest.raises(UserError, match=r"is damaged at sample .* \(checksum differs\)"):
        main(settings(shards))
    assert not files(temporary)
