"""A real Chromium without a window, for pages that are opened from the disk.

Where there is none, tests are skipped; with ``BOOT_JAX_BROWSER=required`` they fail.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--force-device-scale-factor=1"),
)


def missing() -> str:
    """What there is no browser for; empty where there is one."""
    absent = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if not absent:
        return ""
    return f"no {' and no '.join(absent)}: apt-get install chromium chromium-driver"


class Browser:
    """One window, and what it has logged."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(
        self,
        path: pathlib.Path,
        *,
        width: int = 1200,
        height: int = 900,
        scheme: str = "light",
    ) -> None:
        """Opens a file in a window of some size, in light or dark colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.command("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        preferred = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", features=[preferred])
        self.driver.get(path.as_uri())

    def command(self, name: str, **parameters: Any) -> Any:
        """One of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """What JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        """Presses keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def click(self, selector: str, index: int = 0) -> None:
        """Clicks with the mouse what a selector finds."""
        self.driver.find_elements("css selector", selector)[index].click()

    def console(self) -> list[str]:
        """What the console has said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call, without those of ``data:``.

        Those that the page's own policy has refused were never sent.
        """
        asked: dict[str, str] = {}
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            told = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                asked[told["requestId"]] = told["request"]["url"]
            if told.get("blockedReason") == "csp":
                asked.pop(told["requestId"], None)
        return [url for url in asked.values() if not url.startswith("data:")]

    def screenshot(self, path: pathlib.Path, whole: bool = False) -> None:
        """Writes what is seen, or the whole page, as a PNG."""
        if whole:
            height = self.run("return document.documentElement.scrollHeight")
            width = self.run("return window.innerWidth")
            size = {"width": width, "height": height, "deviceScaleFactor": 1}
            self.command("Emulation.setDeviceMetricsOverride", mobile=False, **size)
        path.write_bytes(self.driver.get_screenshot_as_png())


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Starts a browser with an empty profile; ends it, and deletes the profile."""
    if reason := missing():
        if os.environ.get("BOOT_JAX_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    os.environ["SE_OFFLINE"] = "true"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        logged = {"browser": "ALL", "performance": "ALL"}
        options.set_capability("goog:loggingPrefs", logged)
        driver = webdriver.Chrome(
            options, Service(executable_path=shutil.which("chromedriver"))
        )
        try:
            driver.get("about:blank")  # what a new window shows asks for much
            driver.get_log("performance")
            yield Browser(driver)
        finally:
            driver.quit()
