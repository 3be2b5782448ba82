"""What libtiff and libjpeg say about damaged images is in rows or counted, and never in the terminal."""

import io
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from odd_pictures import file_of, picture
from PIL import Image, features
from tiny_model import write_model
from trainer import start

from captioner import load_captioner
from captioner.images import loading
from captioner.images.decoder_output import collect
from captioner.images.loading import ImageError

SHARP = Image.fromarray(np.random.default_rng(6).integers(0, 256, (64, 96, 3), dtype=np.uint8))
needs_libtiff = pytest.mark.skipif(not features.check("libtiff"), reason="this Pillow has no libtiff")


def spoiled(data: bytes, *, at: float = 0.6, by: bytes = b"\x55" * 20) -> bytes:
    start = int(len(data) * at)
    return data[:start] + by + data[start + len(by) :]


def extraneous_bytes() -> bytes:
    """A JPEG that every reader shows, and that libjpeg complains of."""
    data = file_of(SHARP, "JPEG")
    return data[:-2] + b"\x12\x34\x56\x78" * 20 + data[-2:]


def bad_code_word() -> bytes:
    """A fax that libtiff shows, and complains of."""
    return spoiled(file_of(SHARP.convert("1"), "TIFF", compression="group4"), at=0.2)


def damaged_files() -> dict[str, bytes]:
    """Files of which libtiff and libjpeg print something; two that can be used all the same are called usable."""
    whole = file_of(SHARP, "JPEG", progressive=True)
    files = {"usable.jpg": extraneous_bytes(), "cut.jpg": whole[: len(whole) // 2]}
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "group3", "group4", "tiff_ccitt")
    for name in compressions if features.check("libtiff") else ():
        image = SHARP.convert("1") if name in ("group3", "group4", "tiff_ccitt") else SHARP
        try:
            data = file_of(image, "TIFF", compression=name)
        except OSError:  # this libtiff was built without it
            continue
        files[f"{name}.tif"] = data[:8] + b"\xff" * (len(data) // 3) + data[8 + len(data) // 3 :]
        files[f"{name}_tags.tif"] = spoiled(data, at=0.99)
    if features.check("libtiff"):
        files["usable.tif"] = bad_code_word()
    return files


FILES = damaged_files()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    picture().save(folder / "good.jpg")
    return folder


def outcome(data: bytes) -> str:
    try:
        loading.load_resized(data, size=32, resize="squash")
    except ImageError as error:
        return str(error)
    return "fine"


def test_decoders_complain_about_these_files(capfd: pytest.CaptureFixture[str]) -> None:
    """Or the other tests would prove nothing."""
    with collect() as lines:
        assert outcome(extraneous_bytes()) == "fine"
        assert re.search("extraneous bytes", " ".join(lines))
    if features.check("libtiff"):
        with collect() as lines:
            assert outcome(bad_code_word()) == "fine"
            assert re.search("bad code word", " ".join(lines), re.IGNORECASE)
    assert capfd.readouterr().err == ""


# ---- the commands, with the file descriptor that a terminal would show --------------------------------------


@pytest.mark.slow
def test_captioning_prints_nothing_and_rows_say_what_decoders_said(folder: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    flags = [
        "--model",
        model,
        "--images",
        folder,
        "--output",
        output,
        "--workers",
        2,
        "--gallery",
        tmp_path / "gallery",
    ]
    done = start("infer/main.py", flags, log=tmp_path / "log").wait()
    assert done.code == 3
    check_terminal(done.output)
    rows = {row["path"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert rows.keys() == FILES.keys() | {"good.jpg"}
    assert "caption" in rows["usable.jpg"]
    check_messages({name: row["message"] for name, row in rows.items() if "error" in row})


@pytest.mark.parametrize("workers", [1, 2])
def test_packing_prints_nothing_and_failures_say_what_decoders_said(folder: Path, tmp_path: Path, workers: int) -> None:
    rows = [{"path": name, "caption": "a picture"} for name in (*FILES, "good.jpg")]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--images", folder, "--captions", tmp_path / "captions.jsonl", "--split", "train", "--workers", workers]
    done = start("sharding/make_shards.py", [*flags, "--output", tmp_path / "s"], log=tmp_path / "log").wait()
    assert done.code == 0
    check_terminal(done.output)
    failures = map(json.loads, (tmp_path / "s" / "train.failures.jsonl").read_text().splitlines())
    check_messages({failure["name"]: failure["message"] for failure in failures})


def check_terminal(printed: str) -> None:
    """What went to file descriptors 1 and 2 is the table, and the number of pictures that decoders complained of."""
    for words in ("TIFF", "JPEG", "Decode", "code word", "Bad ", "tempfile", "Warning", "Traceback"):
        assert words not in printed
    found = re.search(r"(\d+) images are damaged, but could be decoded", printed)
    assert found
    assert int(found[1]) >= 1 + bool(features.check("libtiff"))


def check_messages(messages: dict[str, str]) -> None:
    assert not {"usable.jpg", "usable.tif", "good.jpg"} & messages.keys()
    assert all("\n" not in message for message in messages.values())
    assert messages["cut.jpg"].startswith("OSError: image file is truncated")
    assert "(Premature end of JPEG file)" in messages["cut.jpg"]
    if features.check("libtiff"):
        assert re.search(r"decoder error -\d+ \(.*code", messages["tiff_lzw.tif"], re.IGNORECASE)
        assert re.search(r"\(ZIPDecode: Decoding error", messages["tiff_adobe_deflate.tif"])


# ---- the library, in a process that is not ours --------------------------------------------------------------


def test_the_library_prints_nothing_and_no_other_thread_loses_a_line(
    folder: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    captioner = load_captioner(model)
    done = threading.Event()
    written = []

    def write_meanwhile() -> None:
        while not done.is_set():
            line = b"line %d\n" % len(written)
            written.append(line.decode())
            os.write(2, line)
            done.wait(0.0005)

    messages: tuple[dict[str, str], dict[str, str]] = {}, {}
    thread = threading.Thread(target=write_meanwhile)
    thread.start()
    try:
        for name in FILES:
            for found, source in zip(messages, (folder / name, FILES[name]), strict=True):
                try:
                    captioner([source])
                except ImageError as error:
                    found[name] = error.message
    finally:
        done.set()
        thread.join()
    for found in messages:
        check_messages(found)
    assert len(written) > 10
    assert capfd.readouterr().err == "".join(written)


@needs_libtiff
def test_errors_of_pictures_that_are_not_ours_are_printed_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    outcome(FILES["tiff_lzw.tif"])
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="decoder error"):
        Image.open(io.BytesIO(FILES["tiff_lzw.tif"])).load()
    assert "code" in capfd.readouterr().err


@needs_libtiff
def test_each_thread_gets_the_lines_of_its_own_pictures() -> None:
    wanted = {name: outcome(data) for name, data in FILES.items()}
    found: dict[str, list[str]] = {}

    def decode(name: str) -> None:
        found[name] = [outcome(FILES[name]) for _ in range(20)]

    threads = [threading.Thread(target=decode, args=(name,)) for name in FILES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [message] * 20 for name, message in wanted.items()}
