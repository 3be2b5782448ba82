"""Descriptions are embedded by the real exiftool, and nothing else of an image changes; a kill leaves it whole."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from odd_pictures import READS_AVIF, READS_HEIC, READS_WEBP, picture
from PIL import ExifTags, Image
from rows import captioned, failed, success

from captioner.errors import UserError
from infer.gallery import write_gallery
from infer.listing import Listing
from infer.metadata import exiftool, xmp
from infer.metadata.described import read_metadata
from infer.metadata.exiftool import TOO_MUCH_XMP, check_exiftool, embed_all, remove_leftovers
from infer.metadata.outcomes import CHANGED, UNREADABLE_XMP, Outcomes
from infer.results import embedding_folder
from infer.sidecars import write_sidecars

pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed"),
]

KINDS = ["jpg", "png", "tif"]
KINDS += ["webp"] if READS_WEBP else []
KINDS += ["heic"] if READS_HEIC else []
KINDS += ["avif"] if READS_AVIF else []
EXIF = Image.Exif()
EXIF[ExifTags.Base.Make], EXIF[ExifTags.Base.Orientation], EXIF[ExifTags.Base.DateTime] = (
    "Maker",
    6,
    "2001:02:03 04:05:06",
)


def open_image(path: Path) -> Image.Image:
    if READS_HEIC:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image.open(path)


def write_image(path: Path, **options: Any) -> Path:
    """An image with EXIF, of a time long ago, that its group may write."""
    if path.suffix == ".heic":
        import pillow_heif

        pillow_heif.from_pillow(picture()).save(path, quality=90, exif=EXIF.tobytes(), **options)
    else:
        picture().save(path, exif=EXIF, **options)
    path.chmod(0o664)
    os.utime(path, ns=(981_173_106_123_456_789, 981_173_106_123_456_789))
    return path


def embed(folder: Path, *names: str, alt: str = "A cat.", existing: xmp.Existing = "keep", **more: Any) -> Outcomes:
    rows = [captioned(name, root=str(folder), alt=alt) for name in names]
    return embed_all(iter(rows), folder.parent / "captions.jsonl", existing=existing, **more)


def pixels(path: Path) -> str:
    return hashlib.sha256(open_image(path).convert("RGB").tobytes()).hexdigest()


def metadata(path: Path) -> dict[str, Any]:
    """All that exiftool reads, without XMP, the file's size and times, and offsets and sizes of its parts."""
    command = ["exiftool", "-j", "-a", "-G1", "-b", "-n", "--XMP:all", "--File:all", "--System:all", "-struct", path]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)[0]
    moved = ("SourceFile", "Offset", "MediaDataSize", "WebP_Flags")  # of the file's parts
    return {name: value for name, value in found.items() if not any(word in name for word in moved)}


def texts(path: Path) -> list[str]:
    found = read_metadata(path.read_bytes())
    return xmp.read_texts(found.packet) if found and found.packet else []


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_description_changes(kind: str, photos: Path) -> None:
    path = write_image(photos / f"a.{kind}")
    before, status, hash_before = metadata(path), path.stat(), pixels(path)
    assert embed(photos, path.name).counts == {"written": 1}
    assert texts(path) == ["A cat."] * 2
    assert metadata(path) == before
    assert pixels(path) == hash_before
    after = path.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_uid) == (status.st_mtime_ns, status.st_mode, status.st_uid)
    assert [each.name for each in photos.iterdir()] == [path.name]
    assert not embedding_folder(photos.parent / "captions.jsonl").exists()
    content = path.read_bytes()
    assert embed(photos, path.name).counts == {"kept": 1}
    assert path.read_bytes() == content


def test_a_persons_correction_replaces_the_models_text_and_stays(photos: Path) -> None:
    said = {write_image(photos / name).name: text for name, text in (("a.jpg", "Our ship"), ("b.jpg", ""))}
    embed(photos, *said)
    assert embed(photos, *said, correct=lambda row: row | {"alt": said[row["path"]]}).counts == {"written": 2}
    assert embed(photos, *said, alt="A dog.").counts == {"kept": 2}
    assert [texts(photos / name) for name in said] == [["Our ship"] * 2, []]


