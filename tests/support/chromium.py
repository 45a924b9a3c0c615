"""A headless Chromium, driven through its DevTools protocol over two pipes: no further package, no port."""

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --use-angle=swiftshader --enable-unsafe-swiftshader --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()
PATIENCE_S = 40.0

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs a browser: apt-get install chromium"
)


class Browser:
    """A browser of its own, with an empty profile; a context manager that ends it."""

    def __enter__(self):
        self._profile = tempfile.mkdtemp(prefix="armillary-chromium-")
        theirs_in, ours_out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        ours_in, theirs_out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        program = shutil.which("chromium")
        words = [program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = os.posix_spawn(program, words, os.environ, file_actions=[*pipes, *quiet], setpgroup=0)
        os.close(theirs_in), os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in, "rb", buffering=0), os.fdopen(ours_out, "wb", buffering=0)
        os.set_blocking(ours_in, False)
        self._number, self._rest, self.events = 0, b"", []
        return self

    def __exit__(self, *_):
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._in.close(), self._out.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method, session=None, **parameters):
        """Call a method of the protocol; what happens meanwhile is put into `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._out.write(json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for found in self._read():
                if found.get("id") == self._number:
                    if "error" in found:
                        raise RuntimeError(f"{method}: {found['error']['message']}")
                    return found["result"]
                self.events.append(found)
            time.sleep(0.002)
        raise TimeoutError(f"{method}: no answer in {PATIENCE_S:.0f} s")

    def _read(self):
        while piece := self._in.read(1 << 20):
            self._rest += piece
        *whole, self._rest = self._rest.split(b"\0")
        return [json.loads(message) for message in whole]

    def open(self, url, width=1400, height=860, theme="dark"):
        """A page at an address."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.size(width, height)
        page.theme(theme)
        page.send("Page.navigate", url=url)
        return page


class Page:
    """A page of a browser."""

    def __init__(self, browser, target, session):
        self.browser, self.target, self.session = browser, target, session

    def close(self):
        self.browser.send("Target.closeTarget", targetId=self.target)

    def send(self, method, **parameters):
        return self.browser.send(method, self.session, **parameters)

    def size(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def theme(self, name):
        feature = {"name": "prefers-color-scheme", "value": name}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def evaluate(self, code):
        """Value of an expression, awaited where it is a promise."""
        found = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait(self, code, seconds=PATIENCE_S):
        """Ask until an expression is true, and return its value; True for an element of the page."""
        asked = f"(async () => {{ const found = await ({code}); return found instanceof Node ? true : found; }})()"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.evaluate(asked):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"not true in {seconds:.0f} s: {code}; {self.complaints()}")

    def text(self, selector):
        return self.evaluate(f"document.querySelector({selector!r}).textContent")

    def click(self, selector):
        self.evaluate(f"document.querySelector({selector!r}).click()")

    def mouse(self, kind, x, y, **more):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def press(self, key, code=0, text=""):
        """Press and release a key."""
        given = {"key": key, "windowsVirtualKeyCode": code, "text": text or (key if len(key) == 1 else "")}
        self.send("Input.dispatchKeyEvent", type="keyDown", **given)
        self.send("Input.dispatchKeyEvent", type="keyUp", **given)

    def screenshot(self, path):
        data = self.send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def complaints(self):
        """What the page's scripts failed with, or the browser refused."""
        self.evaluate("1")  # what was said before has come when this is answered
        found = []
        for event in self.browser.events:
            said = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                details = said["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
                found.append(said["entry"]["text"])
        return found
