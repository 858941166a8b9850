"""A headless Chromium for tests of pages, driven by the Chrome DevTools Protocol over its pipe: JSON that ends with a
zero byte. Needs nothing but the browser (Debian: apt-get install chromium) and bash, which hands the pipe over.

`pytest_plugins = ["chromium"]` in a test file gives it the fixture `browser`."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Enter": 13}
SECONDS = 120                       # that an answer may take


class Reloaded(Exception):
    """The page was replaced while a command ran."""


class Chromium:
    """A browser with one page. Events since the page was opened are kept in `events`."""

    def __init__(self, profile):
        program = next((found for found in map(shutil.which, NAMES) if found), None)
        if program is None or shutil.which("bash") is None:
            pytest.skip("no Chromium on this machine (Debian: apt-get install chromium), or no bash")
        (commands, self.commands), (self.answers, answers) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", program, "--headless=new", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
             f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.numbers, self.rest, self.events, self.session = itertools.count(1), b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Sends a command and returns its answer."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.answers], [], [], SECONDS)[0], f"no answer to {method}"
                received = os.read(self.answers, 1 << 20)
                assert received, "the browser has ended"
                self.rest += received
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == number:
                if "navigated" in str(answer.get("error")):
                    raise Reloaded(method)
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, address):
        """Shows a page anew."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    def complaints(self):
        """Returns what the page's script reports or raises, and errors of the browser, such as blocked requests."""
        return [e["params"] for e in self.events
                if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown")
                or (e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] in ("error", "warning"))]

    def value(self, expression):
        """Returns an expression of the page, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        end, shown = time.monotonic() + seconds, None
        while True:
            with contextlib.suppress(Reloaded):                      # then it is tried again
                if self.value(expression):
                    return
                shown = self.value("document.body?.innerText")          # none yet while a page loads
            assert time.monotonic() < end, f"not within {seconds} s: {expression}; the page shows {shown}"
            time.sleep(0.05)

    def press(self, key):
        common = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
