"""A headless Chromium for tests of pages: opened from files, watched for errors, asked by axe.

Tests take the fixture `browser` (tests/conftest.py): one process per test worker, a fresh page per
test. Chromium and its driver come from the system (`make browser`), never from a download.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

_TIMEOUT = 30  # seconds for a page to load; a loaded machine takes a few
_SCRIPT_TIMEOUT = 120  # axe takes its time with thousands of cells
_SIZE = (1280, 900)  # CSS pixels
_OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # containers and root have no user namespaces
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--no-first-run",
    "--hide-scrollbars",
]
# Two frames after the script ran, everything that it made has been laid out and painted.
_WHEN_PAINTED = """
const done = arguments[arguments.length - 1];
requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));
"""
_GUARD = """
import os, shutil, signal, sys
sys.stdin.read()
os.killpg(int(sys.argv[1]), signal.SIGKILL)
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""
_AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ["violations"]}).then(
  found => done(found.violations.flatMap(rule => rule.nodes.map(
    node => `${rule.id} (${rule.impact}) at ${node.target.join(" ")}: ${node.failureSummary}`))),
  error => done([`axe failed: ${error}`]));
"""


def find_browser() -> tuple[str, str] | None:
    """The paths of Chromium (or Chrome) and of its driver; None where either is missing."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


class Browser:
    """One page in a headless Chromium; `driver` is selenium's, for what is not here."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def reset(self) -> None:
        """A blank page of 1280 x 900 CSS pixels in a light scheme, nothing stored or told yet."""
        self.driver.get("about:blank")
        self.resize(*_SIZE)
        self.scheme("light")
        self.driver.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": "file://", "storageTypes": "all"}
        )
        self.errors()

    def open(self, page: Path) -> float:
        """Open a local page; the milliseconds from the navigation until its content was painted.

        Waits for the script in it. The time includes the driver's own, a few milliseconds.
        """
        self.driver.get_log("performance")
        self.driver.get(page.absolute().as_uri())
        return float(self.driver.execute_async_script(_WHEN_PAINTED))

    def errors(self) -> list[str]:
        """What the console was told since the last call: errors, also of blocked requests."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """What the page has asked for since it was opened, beside itself."""
        told = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        asked = [each["params"] for each in told if each["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked if each["type"] != "Document"]

    def resize(self, width: int, height: int) -> None:
        """Lay the page out in a window of so many CSS pixels (narrower than a window may be)."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_async_script(_WHEN_PAINTED)  # observers of sizes have been told

    def scheme(self, scheme: Literal["light", "dark"]) -> None:
        """What the page finds in `prefers-color-scheme`; motion is reduced, so that tests need not
        wait for scrolling."""
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def too_wide(self) -> list[str]:
        """The page's parts that make it scroll sideways, outermost first; empty is good."""
        found: list[str] = self.run(
            """
            const page = document.documentElement;
            if (page.scrollWidth <= page.clientWidth) return [];
            return ["document", ...[...document.body.querySelectorAll("*")]
              .filter(node => node.getBoundingClientRect().right > page.clientWidth)
              .map(node => `${node.tagName} ${node.id} ${node.getAttribute("class") ?? ""}`)];
            """
        )
        return found

    def violations(self) -> list[str]:
        """What axe-core holds against the page as it stands, by rule and element; empty is good.

        The release is the dev extra's, or the axe.min.js named by DELTAKIT_AXE.
        """
        given = os.environ.get("DELTAKIT_AXE")
        script = Path(given) if given else files("selenium_axe_python") / "axe-core/axe.min.js"
        self.run(script.read_text(encoding="utf-8"))
        found: list[str] = self.driver.execute_async_script(_AXE)
        return found

    def screenshot(self, path: Path) -> None:
        """Write the whole page, also what is below the window, as PNG."""
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True}
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def run(self, script: str, *arguments: Any) -> Any:
        """What a body of a JavaScript function returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, css: str) -> list[WebElement]:
        """The elements that a CSS selector matches."""
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        """The only element that a CSS selector matches."""
        [found] = self.all(css)
        return found

    def text(self, css: str = "body") -> str:
        """The visible text of the only element that a CSS selector matches."""
        return self.one(css).text

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys, one after another, wherever the focus is (selenium's `Keys`)."""
        chain = ActionChains(self.driver)
        if shift:
            chain.key_down(Keys.SHIFT)
        chain.send_keys(*keys)
        if shift:
            chain.key_up(Keys.SHIFT)
        chain.perform()

    def focused(self) -> WebElement:
        """The element that has the keyboard's focus."""
        return self.driver.switch_to.active_element


@contextmanager
def started(paths: tuple[str, str], folder: Path) -> Iterator[Browser]:
    """A browser that keeps everything it writes in `folder`; both are gone at the end."""
    browser, driver = paths
    options = ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for option in [*_OPTIONS, f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(option)
    # A home of its own, too: crash reports and caches do not follow the profile.
    home = {name: str(folder) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    service = Service(driver, env={**os.environ, **home}, popen_kw={"start_new_session": True})
    running = Chrome(options, service)
    with _guarded(service.process.pid, folder):
        try:
            running.set_page_load_timeout(_TIMEOUT)
            running.set_script_timeout(_SCRIPT_TIMEOUT)
            yield Browser(running)
        finally:
            try:
                running.quit()
            except WebDriverException:
                service.stop()


@contextmanager
def _guarded(group: int, folder: Path) -> Iterator[None]:
    """Remove the browser's files at the end; should this process be killed, another one does so,
    and ends the browser. It waits for the end of a pipe that only this process holds open."""
    command = [sys.executable, "-c", _GUARD, str(group), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()
            shutil.rmtree(folder, ignore_errors=True)
