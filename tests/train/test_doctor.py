"""The doctor: a verdict that follows from the numbers, real measurements, and nothing left behind."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from servers import run_nginx
from streaming_data import write_split
from tiny import write_shards

from captioner.errors import UserError
from train.data import loader_speed
from train.data.loader_speed import LoaderSpeed
from train.doctor import DoctorSettings, main

MADE = LoaderSpeed(
    stage_us={"read": 40.0, "transform": 340.0, "collate": 20.0},
    handoff_us=10.0,
    pinning_us=20.0,
    alone_rate=2500.0,
    workers=2,
    workers_rate=4800.0,
    cores=8,
)


def told(measured: LoaderSpeed, *, wanted: float = 4000.0) -> str:
    return measured.verdict(wanted=wanted)


# ---- verdicts from made-up numbers --------------------------------------------------------------------------


def test_the_longest_stage_limits_and_the_wanted_workers_are_there() -> None:
    text = told(MADE)
    assert text.startswith("Transform limits: 2 workers make 4,800 samples/s; ")
    assert "4,000 samples/s need 2 workers of 2,400 each, and there are 8 cores." in text
    assert "\n" not in text
    slow = replace(MADE, stage_us=MADE.stage_us | {"read": 900.0})
    assert told(slow).startswith("Read limits: ")


def test_more_than_the_cores_can_make() -> None:
    assert "need 17 workers of 2,400 each, and there are 8 cores." in told(MADE, wanted=40_000)
    assert " for 2 training processes, and" in told(MADE, wanted=150_000)


def test_hand_off_limits() -> None:
    text = told(replace(MADE, handoff_us=500.0, workers_rate=1990.0))
    assert text.startswith("Hand-off limits: ")
    assert "need 2 workers of 2,500 each for 2 training processes, and" in text


def test_more_workers_than_cores_do_not_count_as_one_core_each() -> None:
    assert "workers of 2,500 each" in told(replace(MADE, workers=16, workers_rate=9000.0))


def test_the_table_has_a_row_for_each_stage() -> None:
    rows = MADE.rows()
    assert [row[0] for row in rows] == ["read", "transform", "collate", "hand-off", "pinning, for a GPU"]
    assert sum(float(str(row[2])) for row in rows) == pytest.approx(100)
    assert rows[1][3] == 2941


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


@pytest.mark.slow
def test_it_measures_tells_and_leaves_nothing(
    tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [write_shards(tmp_path / "a", (9, 0, 14)), write_shards(tmp_path / "b", (11,), first=50)]
    before = files(tmp_path)
    main(settings(*shards, json=tmp_path / "out/doctor.json"))
    assert files(tmp_path) == sorted(
        [*before, tmp_path / "out", tmp_path / "out/doctor.json", tmp_path / "out/doctor.svg"]
    )
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out/doctor.json").read_text())
    assert all(stage in (tmp_path / "out/doctor.svg").read_text() for stage in found["stage_us"])
    assert list(found["stage_us"]) == ["read", "transform", "collate"]
    assert all(us > 0 for us in found["stage_us"].values())
    assert min(found["handoff_us"], found["pinning_us"], found["alone_rate"], found["workers_rate"]) > 0
    assert found["download_mbs"] is None
    assert found["verdict"] in printed
    for stage in (*found["stage_us"], "hand-off"):
        assert stage in printed


@pytest.mark.slow
def test_any_shards_and_any_transform(tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = str(write_split(tmp_path / "texts", (40, 30)))
    own = replace(settings(shards), transform="doctor_functions:count_bytes")
    main(own)
    main(replace(own, collate="doctor_functions:total"))
    assert capsys.readouterr().out.count("1,000 samples/s need") == 2
    for wrong in ("doctor_functions:absent", "absent:count_bytes", "count_bytes"):
        with pytest.raises(UserError, match="give MODULE:FUNCTION"):
            main(replace(own, transform=wrong))
    with pytest.raises(UserError, match="give both, or neither"):
        main(replace(own, transform=None, collate="doctor_functions:total"))
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        main(replace(own, transform=None))


def test_fewer_samples_than_a_batch(tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(settings(write_shards(tmp_path / "a", (5,)), batch_size=64))
    assert "1,000 samples/s need" in capsys.readouterr().out


@pytest.mark.external
def test_shards_behind_a_url_are_fetched_first(
    tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "root/a", (9, 14))
    with run_nginx(tmp_path / "root", tmp_path / "nginx") as address:
        main(settings(f"{address}/a", json=tmp_path / "doctor.json"))
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["download_mbs"] > 0
    assert not files(temporary)


def test_nothing_is_left_when_it_is_interrupted(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "a", (20,))
    before = files(tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loader_speed, "run_loader", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(settings(shards))
    assert files(tmp_path) == before


def test_errors_are_told_in_one_line(tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*make_shards\.py"):
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
