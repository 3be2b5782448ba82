"""The server as its clients see it: rows as batch captioning's, limits, broken uploads, hostile images and pages."""

import asyncio
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import crash
import httpx
import pytest
import warm
from caption_server import REPOSITORY, Served, run_server
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_pictures import broken_files, whole_files
from PIL import Image
from rows import success
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from tiny import picture

from infer.gallery import write_gallery
from infer.serve import listen
from infer.serving import guard

pytestmark = pytest.mark.slow

MAX_BYTES, MAX_PIXELS, MAX_QUEUE = 2_000_000, 2_000_000, 200
SCORES = ("score", "confidence", "token_scores")
BOUNDARY = b"frontier"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of two images, beside a file that is not for the world."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text("secret")
    for name in ("a.png", "b.png"):
        picture(ord(name[0])).save(folder / name)
    rows = [success(folder, name) for name in ("a.png", "b.png")]
    return write_gallery(rows, folder / "gallery", title="t", model="m").parent


@pytest.fixture(scope="module")
def server(model: Path, gallery: Path) -> Iterator[Served]:
    limits = ("--max-bytes", MAX_BYTES, "--max-pixels", MAX_PIXELS, "--max-queue", MAX_QUEUE, "--batch-size", 16)
    with run_server("--model", model, "--gallery", gallery, *limits) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def form(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", file) for file in files]


def multipart(*files: tuple[str, bytes]) -> bytes:
    """A multipart body with BOUNDARY."""
    head = b'--%b\r\nContent-Disposition: form-data; name="image"; filename="%b"\r\n\r\n'
    parts = [head % (BOUNDARY, name.encode()) + data + b"\r\n" for name, data in files]
    return b"".join(parts) + b"--%b--\r\n" % BOUNDARY


def post(client: httpx.Client, content: Any, *, kind: str = f"multipart/form-data; boundary={BOUNDARY.decode()}",
         **headers: str) -> httpx.Response:  # fmt: skip
    return client.post("/caption", content=content, headers={"Content-Type": kind, **headers})


def health(client: httpx.Client) -> dict[str, Any]:
    return client.get("/health").json()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_it_works(client: httpx.Client) -> None:
    (row,) = client.post("/caption", files=form(("a.png", png(picture(1))))).json()
    assert row["caption"]


# ---- captions -------------------------------------------------------------------------------------------------


def test_rows_are_those_of_batch_captioning(client: httpx.Client, model: Path, tmp_path: Path) -> None:
    files = {name: data for name, (data, _) in broken_files().items()} | whole_files()
    files |= {f"{seed}.png": png(picture(seed)) for seed in range(20)}
    files = {name: data for name, data in files.items() if not name.startswith("thread")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, REPOSITORY / "infer/main.py", "--model", model, "--images", tmp_path]
    done = warm.run([*command, "--output", tmp_path / "captions.jsonl"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    lines = (tmp_path / "captions.jsonl").read_text().splitlines()
    expected = {row["path"]: row | {"root": "", "duplicate_of": None} for row in map(json.loads, lines)}
    answer = client.post("/caption", files=form(*files.items()))
    assert answer.status_code == 200
    rows = answer.json()
    assert [row["path"] for row in rows] == list(files)
    for row in rows:
        wanted = expected[row["path"]]
        if "error" in wanted:
            assert row == {key: value for key, value in wanted.items() if key != "duplicate_of"}
        else:
            assert list(row) == list(wanted)
            assert {**row, **{key: wanted[key] for key in SCORES}} == wanted
            assert row["token_scores"] == pytest.approx(wanted["token_scores"], abs=1.5e-4)


def test_two_hundred_clients_at_once_each_get_their_own_caption(server: Served, client: httpx.Client) -> None:
    images = [png(picture(seed)) for seed in range(20)]
    expected = client.post(
        "/caption", files=form(*((f"{seed}.png", image) for seed, image in enumerate(images)))
    ).json()

    async def ask(number: int) -> httpx.Response:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as own:
            return await own.post("/caption", files=form((f"{number}.png", images[number % 20])))

    async def ask_all() -> list[httpx.Response]:
        return await asyncio.gather(*map(ask, range(200)))

    for number, answer in enumerate(asyncio.run(ask_all())):
        assert answer.status_code == 200
        (row,) = answer.json()
        wanted = expected[number % 20]
        assert (row["path"], row["sha256"]) == (f"{number}.png", wanted["sha256"])
        assert row["caption"] == wanted["caption"]
    assert health(client)["waiting"] == 0


def test_health_counts_what_became_of_images(client: httpx.Client) -> None:
    before = health(client)
    client.post("/caption", files=form(("a.png", png(picture(1))), ("b.png", b""), ("c.png", b"no image")))
    after = health(client)
    counts = {name: count - before["images"].get(name, 0) for name, count in after["images"].items()}
    assert {name: count for name, count in counts.items() if count} == {"captioned": 1, "empty": 1, "undecodable": 1}
    assert (after["status"], after["device"], after["max_queue"]) == ("ok", "cpu", MAX_QUEUE)


def test_any_file_name_is_given_back(client: httpx.Client) -> None:
    data = png(picture(1))
    body = multipart(("NAME", data)).replace(b"NAME", b"\xff <b>../../x.png")
    (row,) = post(client, body).json()
    assert row["path"] == "\udcff <b>../../x.png"


# ---- hostile images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (crash.DEADLY, "crashed the decoder: its process ended with exit code 9"),
        (crash.ENDLESS, "timed out: not decoded within 2 s"),
    ],
)
def test_an_image_that_kills_or_hangs_its_decoder_costs_itself_alone(
    client: httpx.Client, words: bytes, message: str
) -> None:
    good = [(f"{seed}.png", png(picture(seed))) for seed in range(8)]
    rows = client.post("/caption", files=form(*good[:4], ("bad.png", png(picture(9)) + words), *good[4:])).json()
    bad = rows.pop(4)
    assert f"{bad['error']}: {bad['message']}" == message
    assert all(row["caption"] for row in rows)


def test_decompression_bombs_are_refused_by_their_headers(client: httpx.Client) -> None:
    bomb = png(Image.new("1", (20_000, 5_000)))
    assert len(bomb) < 100_000
    (row,) = client.post("/caption", files=form(("bomb.png", bomb))).json()
    assert (row["error"], row["message"]) == ("too large", "20000x5000 pixels, 2,000,000 are allowed: shrink it")


# ---- broken uploads -------------------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=frontier"
HEAD = b'--frontier\r\nContent-Disposition: form-data; name="image"'


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"", FORM, 400, "ends before its last boundary"),
        (b"nonsense", FORM, 400, "no multipart/form-data as it should be"),
        (b"--frontier--\r\n", FORM, 400, ""),
        (HEAD + b"\r\n\r\ntext\r\n--frontier--\r\n", FORM, 400, "'image' is no file"),
        (HEAD + b'; filename=""\r\n\r\n\r\n--frontier--\r\n', FORM, 400, "no file"),
        (b"--frontier\r\n\r\ntext\r\n--frontier--\r\n", FORM, 400, ""),
        (multipart(("a.png", b"x")), "multipart/form-data", 415, "send the images as multipart/form-data"),
        (multipart(("a.png", b"x")), "multipart/form-data; boundary=" + 300 * "x", 400, "cannot be read"),
        (b"image", "image/png", 415, "curl -F image=@photo.jpg"),
        (b"image=1", "application/x-www-form-urlencoded", 415, "multipart/form-data"),
        (b"{}", "application/json", 415, "multipart/form-data"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_form_with_files_is_refused(
    client: httpx.Client, content: bytes, kind: str, status: int, message: str
) -> None:
    answer = post(client, content, kind=kind)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["message"]


BODY = multipart(("a.png", png(picture(1))), ("b.png", png(picture(2))))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, len(BODY) - 3))
def test_a_body_cut_anywhere_is_refused_whole(client: httpx.Client, length: int) -> None:
    """Never is a part of the files captioned as if it were all."""
    answer = post(client, BODY[:length])
    assert answer.status_code == 400
    assert answer.json()["message"]


