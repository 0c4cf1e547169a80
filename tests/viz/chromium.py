"""Just enough of the Chrome DevTools protocol to look at a page: open, evaluate, listen, photograph."""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from websockets.sync.client import connect

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page. `events` collects everything that the browser reports."""

    def __init__(self, socket):
        self._socket, self._ids, self.events = socket, itertools.count(), []

    def send(self, method, **params):
        """Call a method of the protocol and return its result."""
        ident = next(self._ids)
        self._socket.send(json.dumps({"id": ident, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == ident:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, path: Path):
        """Open a file, wait until it is loaded, and return the tab."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 20
        while self.js("document.readyState + location.href") != f"complete{path.as_uri()}":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} did not load")
            time.sleep(0.05)
        return self

    def js(self, expression):
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", "exception"))
        return result["result"].get("value")

    def look(self, *, width=1100, height=900, dark=False, mobile=False):
        """Set the window's size and the system's colour scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)

    def photograph(self, path: Path, *, full=True):
        """Write a PNG of the page, or of what is in the window."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself left out."""
        sent = (
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        )
        return [url for url in sent if not url.startswith(("file:", "data:"))]

    @property
    def complaints(self) -> list[str]:
        """What the console holds: messages, errors, refusals."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e["method"] in kinds]


@contextmanager
def browser():
    """A headless Chromium with one empty tab, in a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        flags += [
            "--hide-scrollbars",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        process = subprocess.Popen([BINARY, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(profile)), max_size=None, proxy=None) as socket:
                target = Tab(socket).send("Target.getTargets")["targetInfos"]
                page = next(t["targetId"] for t in target if t["type"] == "page")
                port = socket.remote_address[1]
            with connect(f"ws://127.0.0.1:{port}/devtools/page/{page}", max_size=None, proxy=None) as socket:
                yield Tab(socket)
        finally:
            process.terminate()
            process.wait(timeout=20)


def _address(profile: Path) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            port, path = (profile / "DevToolsActivePort").read_text().split()
        except (FileNotFoundError, ValueError):
            time.sleep(0.05)
        else:
            return f"ws://127.0.0.1:{port}{path}"
    raise TimeoutError("Chromium did not start")
