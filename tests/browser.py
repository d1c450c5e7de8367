"""A headless Chromium, driven over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_SECONDS = 60.0
_OPTIONS = [
    "--headless",
    # The tests may run as root, in a container.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
]
_KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    " ": 32,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


@contextmanager
def browser(folder):
    """The browser, with a profile in a folder."""
    theirs, to_browser = os.pipe()
    from_browser, their_answers = os.pipe()
    command = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{their_answers}', "bash", CHROMIUM]
    with subprocess.Popen(
        [*command, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(theirs, their_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs)
        os.close(their_answers)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            os.close(to_browser)
            process.kill()
            os.close(from_browser)


class Browser:
    """Sends commands, and gives out what has happened meanwhile by the page that it is of."""

    def __init__(self, to_browser, from_browser):
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self.events = {}

    def send(self, method, session=None, **parameters):
        """What the browser answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + _SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self, deadline):
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], max(0, deadline - time.monotonic()))[0]
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(message)
        if "method" in found:
            self.events.setdefault(found.get("sessionId"), []).append(found)
        return found

    def open(self, address, *, width=1200, dark=False):
        """A page, once it is loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.send("Page.navigate", url=str(address))
        page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """One page."""

    def __init__(self, browser, session):
        self._browser, self._session = browser, session

    def send(self, method, **parameters):
        return self._browser.send(method, self._session, **parameters)

    def evaluate(self, expression):
        """The value of an expression of JavaScript, once it is known."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition):
        """Wait until an expression is true."""
        self.evaluate(
            f"new Promise(done => {{ (function check() {{ if ({condition}) done(true); "
            "else setTimeout(check, 20); })(); })"
        )

    def texts(self, selector):
        """What is shown of the elements, of those that are shown."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.evaluate(f"{found}.filter(e => e.checkVisibility()).map(e => e.textContent)")

    def click(self, selector):
        event = "new MouseEvent('click', {bubbles: true, cancelable: true})"
        self.evaluate(f"document.querySelector({json.dumps(selector)}).dispatchEvent({event})")

    def fill(self, selector, text):
        """Type into a field that is empty."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def press(self, key):
        """Press a key, as a user does."""
        text = {"Enter": "\r", " ": " "}.get(key)
        common = {"key": key, "code": "Space" if key == " " else key}
        common["windowsVirtualKeyCode"] = _KEYS[key]
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {})
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def errors(self):
        """What the console shows, and what was not caught."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [each for each in self._events() if each["method"] in names]

    def requests(self):
        """The addresses that were fetched, that of the page first."""
        return [
            each["params"]["request"]["url"]
            for each in self._events()
            if each["method"] == "Network.requestWillBeSent"
        ]

    def _events(self):
        # What has happened before an answer came before it.
        self.evaluate("1")
        return self._browser.events.get(self._session, [])

    def picture(self):
        """All of the page, as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def printed(self):
        """What comes out of the printer, as PDF."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])
