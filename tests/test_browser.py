"""The browser fixture itself: it sees errors, requests that leave, shifts, and pages that are too wide."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from browser import PHONE, axe_violations, layout_shift, overflow, watch

if TYPE_CHECKING:
    from playwright.sync_api import Page

GOOD = "<!doctype html><html lang=en><title>t</title><main><h1>Title</h1>{}</main></html>"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<p>Nothing wrong</p>", ""),
        ("<script>console.error('broken')</script>", "console: broken"),
        ("<script>throw new Error('thrown')</script>", "exception: thrown"),
        ("<img alt=x src=https://example.com/a.png>", "request: https://example.com/a.png"),
        ("<img alt=x src=data:image/gif;base64,R0lGODlhAQABAAAAACw=>", ""),
    ],
)
def test_watch(page: Page, body: str, expected: str) -> None:
    """Errors, exceptions and requests to other machines are noticed, and nothing else is."""
    watched = page.context.browser.new_page()  # another context: the fixture's own would fail this test
    problems = watch(watched)
    watched.set_content(GOOD.format(body))
    watched.wait_for_timeout(50)
    watched.context.close()
    assert expected in problems if expected else problems == []


class Hello(BaseHTTPRequestHandler):
    """Answers everything with a word."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


def test_this_machine_is_reached(page: Page) -> None:
    """A server on 127.0.0.1 is reached, although no name is."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
        thread.join()
    assert page.inner_text("body") == "hello"


def test_axe_sees_a_missing_label(page: Page) -> None:
    """A control without a name is a violation, and one with a name is none."""
    page.set_content(GOOD.format("<label>Name <input></label>"))
    assert axe_violations(page) == []
    page.set_content(GOOD.format("<input>"))
    assert [line.split()[0] for line in axe_violations(page)] == ["label"]


def test_overflow(page: Page) -> None:
    """A box of 500 pixels is 110 too wide for a screen of 390."""
    page.set_viewport_size(PHONE)
    page.set_content("<!doctype html><style>body{margin:0}</style><div style='width:500px'>wide</div>")
    assert overflow(page) == 110


def test_layout_shift(page: Page, tmp_path) -> None:
    """A box that pushes text down after a moment is a shift; a page at rest has none."""
    file = tmp_path / "page.html"
    late = "<script>setTimeout(() => document.querySelector('div').style.height = '300px', 200)</script>"
    for script, moved in (("", False), (late, True)):
        file.write_text(f"<!doctype html><div></div><p>{'text ' * 200}</p>{script}")
        page.goto(file.as_uri())
        page.wait_for_timeout(400)
        assert (layout_shift(page) > 0) is moved