def test_a_client_that_goes_away_leaves_nothing_behind(server: Served, client: httpx.Client) -> None:
    before = health(client)["images"].get("cut by the client", 0)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_head(len(BODY)) + BODY[: len(BODY) // 2])
        wait_until(lambda: health(client)["waiting"] == 1)
    wait_until(lambda: health(client)["waiting"] == 0)
    assert health(client)["images"]["cut by the client"] == before + 1
    check_it_works(client)


def request_head(content_length: int, *more: str) -> bytes:
    lines = ["POST /caption HTTP/1.1", "Host: localhost", "Content-Type: multipart/form-data; boundary=frontier"]
    return "\r\n".join([*lines, f"Content-Length: {content_length}", *more, "", ""]).encode()


# ---- limits ---------------------------------------------------------------------------------------------------


def test_a_request_that_is_too_large_is_answered_with_413(client: httpx.Client) -> None:
    large = multipart(("a.png", bytes(MAX_BYTES)))
    for content in (large, iter([large[start : start + 65536] for start in range(0, len(large), 65536)])):
        answer = post(client, content)  # with a length, and in chunks
        assert answer.status_code == 413
        assert "more than 2,000,000 bytes" in answer.json()["message"]
    just_fitting = multipart(("a.png", bytes(MAX_BYTES - len(multipart(("a.png", b""))))))
    (row,) = post(client, just_fitting).json()
    assert row["error"] == "undecodable"


def test_a_client_that_asks_first_need_not_send_what_is_too_large(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request_head(10 * MAX_BYTES, "Expect: 100-continue"))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_end_is_answered_at_the_limit(server: Served, client: httpx.Client) -> None:
    head = request_head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    start = multipart(("a.png", b"")).partition(b"\r\n--frontier--")[0]
    chunks = [start, *[bytes(65536)] * (MAX_BYTES // 65536 + 1)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
        assert health(client)["waiting"] == 0
    check_it_works(client)


def test_too_many_files_are_refused(client: httpx.Client) -> None:
    answer = client.post("/caption", files=form(*(("a.png", b"") for _ in range(MAX_QUEUE + 1))))
    assert (answer.status_code, answer.json()["message"]) == (413, "more than 200 files: send fewer in one request")


def test_a_full_queue_is_answered_with_429(server: Served, client: httpx.Client) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_QUEUE):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(request_head(100))
        wait_until(lambda: health(client)["waiting"] == MAX_QUEUE)
        answer = post(client, BODY)
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert "200 images are waiting, 200 may" in answer.json()["message"]
    wait_until(lambda: health(client)["waiting"] == 0)
    check_it_works(client)


def test_a_client_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "STALL_SECONDS", 0.01)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def receive_limited() -> None:
        await guard.limit_body(receive, Headers({}), max_bytes=1)()

    with pytest.raises(HTTPException) as caught:
        asyncio.run(receive_limited())
    assert caught.value.status_code == 408


# ---- other sites ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/gallery/data.js", "/gallery/corrections"])
def test_a_name_that_another_site_pointed_here_is_refused(client: httpx.Client, path: str) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 403, host
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.168.1.9"):
        assert client.get(path, headers={"Host": host}).status_code == 200, host


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1"])
def test_a_page_of_another_site_may_not_send_anything(server: Served, client: httpx.Client, origin: str) -> None:
    for answer in (
        client.post("/caption", files=form(("a.png", png(picture(1)))), headers={"Origin": origin}),
        client.put("/gallery/corrections", json=[], headers={"Origin": origin}),
    ):
        assert answer.status_code == 403
        assert answer.json()["message"] == f"a page of {origin} may not send anything here"
    own = client.put("/gallery/corrections", json=[], headers={"Origin": server.url})
    assert own.status_code == 200


def test_every_answer_keeps_pages_to_themselves(client: httpx.Client) -> None:
    for path in ("/", "/health", "/drop.js", "/nothing", "/gallery/"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


# ---- the gallery ----------------------------------------------------------------------------------------------


def test_the_gallerys_files_are_served_and_no_others(server: Served, client: httpx.Client, gallery: Path) -> None:
    assert client.get("/gallery/").text == (gallery / "index.html").read_text()
    (first, _) = sorted(file.name for file in (gallery / "thumbnails").iterdir())
    assert client.get(f"/gallery/thumbnails/{first}").headers["Content-Type"] == "image/jpeg"
    (gallery / "thumbnails" / "mine.jpg").write_bytes(b"mine")
    for path in (
        "/gallery/secret.txt", "/gallery/../secret.txt", "/gallery/%2e%2e/secret.txt", "/gallery/..%2fsecret.txt",
        "/gallery/thumbnails/..%2f..%2fsecret.txt", "/gallery/thumbnails/../../secret.txt", "/secret.txt",
        "/gallery/thumbnails/mine.jpg", "/gallery/thumbnails/", "//etc/passwd", "/gallery//etc/passwd",
        "/gallery/thumbnails/%2fetc%2fpasswd", "/gallery/corrections.jsonl",
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:  # httpx would resolve ..
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 404 "), path
        assert b"secret" not in answer


def lines(gallery: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (gallery / "corrections.jsonl").read_text().splitlines()]


def test_corrections_are_added_replaced_and_taken_back(client: httpx.Client, gallery: Path) -> None:
    first = {"path": "a.png", "captions": ["a cat"], "images": "photos", "sha256": "1" * 64}
    second = {"path": "b.png", "decorative": True, "images": "photos", "sha256": "2" * 64}
    assert client.put("/gallery/corrections", json=[first, second]).json() == {"saved": 2}
    assert lines(gallery) == [first, second] == client.get("/gallery/corrections").json()
    client.put("/gallery/corrections", json=[first | {"captions": ["a lion"]}])
    assert lines(gallery) == [second, first | {"captions": ["a lion"]}]
    client.put("/gallery/corrections", json=[{"path": "b.png", "images": "photos"}])
    assert lines(gallery) == [first | {"captions": ["a lion"]}]
    client.put("/gallery/corrections", json=[{"path": "a.png", "images": "photos"}])
    assert lines(gallery) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'[{"path": 1}]', b'[{"path": "a", "captions": [2]}]', b"[",
                                     b'[{"path": "a", "captions": [" "]}]'])  # fmt: skip
def test_what_is_no_correction_changes_nothing(client: httpx.Client, gallery: Path, content: bytes) -> None:
    good = {"path": "a.png", "captions": ["a cat"]}
    client.put("/gallery/corrections", json=[good])
    headers = {"Content-Type": "application/json"}
    assert client.put("/gallery/corrections", content=content, headers=headers).status_code == 400
    assert client.put("/gallery/corrections", json=[good, {"path": 1}]).status_code == 400
    assert lines(gallery) == [good]


def test_what_persons_change_at_the_same_time_is_all_kept(server: Served, client: httpx.Client, gallery: Path) -> None:
    async def change(number: int) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as own:
            await own.put("/gallery/corrections", json=[{"path": f"{number}.png", "captions": ["a cat"]}])

    async def change_all() -> None:
        await asyncio.gather(*map(change, range(30)))

    (gallery / "corrections.jsonl").write_text('{"path": "by hand.png", "caption": "a dog"}\n')
    asyncio.run(change_all())
    assert {line["path"] for line in lines(gallery)} == {"by hand.png", *(f"{number}.png" for number in range(30))}
    (gallery / "corrections.jsonl").write_text("a person's notes\n")
    answer = client.put("/gallery/corrections", json=[{"path": "a.png", "captions": ["a cat"]}])
    assert answer.status_code == 500
    assert "line 1 of" in answer.json()["message"]
    assert (gallery / "corrections.jsonl").read_text() == "a person's notes\n"
    (gallery / "corrections.jsonl").unlink()


# ---- the page in docs/ ----------------------------------------------------------------------------------------


def blocks(language: str) -> str:
    text = (REPOSITORY / "docs" / "server.md").read_text(encoding="utf-8")
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what a reader of docs/server.md has."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("dog.jpg", "cat.jpg")):
        picture(seed).save(name)


@pytest.mark.usefixtures("reader")
def test_the_lines_for_curl_run(server: Served) -> None:
    if not (curl := shutil.which("curl")):
        pytest.skip("needs curl on the PATH")
    lines = [line for line in blocks("sh").splitlines() if line.startswith("curl ")]
    assert len(lines) == 3
    for line in lines:
        _, *words = shlex.split(line.replace("http://127.0.0.1:8000", server.url))
        answer = json.loads(subprocess.run([curl, "-s", *words], check=True, capture_output=True).stdout)
        assert "status" in answer or [row["caption"] for row in answer]


@pytest.mark.usefixtures("reader")
def test_the_python_of_the_page_runs(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("python").replace("http://127.0.0.1:8000", server.url), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["dog.jpg", "cat.jpg"]


# ---- start and end --------------------------------------------------------------------------------------------


def test_requests_that_have_arrived_are_answered_after_sigterm(model: Path) -> None:
    with run_server("--model", model) as served:
        slow = multipart(("a.png", png(picture(1))), ("slow.png", png(picture(2)) + crash.ENDLESS))
        with socket.create_connection(("127.0.0.1", served.port), timeout=120) as connection:
            connection.sendall(request_head(len(slow)) + slow)
            with httpx.Client(base_url=served.url) as client:
                wait_until(lambda: health(client)["waiting"] == 2)
            served.process.send_signal(signal.SIGTERM)
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        first, second = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert first["caption"]
        assert second["error"] == "timed out"
        assert served.process.wait(60) == 0


def test_answers_are_sent_at_once() -> None:
    """Head and body of an answer are two packets: the second would wait for the acknowledgement of the first."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def refused(*flags: object, hidden: str = "") -> str:
    """What the command says before it exits with code 2."""
    code = f"import sys; sys.modules[{hidden!r}] = None; from infer import serve; serve.run()"
    done = warm.run([sys.executable, "-c", code, *map(str, flags)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("package", ["fastapi", "python_multipart", "uvicorn"])
def test_without_the_extra_the_command_says_how_to_install_it(package: str) -> None:
    said = f"error: the server needs {package}: pip install -c constraints.txt -e '.[serve]' installs it\n"
    assert refused(hidden=package) == said


def test_what_cannot_be_served_is_refused(server: Served, model: Path, tmp_path: Path) -> None:
    assert f"cannot listen on 127.0.0.1 port {server.port}" in refused("--model", model, "--port", server.port)
    assert "holds no gallery" in refused("--model", model, "--gallery", tmp_path)
    assert "--port" in refused("--port", 70_000)
