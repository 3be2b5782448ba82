"""What libtiff and libjpeg say of damaged pictures stands in rows or is counted, and never in the terminal."""

import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from odd_pictures import file_of, picture
from PIL import Image, features
from tiny_model import write_model
from trainer import start

from captioner import load_captioner
from captioner.images import decoder_output, loading
from captioner.images.decoder_output import collect, own_stderr
from captioner.images.loading import ImageError

SHARP = Image.fromarray(np.random.default_rng(6).integers(0, 256, (64, 96, 3), dtype=np.uint8))
needs_libtiff = pytest.mark.skipif(not features.check("libtiff"), reason="this Pillow has no libtiff")
needs_native = pytest.mark.skipif(loading.backend() != "native", reason="libjpeg prints only where torch resizes")


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


def test_these_files_make_decoders_print(capfd: pytest.CaptureFixture[str]) -> None:
    """Or the other tests would prove nothing."""
    with collect() as lines, own_stderr():
        assert outcome(extraneous_bytes()) == "fine"
        assert bool(lines) == (loading.backend() == "native")
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
    assert (int(found[1]) if found else 0) >= (loading.backend() == "native") + bool(features.check("libtiff"))


def check_messages(messages: dict[str, str]) -> None:
    assert not {"usable.jpg", "usable.tif", "good.jpg"} & messages.keys()
    assert all("\n" not in message for message in messages.values())
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

    thread = threading.Thread(target=write_meanwhile)
    thread.start()
    for name in FILES:
        for source in (folder / name, FILES[name]):
            try:
                captioner([source])
            except ImageError as error:
                check_messages(
                    {name: error.message} | dict.fromkeys(("tiff_lzw.tif", "tiff_adobe_deflate.tif"), MESSAGE)
                )
    done.set()
    thread.join()
    assert len(written) > 10
    assert capfd.readouterr().err == "".join(written)


MESSAGE = "decoder error -2 (ZIPDecode: Decoding error of a code"


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


# ---- file descriptor 2 ------------------------------------------------------------------------------------


@needs_native
def test_torchs_decoder_runs_only_where_stderr_is_owned(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(SHARP, "JPEG", quality=95)
    plain = np.asarray(loading.load_resized(data, size=40, resize="squash")[0])
    calls = []
    without_stderr = decoder_output.without_stderr
    monkeypatch.setattr(decoder_output, "without_stderr", lambda *given: (calls.append(1), without_stderr(*given))[1])
    assert (loading.decode_stored(data) == np.asarray(loading.decode_rgb(data)[0])).all()
    assert not calls
    with own_stderr():
        assert (np.asarray(loading.load_resized(data, size=40, resize="squash")[0]) == plain).all()
        assert (loading.decode_stored(data) == np.asarray(loading.decode_rgb(data)[0])).all()
    assert len(calls) == 2


def test_what_python_prints_meanwhile_reaches_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def decode() -> int:
        print("from Python", file=sys.stderr)
        os.write(2, b"from C, once\nfrom C, twice\n")
        return 5

    with own_stderr(), collect() as lines:
        assert decoder_output.without_stderr(decode) == 5
        assert decoder_output.without_stderr(lambda: 6) == 6
        os.write(2, b"not while a decoder runs\n")
    assert lines == ["from C, once", "from C, twice"]
    assert capfd.readouterr().err == "from Python\nnot while a decoder runs\n"


def test_stderr_comes_back_after_an_error_and_is_owned_once(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        os.write(2, b"last words\n")
        raise RuntimeError

    with own_stderr():
        with own_stderr(), collect() as lines, pytest.raises(RuntimeError):
            decoder_output.without_stderr(fail)
        assert decoder_output.owns_stderr()
        os.write(2, b"here again\n")
    assert not decoder_output.owns_stderr()
    assert lines == ["last words"]
    assert capfd.readouterr().err == "here again\n"
