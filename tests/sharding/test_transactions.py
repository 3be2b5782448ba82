"""Whatever ends a packing, running it again gives the bytes of an undisturbed run and redoes no finished shard."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import crash
import pytest
from tiny import picture, write_coco

from captioner.errors import UserError
from captioner.files import storage
from captioner.images import loading
from captioner.shards.format import read_manifest
from sharding import make_shards
from sharding.packing import pack_split
from sharding.settings import ShardSettings

NUM_PICTURES = 60  # 3 a shard
NUM_SHARDS = 20

context: Any = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), num_train=NUM_PICTURES, num_val=0)


@pytest.fixture(scope="module")
def undisturbed(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of all files of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed")
    make_shards.main(flags(coco, output))
    found = files(output)
    assert len([name for name in found if name.endswith(".tar")]) == NUM_SHARDS
    return found


def flags(coco: Path, output: Path, **changed: Any) -> ShardSettings:
    """Settings for one process and shards of 3 pictures each, as far as not `changed`."""
    plain: dict[str, Any] = {"size": 680, "quality": 100, "shard_megabytes": 1, "threshold": 1, "workers": 1}
    paths: dict[str, Any] = {"images": str(coco), "captions": str(coco / "annotations"), "output": str(output)}
    return ShardSettings(**(paths | plain | changed))


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards whose index stands, with what tells a file left alone from one written again."""
    names = [path.stem for path in folder.glob("*.index")]
    found = {name: (folder / f"{name}.tar").stat() for name in names}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def complete_and_compare(settings: ShardSettings, undisturbed: dict[str, str]) -> int:
    """Run again; returns how many shards of the disturbed run were there to be left alone."""
    output = Path(settings.output)
    before = finished(output) if output.exists() else {}
    make_shards.main(settings)
    assert files(output) == undisturbed
    after = finished(output)
    assert {name: after[name] for name in before} == before
    return len(before)


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextlib.contextmanager
def packing(settings: ShardSettings, *, num_shards: int) -> Iterator[Any]:
    """A process that packs and has stopped after so many shards; it is gone at the end whatever happened."""
    point = (f"train-{num_shards - 1:06d}.index", "after", signal.SIGSTOP)
    process = context.Process(target=crash.pack_with_signal, args=(settings, *point))
    process.start()
    try:
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        assert len(finished(Path(settings.output))) == num_shards
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "num_kept"),
    [
        (("train-000000.tar", "half"), 0),
        (("train-000000.tar", "before"), 0),
        (("train-000003.tar", "after"), 3),
        (("train-000003.index", "half"), 3),
        (("train-000003.index", "after"), 4),
        (("vocabulary.json", "before"), NUM_SHARDS),
        (("train.failures.jsonl", "before"), NUM_SHARDS),
        (("train.manifest.json", "half"), NUM_SHARDS),
        (("train.manifest.json", "after"), NUM_SHARDS),
    ],
)
def test_killed_at_each_step_of_writing(
    coco: Path, undisturbed: dict[str, str], tmp_path: Path, point: tuple[str, str], num_kept: int
) -> None:
    arguments = (flags(coco, tmp_path / "shards"), *point, signal.SIGKILL)
    process = context.Process(target=crash.pack_with_signal, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert complete_and_compare(flags(coco, tmp_path / "shards"), undisturbed) == num_kept


PAUSE_AFTER_EACH_SHARD = """
import time
from pathlib import Path
rename = Path.replace
def replace(partial, target):
    rename(partial, target)
    if str(target).endswith(".index"):
        time.sleep(1)
Path.replace = replace
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_with_two_workers_ended_from_outside(
    coco: Path, undisturbed: dict[str, str], tmp_path: Path, signal_number: int
) -> None:
    """The processes end at once, and Ctrl-C leaves nothing half written behind."""
    output = tmp_path / "shards"
    (tmp_path / "sitecustomize.py").write_text(PAUSE_AFTER_EACH_SHARD)  # which each worker loads
    line = [sys.executable, "-m", "sharding.make_shards", "--images", coco, "--captions", coco / "annotations"]
    line += [
        "--output",
        output,
        "--size",
        680,
        "--quality",
        100,
        "--shard-megabytes",
        1,
        "--threshold",
        1,
        "--workers",
        2,
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a shell's background ignore it
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        list(map(str, line)), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    wait_until(lambda: any(output.glob("*.index")) or process.poll() is not None)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.kill()
    _, error = process.communicate(timeout=30)  # to the end of its output, which the last of its processes holds open
    if signal_number == signal.SIGINT:
        assert (process.returncode, error.strip()) == (130, "interrupted")
        assert not list(output.glob("*.partial"))
    assert 0 < complete_and_compare(flags(coco, output, workers=2), undisturbed) < NUM_SHARDS


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
class TestDisks:
    """On a disk of its own, that the test makes too small or read-only."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False)
        if mounted.returncode:
            pytest.skip("this machine does not let root mount a disk")
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_full_disk(self, coco: Path, undisturbed: dict[str, str], disk: Path, workers: int) -> None:
        with pytest.raises(UserError, match=r"No space left on device.*run\s+the same command again"):
            make_shards.main(flags(coco, disk / "shards", workers=workers))
        assert not list((disk / "shards").glob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert complete_and_compare(flags(coco, disk / "shards"), undisturbed) > 0

    def test_a_disk_that_becomes_read_only(self, coco: Path, undisturbed: dict[str, str], disk: Path) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        with packing(flags(coco, disk / "shards"), num_shards=3):
            pass
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(UserError, match="Read-only file system"):
            make_shards.main(flags(coco, disk / "shards"))
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert complete_and_compare(flags(coco, disk / "shards"), undisturbed) == 3


def test_pictures_that_vanish_while_they_are_packed(coco: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A folder that is gone for a while must not become shards full of missing pictures."""
    data = tmp_path / "coco"
    shutil.copytree(coco, data)
    output = tmp_path / "shards"
    with packing(flags(data, output), num_shards=2) as process:
        (data / "train2014").rename(data / "away")
        os.kill(process.pid, signal.SIGCONT)
        process.join()
        assert process.exitcode == 1  # UserError, outside the command that would make it a line
    assert not (output / "train.manifest.json").exists()
    with pytest.raises(UserError, match="none of the 60 images of split train is in"):
        make_shards.main(flags(data, output))
    (data / "away").rename(data / "train2014")
    kept = finished(output)
    make_shards.main(flags(data, output))
    same = {name for name in undisturbed if name != "train.manifest.json"}  # which tells another picture folder
    assert {name: files(output)[name] for name in same} == {name: undisturbed[name] for name in same}
    assert {name: finished(output)[name] for name in kept} == kept


def test_a_picture_that_vanishes_or_changes_after_planning_is_told_and_no_shard_is_made_of_it(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "coco"
    shutil.copytree(coco, data)
    some = next((data / "train2014").iterdir())
    content = some.read_bytes()
    planned = pack_split.plan_split

    def then(action: Callable[[], object]) -> None:
        monkeypatch.setattr(pack_split, "plan_split", lambda *given: (planned(*given), action())[0])

    then(some.unlink)
    with pytest.raises(UserError, match=f"{some.name} vanished while it was packed"):
        make_shards.main(flags(data, tmp_path / "shards"))
    some.write_bytes(content)
    then(lambda: some.write_bytes(content + b"more"))
    with pytest.raises(UserError, match="changed while it was packed"):
        make_shards.main(flags(data, tmp_path / "shards"))


@pytest.mark.parametrize("finish_first", [False, True])
def test_changed_input_is_refused_with_what_differs(coco: Path, tmp_path: Path, finish_first: bool) -> None:
    """Against a complete output, and against one that was never finished."""
    data, output = tmp_path / "coco", tmp_path / "shards"
    shutil.copytree(coco, data)
    make_shards.main(flags(data, output))
    if not finish_first:
        (output / "train.manifest.json").unlink()
        (output / "train-000019.index").unlink()
    before = files(output)
    some = sorted((data / "train2014").iterdir())[7]
    content = some.read_bytes()
    picture(99).save(some)
    with pytest.raises(UserError, match=r"made differently \(images were added, removed, or changed in size\)"):
        make_shards.main(flags(data, output))
    some.unlink()
    with pytest.raises(UserError, match="made differently"):
        make_shards.main(flags(data, output))
    some.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_megabytes was 1, is 2.*another --output.*or delete .*/train\*"):
        make_shards.main(flags(data, output, shard_megabytes=2))
    with pytest.raises(UserError, match="resize was squash, is none"):
        make_shards.main(flags(data, output, resize="none"))
    assert files(output) == before
    make_shards.main(flags(data, output))


def test_shards_that_this_plan_does_not_make_are_refused(coco: Path, tmp_path: Path) -> None:
    """Of a run that was killed before its first shard was done, but not before its second."""
    output = tmp_path / "shards"
    make_shards.main(flags(coco, output))
    for name in ("train.manifest.json", *(f"train-0000{n:02d}.{e}" for n in range(19) for e in ("tar", "index"))):
        (output / name).unlink()
    before = files(output)
    with pytest.raises(UserError, match=r"train-000019\.index, which this input and these settings do not make"):
        make_shards.main(flags(coco, output, shard_megabytes=64))
    assert files(output) == before


def test_a_caption_file_without_captions_leaves_a_finished_split_alone(coco: Path, tmp_path: Path) -> None:
    output, empty = tmp_path / "shards", tmp_path / "captions_train.csv"
    make_shards.main(flags(coco, output))
    before = files(output)
    empty.write_text("image,caption\n")
    with pytest.raises(UserError, match="holds no image of split train to pack"):
        make_shards.main(flags(coco, output, captions=str(empty)))
    assert files(output) == before


def test_a_run_that_ends_in_an_error_deletes_nothing(tmp_path: Path) -> None:
    """The only shard is cut, and its images, at the same size, cannot be decoded any more."""
    data, output = write_coco(tmp_path / "coco", num_train=3, num_val=0), tmp_path / "shards"
    make_shards.main(flags(data, output))
    packed, tar = files(output), output / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    before = files(output)
    images = {path: path.read_bytes() for path in (data / "train2014").iterdir()}
    for path, content in images.items():
        path.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=r"could be packed .*3 undecodable"):
        make_shards.main(flags(data, output))
    assert files(output) == before
    for path, content in images.items():
        path.write_bytes(content)
    make_shards.main(flags(data, output))
    assert files(output) == packed


def test_a_tar_of_another_program_is_not_written_over(coco: Path, tmp_path: Path) -> None:
    tar = tmp_path / "train-000000.tar"
    with tarfile.open(tar, "w") as writer:
        writer.addfile(tarfile.TarInfo("somebody.jpg"))
    content = tar.read_bytes()
    with pytest.raises(UserError, match="made by another program"):
        make_shards.main(flags(coco, tmp_path))
    assert tar.read_bytes() == content


def test_shards_of_another_format_are_refused_with_the_remedies(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards.main(flags(coco, tmp_path / "shards"))
    before = files(tmp_path / "shards")
    monkeypatch.setattr("captioner.shards.format.FORMAT_VERSION", 99)
    with pytest.raises(UserError, match=r"another --output, or delete .*train\*"):
        make_shards.main(flags(coco, tmp_path / "shards"))
    (tmp_path / "shards" / "train.manifest.json").unlink()
    with pytest.raises(UserError, match=r"another version.*another --output, or delete .*train\*"):
        make_shards.main(flags(coco, tmp_path / "shards"))
    assert {**files(tmp_path / "shards"), "train.manifest.json": before["train.manifest.json"]} == before


def test_a_picture_that_the_disk_fails_to_read_stops_the_run_and_too_little_memory_does(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither may become a failure of a shard that is kept."""

    read = storage.read_bytes

    def read_or_fail(location: str, **options: Any) -> bytes:
        if location.endswith("05.jpg"):
            raise OSError(5, "Input/output error")
        return read(location, **options)

    def run_out_of_memory(*_: Any, **__: Any) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", read_or_fail)
        with pytest.raises(UserError, match=r"cannot read .*05\.jpg \(Input/output error\)"):
            make_shards.main(flags(coco, tmp_path / "shards"))
    with monkeypatch.context() as patched:
        patched.setattr(loading, "encode_jpeg", run_out_of_memory)
        with pytest.raises(UserError, match="too little memory to decode"):
            make_shards.main(flags(coco, tmp_path / "shards"))
    assert len(list((tmp_path / "shards").glob("*.index"))) < NUM_SHARDS


def test_the_same_input_at_another_place_is_the_same_input(
    coco: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    make_shards.main(flags(coco, output))
    before = finished(output)
    moved = tmp_path / "moved"
    shutil.copytree(coco, moved)
    make_shards.main(flags(moved, output))
    assert finished(output) == before


def test_a_second_packer_on_the_same_output_says_so_and_stops(
    coco: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    with packing(flags(coco, output), num_shards=1) as process:
        with pytest.raises(UserError, match=f"process {process.pid} on .* is packing this split"):
            make_shards.main(flags(coco, output))
        os.kill(process.pid, signal.SIGCONT)
        process.join()
        assert process.exitcode == 0
    assert files(output) == undisturbed


def test_a_shard_whose_worker_dies_is_packed_by_another(
    coco: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """One of the two workers is killed, as the kernel does when memory runs out."""
    output = tmp_path / "shards"
    victims: list[int] = []

    def kill_one() -> None:
        wait_until(lambda: any(output.glob("*.index")))
        victims.append(next(child.pid for child in multiprocessing.active_children() if child.pid is not None))
        os.kill(victims[0], signal.SIGKILL)

    import threading

    killer = threading.Thread(target=kill_one)
    killer.start()
    make_shards.main(flags(coco, output, workers=2))
    killer.join()
    assert victims
    assert files(output) == undisturbed


def test_a_shard_that_kills_every_worker_ends_the_run_with_its_name(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.packing.engine._pack", crash.always)
    with pytest.raises(UserError, match=r"died 3 times at train-0000\d\d \(exit code 9\)"):
        make_shards.main(flags(coco, tmp_path / "shards", workers=2))


def test_a_picture_that_crashes_the_decoder_is_a_failure_and_costs_no_other_picture(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers' decoder is one that dies of pictures with a certain comment in them."""
    data = tmp_path / "coco"
    shutil.copytree(coco, data)
    some = sorted((data / "train2014").iterdir())[7]
    picture(7).save(some, comment=crash.DEADLY)
    monkeypatch.setattr("sharding.packing.engine._pack", crash.packing_deadly_pictures)
    make_shards.main(flags(data, tmp_path / "shards", workers=2))
    failures = [json.loads(line) for line in (tmp_path / "shards/train.failures.jsonl").read_text().splitlines()]
    assert failures == [{"name": some.name, "reason": "undecodable", "message": "it crashes the decoder"}]
    found = read_manifest(str(tmp_path / "shards"), "train", remedy="")
    assert found.num_samples == NUM_PICTURES - 1


def test_the_backend_is_told_and_kept(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards.main(flags(coco, tmp_path / "shards"))
    assert loading.backend() in capsys.readouterr().out
    assert f'"backend": "{loading.backend()}"' in (tmp_path / "shards" / "train.manifest.json").read_text()
