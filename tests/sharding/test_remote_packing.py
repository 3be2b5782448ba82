"""Packing from and to real servers: the same bytes as on disk, whatever the servers do."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from servers import Bucket, Proxy, run_nginx, use_s3
from tiny import picture, write_captions

from captioner.errors import UserError
from captioner.files import ownership, retries, storage
from captioner.shards.writing import claim
from sharding import make_shards
from sharding.settings import ShardSettings

pytestmark = [pytest.mark.slow, pytest.mark.external]

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    *("plain.jpg", "a b.jpg", 'it\'s "q".jpg', "50%.jpg", "%20.jpg", "a#b?c=d&e;f.jpg", "кот é 猫.jpg"),
    *("sub folder/x+y~[z]{*}.jpg", "cut short.jpg"),
]
PLAIN: dict[str, Any] = {
    "split": "train",
    "size": 680,
    "quality": 100,
    "shard_megabytes": 1,
    "threshold": 1,
    "workers": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos/` with odd names and one picture that is cut off, and `captions_train.json`."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(NAMES):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, "JPEG", quality=95)
    path.write_bytes(path.read_bytes()[:-40])
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    annotations = [
        {"id": 100 + number, "image_id": number, "caption": f"A {number} cat"} for number in range(len(NAMES))
    ]
    write_captions(folder / "captions_train.json", images=images, annotations=annotations)
    return folder


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What packing on disk gives: three shards, and the rest."""
    output = tmp_path_factory.mktemp("shards")
    pack(str(data), str(output))
    found = {path.name: path.read_bytes() for path in output.iterdir()}
    assert sum(name.endswith(".tar") for name in found) == 3
    assert json.loads(found["train.manifest.json"])["failures"] == {"truncated": 1}
    return comparable(found)


@pytest.fixture
def bucket(bucket: Bucket, data: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket that holds the data."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 2.0)
    bucket.put_folder(data, "data")
    return bucket


def pack(source: str, output: str, **changed: Any) -> None:
    images, captions = storage.join(source, "photos"), storage.join(source, "captions_train.json")
    paths: dict[str, Any] = {"images": images, "captions": captions, "output": output}
    make_shards.main(ShardSettings(**(paths | PLAIN | changed)))


HASTY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from captioner.files import ownership, retries, storage
from sharding import make_shards
retries.PATIENCE_SECONDS, ownership.BEAT_SECONDS, ownership.SILENT_SECONDS = 1.0, 0.2, 2.0
make_shards.run()
"""


def command(source: str, output: str, *, hasty: bool = True, **changed: Any) -> warm.Popen:
    """The same as a user runs it, with less patience where it is `hasty`."""
    flags = {
        "images": f"{source}/photos",
        "captions": f"{source}/captions_train.json",
        "output": output,
        **PLAIN,
        **changed,
    }
    line = [sys.executable, *(["-c", HASTY] if hasty else [str(ROOT / "sharding" / "make_shards.py")])]
    line += [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    pipe = subprocess.PIPE
    return warm.Popen(line, nested=True, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def comparable(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, with a manifest that does not say where its pictures came from."""
    files = dict(files)
    manifest = json.loads(files["train.manifest.json"])
    assert set(manifest["source"]) >= {"split", "captions", "images"}
    manifest["source"] = {**manifest["source"], "captions": "", "images": ""}
    files["train.manifest.json"] = json.dumps(manifest).encode()
    return files


def tars(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".tar")}


# ---- S3 ---------------------------------------------------------------------------------------------------


def test_a_pack_from_s3_to_s3_is_the_one_on_disk(bucket: Bucket, s3: str, expected: dict[str, bytes]) -> None:
    """By two workers, each with connections of its own; then once more, and with other settings."""
    source, output = f"s3://{bucket.name}/data", f"s3://{bucket.name}/shards"
    process = command(source, output, hasty=False, workers=2)
    shown, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert "1 truncated" in shown
    packed = bucket.read_all("shards")
    assert comparable(packed) == expected
    with Proxy(s3) as proxy, use_s3(proxy.address):
        written = []
        proxy.choose = lambda method, path: (written.append(path) if method in ("PUT", "POST") else None) or "ok"
        pack(source, output)
        assert {path.partition("?")[0].rpartition("/")[2] for path in written} == {
            *("train.packing", "vocabulary.json", "train.failures.jsonl", "train.manifest.json")
        }
        with pytest.raises(UserError, match="quality was 100, is 80"):
            pack(source, output, quality=80)
    assert bucket.read_all("shards") == packed


