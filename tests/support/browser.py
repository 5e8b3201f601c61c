"""A real browser over its debugging pipe: no driver, no port, no package.

The protocol is JSON messages with a zero byte after each, on the child's descriptors 3 and 4.
Source: Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
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
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
DEADLINE_S = 60.0


def find_browser() -> str | None:
    """The first Chromium on the PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._buffer = b""
        self._next = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """Errors of the page's script and console, and requests that failed."""
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command; returns its result."""
        self._next += 1
        number = self._next
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self._note(told)

    def open(self, address: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Loads a page at a window's size; returns when it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        deadline_s = time.monotonic() + DEADLINE_S
        while (
            self.run("document.readyState + location.href.slice(0, 5)") != f"complete{address[:5]}"
        ):
            assert time.monotonic() < deadline_s, "the page did not load"

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def move(self, x: float, y: float, kind: str = "mouseMoved", buttons: int = 0) -> None:
        """A mouse event in the window."""
        button = "left" if kind != "mouseMoved" else "none"
        self.call(
            "Input.dispatchMouseEvent",
            type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=int(button == "left"),
        )  # fmt: skip

    def screenshot(self, path: Path, *, height: int | None = None, top: int = 0) -> None:
        """A PNG of the window's width, down to `height` or the page's end."""
        whole = self.call("Page.getLayoutMetrics")["cssContentSize"]
        height = height or int(whole["height"]) - top
        clip = {"x": 0, "y": top, "width": whole["width"], "height": height, "scale": 1}
        told = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read_fd], [], [], DEADLINE_S)
            assert ready, "the browser does not answer"
            chunk = os.read(self._read_fd, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, told: dict[str, Any]) -> None:
        params = told.get("params", {})
        match told.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
            case "Runtime.consoleAPICalled" if params.get("type") in ("error", "warning"):
                self.complaints.append(json.dumps(params["args"])[:500])
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["entry"])[:500])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


@contextlib.contextmanager
def browser_page(profile: Path) -> Iterator[Page]:
    """A browser of its own with an empty profile in a new folder; ends with the block."""
    program = find_browser()
    assert program is not None
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()
    command = f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}'
    child = subprocess.Popen(
        ["bash", "-c", command, program, *QUIET, f"--user-data-dir={profile}",
         "--remote-debugging-pipe"],
        pass_fds=(their_read, their_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_read)
    os.close(their_write)
    try:
        yield Page(our_read, our_write)
    finally:
        with contextlib.suppress(OSError):
            os.close(our_write)  # the browser ends when its pipe does
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        os.close(our_read)