@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_read_it(kind: str, photos: Path) -> None:
    path = write_image(photos / f"a.{kind}")
    embed(photos, path.name)
    if kind not in ("png", "heic", "avif"):  # Pillow reads a PNG's last texts after its pixels
        found = open_image(path).getxmp()["xmpmeta"]["RDF"]["Description"]
        assert found["description"]["Alt"]["li"]["text"] == "A cat."
        assert found["AltTextAccessibility"]["Alt"]["li"]["text"] == "A cat."
    if kind == "png":
        image = open_image(path)
        image.load()
        assert b"A cat." in image.info["xmp"]
    if kind == "heic":  # exiv2 0.27 does not find the XMP that exiftool writes into HEIC
        command = ["exiftool", "-s3", "-XMP-dc:Description", "-XMP-iptcCore:AltTextAccessibility", path]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "A cat.\nA cat.\n"
        return
    if shutil.which("exiv2") is None:
        pytest.skip("exiv2 is not installed")
    for key in ("Xmp.dc.description", "Xmp.iptc.AltTextAccessibility"):
        done = subprocess.run(["exiv2", "-K", key, "-Pt", path], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == 'lang="x-default" A cat.'


PERSONS = xmp.EMPTY.replace(
    b"</rdf:RDF>",
    b'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:me="urn:me#" me:own="&lt;1&gt;">'
    b"<!-- kept --><dc:description>Mine</dc:description></rdf:Description></rdf:RDF>",
)
WITH_POLICY = {"keep": "Mine", "append": "Mine\nA cat.", "prepend": "A cat.\nMine", "overwrite": "A cat."}


@pytest.mark.parametrize("existing", WITH_POLICY)
def test_a_persons_description_becomes_what_was_asked_for(existing: Any, photos: Path) -> None:
    path = write_image(photos / "a.jpg", xmp=PERSONS)
    assert embed(photos, path.name, existing=existing).counts == {"written": 1}
    assert texts(path) == [WITH_POLICY[existing], "A cat."]
    found = read_metadata(path.read_bytes())
    assert found is not None
    assert found.packet is not None
    assert b'me:own="&lt;1&gt;"><!-- kept -->' in found.packet
    assert embed(photos, path.name, existing=existing).counts == {"kept": 1}
    assert embed(photos, path.name, existing=existing, alt="A dog.").counts == {"written": 1}
    assert texts(path) == [WITH_POLICY[existing].replace("A cat.", "A dog."), "A dog."]


def test_a_description_in_exif_is_a_persons_and_stays_there(photos: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "Mine"
    picture().save(photos / "a.jpg", exif=exif)
    assert embed(photos, "a.jpg").counts == {"written": 1}
    assert texts(photos / "a.jpg") == ["A cat."]
    assert metadata(photos / "a.jpg")["IFD0:ImageDescription"] == "Mine"


ODD_NAMES = [
    "-delete_original!.jpg",
    "-o=x.jpg",
    "@args.jpg",
    "#[CSTR]-all=.jpg",
    "a\n-all=\n-execute\n.jpg",
    "touch hacked |.jpg",
    "touch hacked |",
    "$(touch hacked).jpg",
    "%f.%e.jpg",
    " a b .jpg",
    "*.jpg",
    os.fsdecode(b"\xff\xfe.jpg"),
    "é" * 120 + ".jpg",
    "png named.jpg",
    "no suffix",
]


def test_any_name_is_a_name(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos / "-odd\n|$(touch hacked)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ODD_NAMES:
        picture().save(folder / name, "PNG" if name == "png named.jpg" else "JPEG")
    before = {name: pixels(folder / name) for name in ODD_NAMES}
    assert embed(folder, *ODD_NAMES).counts == {"written": len(ODD_NAMES)}
    assert {path.name for path in folder.iterdir()} == set(ODD_NAMES)
    assert all(texts(folder / name) == ["A cat."] * 2 for name in ODD_NAMES)
    assert {name: pixels(folder / name) for name in ODD_NAMES} == before
    assert list(tmp_path.rglob("hacked")) == []


def test_what_cannot_be_embedded_is_counted_by_reason_and_left_as_it_is(photos: Path) -> None:
    picture().save(photos / "a.bmp")
    write_image(photos / "b.jpg", xmp=b"<x:xmpmeta")
    note = b'<rdf:Description xmlns:n="http://ns.adobe.com/xmp/note/" n:HasExtendedXMP="00"/></rdf:RDF>'
    write_image(photos / "c.jpg", xmp=xmp.EMPTY.replace(b"</rdf:RDF>", note))
    (photos / "d.jpg").write_bytes(write_image(photos / "whole.jpg").read_bytes()[:400])
    (photos / "e.tar").write_bytes(b"")
    os.mkfifo(photos / "f.jpg")
    before = {path.name: path.read_bytes() for path in photos.iterdir() if path.name != "f.jpg"}
    rows = [captioned(name, root=str(photos), content=name) for name in ("a.bmp", "b.jpg", "c.jpg", "d.jpg", "f.jpg")]
    rows += [captioned("e.tar/x.jpg", root=str(photos)), captioned("x.jpg", root="s3://bucket")]
    rows += [
        captioned("whole.jpg", root=str(photos), alt=""),
        failed("broken.jpg"),
        captioned("gone", root=str(photos)),
    ]
    outcomes = embed_all(rows, photos.parent / "captions.jsonl", existing="overwrite")
    assert {path.name: path.read_bytes() for path in photos.iterdir() if path.name != "f.jpg"} == before
    assert outcomes.counts[UNREADABLE_XMP] == outcomes.counts[TOO_MUCH_XMP] == outcomes.counts["abstained"] == 1
    assert outcomes.counts["not local"] == 2
    formats = "left alone, since their format is not one of JPEG, PNG, WEBP, TIFF, HEIF, AVIF"
    assert outcomes.names[formats] == [f"{photos}/a.bmp", f"{photos}/d.jpg", f"{photos}/f.jpg"]
    assert outcomes.num_failed == 1
    assert outcomes.counts["could not be written (No such file or directory)"] == 1


def test_an_image_behind_a_link_is_changed_once_and_the_link_stays(photos: Path) -> None:
    write_image(photos / "a.jpg")
    (photos / "b.jpg").symlink_to("a.jpg")
    assert embed(photos, "a.jpg", "b.jpg").counts == {"written": 1, "kept": 1}
    assert (photos / "b.jpg").is_symlink()
    assert texts(photos / "b.jpg") == ["A cat."] * 2


def test_an_image_that_another_program_changes_meanwhile_is_left_to_it(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(photos / "a.jpg")
    check = exiftool._check

    def change(*arguments: Any) -> None:
        check(*arguments)
        path.write_bytes(b"new")

    monkeypatch.setattr(exiftool, "_check", change)
    assert embed(photos, "a.jpg").counts == {"could not be written (another program has changed the image)": 1}
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_image_is_not_replaced(photos: Path) -> None:
    write_image(photos / "a.jpg").chmod(0o400)
    assert embed(photos, "a.jpg").counts == {"could not be written (Permission denied)": 1}


def test_without_exiftool_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_exiftool()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="--embed needs exiftool, which is not installed"):
        check_exiftool()


# ---- kills ------------------------------------------------------------------------------------------------


def fake_exiftool(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `exiftool` be this script, whose working folder is the job's."""
    folder.mkdir()
    (folder / "exiftool").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "exiftool").chmod(0o755)
    monkeypatch.setenv("REAL", str(shutil.which("exiftool")))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_exiftool_that_dies_in_an_image_costs_that_one_alone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 'if [ -e ../died ]; then exec "$REAL" "$@"; fi; touch ../died; head -c 500 source > partial; kill -9 $$'
    fake_exiftool(tmp_path / "bin", half, monkeypatch)
    before = {name: write_image(photos / name).read_bytes() for name in ("a.jpg", "b.jpg")}
    assert embed(photos, "a.jpg", "b.jpg").counts == {"could not be written (exiftool ended)": 1, "written": 1}
    assert (photos / "a.jpg").read_bytes() == before["a.jpg"]
    assert texts(photos / "b.jpg") == ["A cat."] * 2
    assert {path.name for path in photos.iterdir()} == set(before)


DONE = "echo '    1 image files created'"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"head -c 500 source > partial; {DONE}", "exiftool wrote another image"),
        (f"cat source > partial; {DONE}", "exiftool wrote another image"),
        ("cat source > partial", "exiftool wrote nothing"),
        ("echo 'Error: Bad format - source'; echo more", "Bad format"),
        ("sleep 60", "exiftool took more than 1 s"),
    ],
)
def test_a_wrong_or_missing_answer_changes_no_image(
    script: str, reason: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = 'while read -r line; do case "$line" in -execute*) {}; echo "{{ready${{line#-execute}}}}";; esac; done'
    fake_exiftool(tmp_path / "bin", answer.format(script), monkeypatch)
    monkeypatch.setattr(exiftool, "MAX_SECONDS", 1.0)
    before = write_image(photos / "a.jpg").read_bytes()
    assert embed(photos, "a.jpg").counts == {f"could not be written ({reason})": 1}
    assert (photos / "a.jpg").read_bytes() == before
    assert [path.name for path in photos.iterdir()] == ["a.jpg"]


def process_that_dies(at: str, photos: Path, pid_file: Path, names: list[str]) -> None:
    """Embed in a process that is killed at the second call of `at`, a function of the module or of Path."""
    owner: Any = Path if at == "replace" else exiftool
    original: Callable[..., Any] = getattr(owner, at)
    num_calls = 0

    def die(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    def job() -> None:
        start = exiftool.ExifTool._start

        def note(tool: exiftool.ExifTool) -> Any:
            processes = start(tool)
            pid_file.write_text(" ".join(str(process.pid) for process in processes))
            return processes

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exiftool.ExifTool, "_start", note)
            patch.setattr(owner, at, die)
            embed(photos, *names)

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("at", ["_check", "_replace", "keep_owner", "replace"])
def test_a_killed_job_leaves_each_image_whole_and_no_process(at: str, photos: Path, tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    before = {name: write_image(photos / name).read_bytes() for name in names}
    process_that_dies(at, photos, tmp_path / "pid", names)
    assert texts(photos / "a.jpg") == ["A cat."] * 2
    assert all((photos / name).read_bytes() == before[name] for name in ("b.jpg", "c.jpg"))
    assert sorted(file.path for file in Listing([str(photos)])) == names  # the leftover is no image to caption
    assert len(list(photos.iterdir())) == 4
    pids = (tmp_path / "pid").read_text().split()
    limit = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    remove_leftovers(photos.parent / "captions.jsonl")
    assert sorted(path.name for path in photos.iterdir()) == names
    assert embed(photos, *names).counts == {"kept": 1, "written": 2}


def is_running(pid: str) -> bool:
    """Whether the process exists and is no zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_two_jobs_of_one_output_are_refused(photos: Path) -> None:
    write_image(photos / "a.jpg")
    output = photos.parent / "captions.jsonl"
    with exiftool._working_folder(output):
        with pytest.raises(UserError, match="another run is writing"):
            embed(photos, "a.jpg")
        remove_leftovers(output)
        assert embedding_folder(output).exists()


def test_the_new_file_has_the_permissions_before_it_has_the_name(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(photos / "a.jpg")
    path.chmod(0o600)
    modes = []
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    embed(photos, "a.jpg")
    assert modes == [0o600]


def test_an_image_that_was_replaced_gets_no_text_of_the_old_one(photos: Path, tmp_path: Path) -> None:
    """What this program embedded is no change, nor is an edit that keeps the metadata; another image is one."""
    _, edited, replaced, copied = paths = [photos / f"{number}.jpg" for number in range(4)]
    for number, path in enumerate(paths):
        picture(number).save(path, exif=EXIF)
    started = time.time() - 10
    rows: list[Any] = [success(photos, path.name, alt="A cat.", model="m") for path in paths]

    def embed_rows(alt: str) -> Outcomes:
        better = (row | {"alt": alt} for row in rows)
        return embed_all(better, tmp_path / "captions.jsonl", existing="keep", since=started)

    assert embed_rows("A cat.").counts == {"written": 4}
    image = open_image(edited)
    image.crop((0, 0, 8, 8)).save(edited, exif=EXIF, xmp=image.info["xmp"])
    shutil.copy(replaced, copied)  # with a text of this program, but of another image
    picture(9).save(replaced, exif=EXIF)
    outcomes = embed_rows("A dog.")
    assert outcomes.counts == {"written": 2, CHANGED: 2}
    assert outcomes.names == {CHANGED: [str(replaced), str(copied)]}
    assert [texts(path) for path in paths] == [["A dog."] * 2, ["A dog."] * 2, [], ["A cat."] * 2]
    assert write_sidecars(rows, suffix=".txt", since=started).counts == {"written": 2, CHANGED: 2}
    again: list[Any] = [success(photos, path.name, alt="A bird.", model="n") for path in paths]  # another output
    assert embed_all(iter(again), tmp_path / "b.jsonl", existing="keep", since=started).counts == {"written": 4}
    assert embed_rows("A cow.").counts == {"written": 2, CHANGED: 2}
    page = write_gallery(rows, tmp_path / "gallery", title="t", model="m")
    assert len(list((page.parent / "thumbnails").iterdir())) == 2