def test_a_second_packer_of_the_same_output_says_who_is_first(bucket: Bucket) -> None:
    output = f"s3://{bucket.name}/shards"
    with claim(output, "train"):
        process = command(f"s3://{bucket.name}/data", output)
        shown, error = process.communicate(timeout=60)
        assert (process.returncode, shown) == (2, "")
        watching, refusal = error.splitlines()
        assert "waiting up to 2 s to see if it is alive" in watching
        assert refusal.startswith(f"error: process {os.getpid()} on ")
    assert bucket.read_all("shards") == {}


def test_pictures_that_are_not_on_s3_are_counted(bucket: Bucket, expected: dict[str, bytes]) -> None:
    bucket.client.delete_object(Bucket=bucket.name, Key=f"data/photos/{NAMES[-1]}")
    pack(f"s3://{bucket.name}/data", f"s3://{bucket.name}/shards")
    packed = bucket.read_all("shards")
    assert json.loads(packed["train.manifest.json"])["failures"] == {"missing": 1}
    assert tars(packed) == tars(expected)


@pytest.mark.parametrize("moods", [["500", "503"], ["drop", "cut request", "cut answer", "500", "503"]])
def test_a_pack_over_a_server_that_fails_often_is_the_same(
    bucket: Bucket, s3: str, expected: dict[str, bytes], moods: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request of five fails, each kind at least once."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    rng, first = random.Random(0), iter(moods)
    with Proxy(s3) as proxy, use_s3(proxy.address):
        proxy.choose = lambda method, path: next(first, "") or (rng.choice(moods) if rng.random() < 0.2 else "ok")
        pack(f"s3://{bucket.name}/data", f"s3://{bucket.name}/shards")
    assert {"ok", *moods} == set(proxy.treated)
    assert comparable(bucket.read_all("shards")) == expected


def test_a_pack_over_a_server_that_stalls_is_the_same(
    bucket: Bucket, s3: str, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STALL_SECONDS", 1.0)
    with Proxy(s3) as proxy, use_s3(proxy.address):
        stalls = {("GET", "plain.jpg"), ("PUT", "train-000001.tar"), ("GET", "captions_train.json")}

        def choose(method: str, path: str) -> str:
            request = (method, path.partition("?")[0].rpartition("/")[2])
            if request in stalls:
                stalls.remove(request)
                return "stall"
            return "ok"

        proxy.choose = choose
        pack(f"s3://{bucket.name}/data", f"s3://{bucket.name}/shards")
    assert not stalls
    assert comparable(bucket.read_all("shards")) == expected


def test_a_server_that_is_gone_for_good_ends_in_one_line(bucket: Bucket, s3: str) -> None:
    with Proxy(s3) as proxy, use_s3(proxy.address):
        gone = []

        def choose(method: str, path: str) -> str:
            if method == "PUT" and "train-000001.tar" in path:
                gone.append(time.monotonic())
            return "drop" if gone else "ok"

        proxy.choose = choose
        process = command(f"s3://{bucket.name}/data", f"s3://{bucket.name}/shards")
        shown, error = process.communicate(timeout=180)
        assert time.monotonic() - gone[0] < 60
    assert (process.returncode, shown) == (2, "")
    *told, last = error.splitlines()
    assert last.startswith(f"error: cannot write s3://{bucket.name}/shards/train-000001.tar")
    assert all(line.startswith("process ") for line in told)
    assert set(bucket.read_all("shards")) - {"train.packing"} == {"train-000000.tar", "train-000000.index"}


def test_what_a_killed_packer_leaves_is_whole_and_is_completed(
    bucket: Bucket, s3: str, expected: dict[str, bytes]
) -> None:
    """Killed while half of an upload was sent: of a tar, of the manifest."""
    source, output = f"s3://{bucket.name}/data", f"s3://{bucket.name}/shards"
    for name in ("train-000001.tar", "train.manifest.json"):
        with Proxy(s3) as proxy, use_s3(proxy.address):
            proxy.choose = lambda method, path, name=name: "hold" if method == "PUT" and name in path else "ok"
            process = command(source, output)
            assert proxy.held.wait(60)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            time.sleep(0.5)
        left = bucket.read_all("shards")
        assert name not in left
        assert "train.manifest.json" not in left
        assert left.pop("train.packing")
        assert left == {name: expected[name] for name in left}
    assert len(left) == len(expected) - 1
    pack(source, output)
    assert comparable(bucket.read_all("shards")) == expected


# ---- the web ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_nginx(data, tmp_path_factory.mktemp("nginx") / "home") as address:
        yield address


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pack_from_the_web_holds_the_same_samples(web: str, tmp_path: Path, expected: dict[str, bytes]) -> None:
    pack(web, str(tmp_path / "shards"))
    assert tars(read_folder(tmp_path / "shards")) == tars(expected)
    pack(web, str(tmp_path / "shards"))


def test_pictures_that_the_web_does_not_have_are_counted(
    web: str, data: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    lines = [
        {"image": name, "caption": "a cat"}
        for name in (*NAMES, "none.jpg", "no such folder/n#ne?.jpg", "half \ud83d.jpg")
    ]
    (data / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack(web, str(tmp_path / "shards"), captions=f"{web}/more.jsonl")
    manifest = json.loads((tmp_path / "shards" / "train.manifest.json").read_text())
    assert manifest["failures"] == {"missing": 3, "truncated": 1}
    failures = (tmp_path / "shards" / "train.failures.jsonl").read_text().splitlines()
    assert {failure["name"] for failure in map(json.loads, failures)} == {
        NAMES[-1],
        *(line["image"] for line in lines[-3:]),
    }
    assert sum(shard["samples"] for shard in manifest["shards"]) == len(NAMES) - 1


def test_a_pack_from_a_web_server_that_fails_often_is_the_same(
    web: str, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request of five fails, the first of each kind for sure; none is taken for a missing or a cut picture."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(storage, "STALL_SECONDS", 1.0)
    rng = random.Random(0)
    moods = ["500", "503", "drop", "cut answer", "stall"]
    with Proxy(web) as proxy:
        first = iter(moods)
        proxy.choose = lambda method, path: next(first, "") or (rng.choice(moods[:-1]) if rng.random() < 0.2 else "ok")
        pack(proxy.address, str(tmp_path / "shards"))
    assert tars(read_folder(tmp_path / "shards")) == tars(expected)
    assert json.loads((tmp_path / "shards" / "train.manifest.json").read_text())["failures"] == {"truncated": 1}


def test_a_picture_that_the_web_server_refuses_is_counted(web: str, tmp_path: Path) -> None:
    with Proxy(web) as proxy:
        proxy.choose = lambda method, path: "403" if path.endswith("plain.jpg") else "ok"
        pack(proxy.address, str(tmp_path / "shards"))
    manifest = json.loads((tmp_path / "shards" / "train.manifest.json").read_text())
    assert manifest["failures"] == {"truncated": 1, "unreadable": 1}


def test_a_picture_that_the_server_fails_to_send_stops_the_packing(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.2)
    with Proxy(web) as proxy:
        proxy.choose = lambda method, path: "500" if method == "GET" and path.endswith("plain.jpg") else "ok"
        with pytest.raises(UserError, match="500"):
            pack(proxy.address, str(tmp_path / "shards"))


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("name", ["captions_train.json", "plain.jpg", "50%25.jpg"])
def test_a_web_server_that_is_gone_for_good_ends_in_one_line(
    web: str, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, *, method: str, name: str
) -> None:
    """What was finished before is whole; no picture is told to be bad because its server was away."""
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.2)
    gone = []

    def choose(asked: str, path: str) -> str:
        if asked == method and path.endswith(name):
            gone.append(path)
        return "drop" if gone else "ok"

    with Proxy(web) as proxy:
        proxy.choose = choose
        with pytest.raises(UserError) as caught:
            pack(proxy.address, str(tmp_path / "shards"))
    assert gone
    assert "\n" not in str(caught.value)
    left = tars({path.name: path.read_bytes() for path in tmp_path.glob("shards/*")})
    assert left == {name: expected[name] for name in left}
    assert not (tmp_path / "shards" / "train.manifest.json").exists()
