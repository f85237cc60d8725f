"""The chat page in a headless Chromium, driven by Playwright (`pip install 'moejet[browser]'`)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WAIT_S = 20.0


@contextmanager
def open_browser() -> Iterator[Any]:
    """A Chromium: Playwright's own, or the system's. Raises FileNotFoundError if there is none."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        path = playwright.chromium.executable_path
        system = shutil.which("chromium") or shutil.which("google-chrome")
        if not Path(path).exists() and system is None:
            raise FileNotFoundError("there is no Chromium: playwright install chromium")
        chosen = None if Path(path).exists() else system
        browser = playwright.chromium.launch(executable_path=chosen, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page in a window of its own, with everything it asks for and complains about."""

    def __init__(self, browser: Any, url: str, **options: Any):
        self.url = url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(**options)
        self.context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => "
            "console.error('policy: ' + e.violatedDirective + ' ' + e.blockedURI + ' ' + e.sample))"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(_WAIT_S * 1e3)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#model:not(:empty), dialog[open]")

    def _on_console(self, message: Any) -> None:
        # The browser itself reports every status of 400 and above.
        if message.type in ("error", "warning") and "status of" not in message.text:
            self.complaints.append(message.text)

    def ask(self, text: str, *, is_waited_for: bool = True) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if is_waited_for:
            self.wait()

    def wait(self) -> None:
        """Until no answer comes in any more."""
        self.page.wait_for_selector("#send:visible")

    def texts(self, selector: str) -> list[str]:
        return [t.strip() for t in self.page.locator(selector).all_inner_texts()]

    def wait_for_answer(self, num_chars: int, selector: str = ".answer") -> None:
        # Not wait_for_function, which evaluates text in the page: the policy forbids that.
        deadline = time.monotonic() + _WAIT_S
        while len("".join(self.texts(selector))) < num_chars:
            assert time.monotonic() < deadline, f"{self.texts(selector)=}"
            time.sleep(0.02)

    def place_of_answer(self) -> list[str]:
        """Such as ‹2/3›."""
        return ["".join(text.split()) for text in self.texts(".assistant .switcher")]

    def click(self, text: str, *, inside: str = "body") -> None:
        self.page.locator(inside).get_by_role("button", name=text, exact=True).click()

    def set_options(self, **values: Any) -> None:
        """In the dialog of settings: temperature, top_p, max_tokens, n, seed."""
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill(f"input[name={name}]", str(value))
        self.click("Done")

    def check(self) -> None:
        """Nothing was asked of anybody but the server, and nothing was complained about."""
        foreign = [u for u in self.requests if not u.startswith((self.url, "data:", "blob:"))]
        assert foreign == [], f"{foreign=}"
        assert self.complaints == [], f"{self.complaints=}"
