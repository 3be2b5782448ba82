"""Real servers for tests, on ports of their own: S3 (moto), a web server (nginx), and a proxy that injects faults."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


# ---- S3 ---------------------------------------------------------------------------------------------------


@contextmanager
def run_s3() -> Iterator[str]:
    """An S3 server's address; skips the test where moto or s3fs is not installed."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[s3]'")
    server_module = pytest.importorskip("moto.server", reason="needs moto: pip install -e '.[dev]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def use_s3(address: str) -> Iterator[dict[str, str]]:
    """Point s3fs to `address`, by nothing but environment variables; gives them."""
    import s3fs

    variables = S3_KEYS | {"AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield variables
    s3fs.S3FileSystem.clear_instance_cache()


class Bucket:
    """A bucket of its own, looked at without fsspec."""

    def __init__(self, address: str, name: str) -> None:
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        self.client: Any = boto3.client("s3", endpoint_url=address, **keys)
        self.name = name
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Store all files below `folder` under `prefix/`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def read_all(self, prefix: str) -> dict[str, bytes]:
        """The content of all objects under `prefix/`, by the rest of their names."""
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=f"{prefix}/").get("Contents", [])
        names = [entry["Key"] for entry in found]
        bodies = [self.client.get_object(Bucket=self.name, Key=name)["Body"] for name in names]
        return {name.removeprefix(f"{prefix}/"): body.read() for name, body in zip(names, bodies, strict=True)}


# ---- the web ----------------------------------------------------------------------------------------------

NGINX_CONFIGURATION = """
daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;
events {{}}
http {{
    access_log off; client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c;
    uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;
    server {{ listen 127.0.0.1:{port}; root "{root}"; location /listed/ {{ autoindex on; }} }}
}}
"""


@contextmanager
def run_nginx(root: Path, home: Path, *, port: int | None = None) -> Iterator[str]:
    """The address of nginx over `root`, which keeps its own files in `home`; skips the test where there is none."""
    if NGINX is None:
        pytest.skip("needs nginx on the PATH")
    home.mkdir()
    port = port or free_port()
    (home / "conf").write_text(NGINX_CONFIGURATION.format(home=home, port=port, root=root))
    process = subprocess.Popen([NGINX, "-p", home, "-c", home / "conf", "-e", home / "error.log"])
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def wait_for_port(port: int, *, seconds: float = 20.0) -> None:
    """Return when somebody listens."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# ---- faults -----------------------------------------------------------------------------------------------

Choose = Callable[[str, str], str]


class Proxy:
    """Stands before an HTTP server; `choose` says for each method and path how the request is treated.

    "ok", a status such as "503", "drop" (no answer), "cut request" (half of it arrives), "cut answer" (half of it is
    sent; the request is done), "stall" (silence before the answer), "hold" (silence with half the request arrived,
    until the client is gone; `held` is set).
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.choose: Choose = lambda method, path: "ok"
        self.treated: list[str] = []
        self.held = threading.Event()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""

    def _treat(self) -> None:
        mood = self.proxy.choose(self.command, self.path)
        self.proxy.treated.append(mood)
        self.close_connection = mood != "ok"
        size = int(self.headers.get("Content-Length", 0))
        half = mood in ("cut request", "hold")
        body = self.rfile.read(size // 2 if half else size)
        with contextlib.suppress(ConnectionError):
            if mood.isdigit():
                self._send(int(mood), {"Content-Length": "0"}, b"")
            elif mood != "drop":
                self._forward(mood, body)

    def _forward(self, mood: str, body: bytes) -> None:
        server = http.client.HTTPConnection(self.proxy.upstream)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                server.putheader(name, value)
        server.putheader("Connection", "close")
        server.endheaders(body)
        with contextlib.closing(server):
            if mood == "hold":
                self.proxy.held.set()
                self.connection.settimeout(30)
                with contextlib.suppress(OSError):
                    while self.connection.recv(65536):
                        pass
            if mood in ("hold", "cut request"):
                return
            answer = server.getresponse()
            content = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date")}
            if self.command != "HEAD":
                headers["Content-Length"] = str(len(content))
            if mood == "stall":
                self.proxy.closing.wait(60)
                return
            if mood == "cut answer" and not content:
                return
            self._send(answer.status, headers, content[: len(content) // 2] if mood == "cut answer" else content)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _treat
