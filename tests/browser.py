"""A headless Chromium, driven by the WebDriver protocol (w3.org/TR/webdriver2) alone."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

COMMANDS = ("chromium", "chromedriver")
# No window and no network; and without a sandbox, which root has none of.
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def missing() -> list[str]:
    """The commands that are not installed."""
    return [command for command in COMMANDS if shutil.which(command) is None]


class Browser:
    """A window of a Chromium."""

    def __init__(self, session_url: str):
        self._url = session_url

    def _ask(self, method: str, command: str, body=None):
        return _request(method, f"{self._url}/{command}", body)

    def open(self, address: str) -> None:
        self._ask("POST", "url", {"url": address})

    def run(self, script: str, *arguments):
        """What the body of a function of JavaScript returns."""
        return self._ask("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def _act(self, **actions) -> None:
        self._ask("POST", "actions", {"actions": [actions]})

    def pointer(self, x: float, y: float, press: bool = False, kind: str = "mouse") -> None:
        """Moves a pointer of a kind to a place in the window, and presses it there."""
        steps = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}]
        if press:
            steps += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._act(type="pointer", id=kind, parameters={"pointerType": kind}, actions=steps)

    def keys(self, *keys: str) -> None:
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._act(type="key", id="keyboard", actions=steps)

    def emulate(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Gives the window a size, and the colours that the user prefers."""
        self._develop(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._develop("Emulation.setEmulatedMedia", features=[scheme])

    def _develop(self, command: str, **parameters):
        return self._ask("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        shot = self._develop("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def messages(self) -> list[str]:
        """What the console has shown since this was last asked."""
        return [entry["message"] for entry in self._ask("POST", "se/log", {"type": "browser"})]


def _request(method: str, url: str, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory() as folder, _driver(Path(folder)) as url:
        options = {"args": [*OPTIONS, f"--user-data-dir={folder}/profile"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        capabilities = {"capabilities": {"alwaysMatch": wanted}}
        session = f"{url}/session/{_request('POST', f'{url}/session', capabilities)['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _request("DELETE", session)


@contextlib.contextmanager
def _driver(folder: Path) -> Iterator[str]:
    """The address of a chromedriver on a port that it has chosen itself."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            for line in process.stdout:
                if port := re.search(r"started successfully on port (\d+)", line):
                    yield f"http://127.0.0.1:{port[1]}"
                    return
            raise RuntimeError("chromedriver did not start")
        finally:
            process.terminate()
