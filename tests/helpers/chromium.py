"""A headless Chromium that a test asks questions: by the DevTools protocol over two pipes, so that nothing listens.

with chromium.opened(path, width=1200) as tab: tab.value("document.title")
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")  # fmt: skip
SECONDS = 60.0  # for an answer: a loaded machine starts it slowly


def find() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """One page. requests: the addresses it asked for; complaints: what it or the browser wrote to the console."""

    def __init__(self, send_to: int, read_from: int):
        self._out, self._in, self._buffer, self._number = send_to, read_from, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def open(self, url: str, width: int, dark: bool) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    @property
    def requests(self) -> list[str]:
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        shown = []
        for event in self.events:
            if event["method"] == "Log.entryAdded":
                shown.append(event["params"]["entry"]["text"])
            elif event["method"] == "Runtime.exceptionThrown":
                shown.append(event["params"]["exceptionDetails"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                shown.append(str(event["params"]["args"]))
        return shown

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._in, 1 << 16) if ready else b""
            if not chunk:
                raise TimeoutError("Chromium gave no answer")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


@contextlib.contextmanager
def opened(page: Path, scratch: Path, *, width: int = 1200, dark: bool = False) -> Iterator[Tab]:
    """The page in a browser of its own, whose profile lies in `scratch`."""
    program = find()
    assert program is not None
    (browser_in, ours_out), (ours_in, browser_out) = os.pipe(), os.pipe()
    # The browser reads its pipe 3 and writes its pipe 4.
    script = f'exec "$@" 3<&{browser_in} 4>&{browser_out}'
    command = ["bash", "-c", script, "bash", program, *QUIET, f"--user-data-dir={scratch}", "about:blank"]
    browser = subprocess.Popen(
        command, pass_fds=(browser_in, browser_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(browser_in)
    os.close(browser_out)
    try:
        tab = Tab(ours_out, ours_in)
        tab.open(page.resolve().as_uri(), width, dark)
        yield tab
    finally:
        os.close(ours_out)  # which ends the browser
        try:
            browser.wait(timeout=20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
        os.close(ours_in)
