"""A real browser for tests of pages that we write: Chromium, headless, which nothing may leave.

The fixture `page` (given to every test by ``conftest.py``) is a Playwright page. When the test is over it fails the
test if the page logged an error, or asked for anything that is not in a file, in the page itself, or on 127.0.0.1.
Dark mode, print and screen are set by the test: ``page.emulate_media(color_scheme="dark", media="print")``,
``page.set_viewport_size({"width": 390, "height": 844})``. Without Chromium or Playwright these tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["axe_violations", "chromium", "layout_shift", "overflow", "page", "until", "watch"]

LOCAL = re.compile(r"^(file:|data:|blob:|about:|https?://127\.0\.0\.1[:/])")
FOREIGN = re.compile(r"^(?!file:|data:|blob:|about:|https?://127\.0\.0\.1[:/])")
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", NO_NAMES]
PATIENCE = 240_000
"""Milliseconds: pages are some megabytes, and the processor may be busy. Speed is no claim of these tests."""
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}
# Runs before the page's own scripts, so that no early shift is missed.
OBSERVE_SHIFT = """
window.__shift = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.__shift += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""


def _program() -> str:
    """Where Chromium is, or the reason to skip."""
    if util.find_spec("playwright") is None:
        pytest.skip("Playwright is not installed: pip install 'halfbyte[test]'")
    asked = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    found = shutil.which(asked) or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip(f"no Chromium at {asked}: apt-get install chromium, or name one in the variable CHROMIUM")
    return found


# One browser a module and not one a session: while it lives, Playwright's event loop runs in this thread, and code
# under test that wants a loop of its own could not have one.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless Chromium that knows no name but finds 127.0.0.1."""
    program = _program()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A fresh page of 1280 x 800 in light colors; console errors and requests that leave fail the test."""
    context = chromium.new_context(viewport=DESK, color_scheme="light", reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    context.route(FOREIGN, lambda route: route.abort())
    context.add_init_script(OBSERVE_SHIFT)
    fresh = context.new_page()
    problems = watch(fresh)
    yield fresh
    context.close()
    assert not problems, "\n".join(problems)


def watch(page: Page) -> list[str]:
    """A list that grows with every console error, uncaught exception and request that leaves the page."""
    problems: list[str] = []
    page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("request", lambda r: None if LOCAL.match(r.url) else problems.append(f"request: {r.url}"))
    return problems


def axe_violations(page: Page, within: str | None = None) -> list[str]:
    """What axe-core finds wrong with the page as it stands: one line a rule and element.

    Args:
        page: an open page.
        within: a CSS selector; None for all of the page.
    """
    spec = util.find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-core is not installed: pip install 'halfbyte[test]'")
    page.evaluate((Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("(within) => axe.run(within || document)", within)
    return [
        f"{rule['id']} ({rule['impact']}): {rule['help']}: {' '.join(map(str, node['target']))}: "
        f"{node.get('failureSummary', '')}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


def layout_shift(page: Page) -> float:
    """The sum of all layout shifts since the page began to load that no input caused."""
    page.wait_for_timeout(100)  # The observer hears of a shift one frame later.
    return float(page.evaluate("window.__shift"))


def overflow(page: Page) -> int:
    """By how many CSS pixels the page is wider than the screen."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def until(page: Page, holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits until something holds, and fails if it never does.

    Playwright's own ``wait_for_function`` evaluates text inside the page, which a page with a strict policy forbids.
    """
    for _ in range(int(seconds / 0.05)):
        if holds():
            return
        page.wait_for_timeout(50)
    assert holds(), "it did not come true"
