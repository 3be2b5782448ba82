"""A real headless Chromium, driven over its DevTools socket."""

import asyncio
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
PATIENCE_SECONDS = 60
CONTROL = 2
KEY_CODES = {
    "Tab": 9,
    "Space": 32,
    "z": 90,
    "Enter": 13,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowRight": 39,
}

# The contrast ratio of WCAG 2 of every text that is seen, with the ground that is really behind it.
CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
      if (colour[3] !== 0) throw new Error("half transparent: " + at.className);
    }
  };
  const light = colour => colour.slice(0, 3)
    .map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const hasText = element => element.matches("textarea, select, input, button") ||
    [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter(element => !element.matches("script, noscript, option") && element.checkVisibility() && hasText(element))
    .map(element => {
      const [low, high] = [light(rgba(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => a - b);
      return [element.tagName + "." + element.className, (high + 0.05) / (low + 0.05)];
    });
})()
"""


class Browser:
    """One tab of a Chromium, driven over its DevTools socket; `problems` are what the page logged or raised."""

    def __init__(self, *, port: int, downloads: Path) -> None:
        self.downloads = downloads
        self.problems: list[str] = []
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect(port))
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # or focus() may raise no event
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    async def _connect(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (tab,) = [target for target in await answer.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give the browser a command and return its answer; events that come before it are noted."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), PATIENCE_SECONDS))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(event["params"]))
        if event.get("method") == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {event['params']['message']}")

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, page: Path | str) -> None:
        """Open a page from disk, or a URL, and wait until its scripts have run."""
        self.run("window.isOld = true")
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self.wait(lambda: self.run("!window.isOld && document.readyState === 'complete'"))

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def press(self, key: str, *, modifiers: int = 0) -> None:
        """Press and release a key, with `modifiers` such as CONTROL held."""
        more: dict[str, Any] = {"windowsVirtualKeyCode": KEY_CODES[key], "modifiers": modifiers}
        if key in ("Enter", "Space"):
            more["text"] = {"Enter": "\r", "Space": " "}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=" " if key == "Space" else key, code=key, **more)

    def point(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def write(self, selector: str, text: str) -> None:
        """Replace what stands in a field by typed text."""
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text) if text else self.run("document.execCommand('delete')")

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list, as a person does."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        assert self.run(f"{field}.value") == value

    def choose_files(self, selector: str, *files: Path) -> None:
        """Choose files in a file field, as its dialog does."""
        field = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self.call("DOM.setFileInputFiles", files=list(map(str, files)), objectId=field["objectId"])

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def texts(self, selector: str) -> list[str]:
        """What the elements say, hidden ones left out."""
        script = "elements => elements.filter(e => e.checkVisibility()).map(e => e.value || e.textContent)"
        return self.run(f"({script})([...document.querySelectorAll({json.dumps(selector)})])")

    def downloaded(self) -> bytes:
        """The content of the one file that was downloaded, which is removed."""
        self.wait(lambda: [path.suffix for path in self.downloads.glob("*")] == [".jsonl"])  # and no part of it
        (file,) = self.downloads.iterdir()
        content = file.read_bytes()
        file.unlink()
        return content

    def close(self) -> None:
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


@contextmanager
def run_chromium(home: Path) -> Iterator[Browser]:
    """A browser that keeps its files in `home`; skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={home}", "--remote-debugging-port=0", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        browser = Browser(port=_read_port(home / "DevToolsActivePort", process), downloads=home / "downloads")
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def _read_port(file: Path, process: subprocess.Popen) -> int:
    """The port that the browser listens on, as soon as it wrote it down."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.exists() or "\n" not in file.read_text():
        assert process.poll() is None, "the browser ended"
        assert time.monotonic() < deadline, "the browser does not listen"
        time.sleep(0.05)
    return int(file.read_text().split()[0])
