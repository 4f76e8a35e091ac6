"""A headless Chromium driven over a pipe (Chrome DevTools Protocol): no driver, no port, no package
beside the browser."""

import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--remote-debugging-pipe",
)


def find_browser():
    """Path of a Chromium, or None; ``BROWSER_FOR_TESTS`` names another one."""
    return os.environ.get("BROWSER_FOR_TESTS") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a headless browser; ``events`` holds everything that the browser said of its own
    accord."""

    def __init__(self, executable, timeout=90.0):
        self.timeout, self.events, self.count, self.buffer = timeout, [], 0, b""
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command_read, self.commands = os.pipe()
        self.answers, answer_write = os.pipe()

        def wire():
            """The browser reads commands from descriptor 3 and writes to 4; both are moved out of
            the way first."""
            read, write = os.dup(command_read), os.dup(answer_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        # far descriptors, so that dup2 onto 3 and 4 cannot close the other end
        self.process = subprocess.Popen(
            [executable, *OPTIONS, f"--user-data-dir={self.profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=wire,
            close_fds=False,
            start_new_session=True,
        )
        os.close(command_read)
        os.close(answer_write)
        target = next(
            one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"
        )
        self.session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def call(self, method, session=None, **parameters):
        """Send one command and return its result; what arrives in between goes to ``events``."""
        self.count += 1
        message = {
            "id": self.count,
            "method": method,
            "params": parameters,
            **({"sessionId": session} if session else {}),
        }
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self.timeout
        while time.monotonic() < until:
            answer = self.receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)
        raise TimeoutError(method)

    def send(self, method, **parameters):
        """A command to the page."""
        return self.call(method, self.session, **parameters)

    def receive(self):
        """The next message of the browser."""
        while b"\0" not in self.buffer:
            got = os.read(self.answers, 1 << 20)
            if not got:
                raise RuntimeError("the browser closed its pipe")
            self.buffer += got
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, page, width=1200, height=900, *, dark=False):
        """Open a file in a window of that size (CSS pixels) and wait until it is loaded and
        drawn."""
        self.navigate("about:blank")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.navigate(page.resolve().as_uri())
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )
        self.evaluate("document.fonts.ready.then(() => 1)")

    def navigate(self, url):
        """Go to an address and wait for its ``load``; what was heard of the page before is
        forgotten."""
        self.events.clear()
        self.send("Page.navigate", url=url)
        until = time.monotonic() + self.timeout
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < until, "the page does not load"
            self.events.append(self.receive())

    def evaluate(self, expression):
        """Value of a JavaScript expression (promises are awaited); raises AssertionError with the
        message when it throws."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"].get(
            "exception", answer["exceptionDetails"]
        )
        return answer["result"].get("value")

    def complaints(self):
        """Errors and warnings of the console, uncaught exceptions and refused requests since the
        page was opened."""
        found = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(parameters["exceptionDetails"])[:500])
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append(json.dumps(parameters["args"])[:500])
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in (
                "error",
                "warning",
            ):
                found.append(parameters["entry"]["text"])
        return found

    def requests(self):
        """Addresses of all requests since the page was opened, ``data:`` and ``blob:`` left out:
        they leave no computer."""
        sent = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]
