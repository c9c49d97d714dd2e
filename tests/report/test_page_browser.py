"""The report page in a browser: what a person sees, with a keyboard, in the dark, on a phone and on paper."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser import PHONE, axe_violations, layout_shift, overflow, until
from halfbyte.lab import record
from halfbyte.lab.record import Record
from halfbyte.report import page as report
from halfbyte.report.page.live import server
from page_records import HOSTILE, group, hostile, large, of

if TYPE_CHECKING:
    from playwright.sync_api import Page

DRAWN = ".js-plotly-plot"


def mixed() -> list[Record]:
    """Three recipes: one was run by two commits, and of one a run lacks the second measure."""
    first, second = ({"revision": letter * 40, "dirty": False} for letter in "ab")
    return [
        *(of("fp32", 90.0, seed, further={"letters": 4.0}, commit=first) for seed in range(2)),
        *(of("luq", 91.0, seed, further={"letters": 5.5}, commit=(first, second)[seed]) for seed in range(2)),
        *(of("nvfp4", 92.0, seed, further={"letters": 6.0} if seed else {}, commit=first) for seed in range(2)),
    ]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Writes a page of some of the made-up records, each once, and gives its address."""
    folder = tmp_path_factory.mktemp("pages")
    makers: dict[str, Callable[[], list[Record]]] = {
        "group": group,
        "large": large,
        "hostile": hostile,
        "both": lambda: [*group(), *large(6, 40)],
        "mixed": mixed,
        "many": lambda: [of(f"recipe_number_{i}", 90.0 + i, seed) for i in range(22) for seed in range(3)],
    }

    def written(name: str) -> str:
        file = folder / f"{name}.html"
        if not file.exists():
            report.write(makers[name](), file)
        return file.as_uri()

    return written


def scroll_through(page: Page) -> None:
    """Looks at all of the page, so that every chart is drawn, and comes back."""
    until(page, lambda: page.evaluate("typeof Plotly") == "object")
    height = page.evaluate("document.documentElement.scrollHeight")
    for y in range(0, height, 500):
        page.evaluate("(y) => window.scrollTo({top: y, behavior: 'instant'})", y)
        page.wait_for_timeout(60)
    page.evaluate("window.scrollTo({top: 0, behavior: 'instant'})")


def traces(page: Page, chart: int = 0) -> list[str]:
    """The names of the lines in a chart."""
    return page.evaluate("(n) => document.querySelectorAll('.chart')[n].data.map((t) => t.name).filter(Boolean)", chart)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["both", "many"])
def test_axe_finds_nothing(page: Page, address, scheme, name) -> None:
    """axe-core finds no fault with the page in either color scheme, with every chart drawn and a layer opened."""
    page.emulate_media(color_scheme=scheme)
    page.goto(address(name))
    for button in page.locator("button.open").all()[:1]:
        button.click()
    scroll_through(page)
    assert axe_violations(page) == []


@pytest.mark.parametrize("name", ["both", "large"])
def test_nothing_jumps(page: Page, address, name) -> None:
    """From the first paint to the last chart nothing moves that nobody moved."""
    page.goto(address(name))
    scroll_through(page)
    assert page.locator(DRAWN).count() > 0
    assert layout_shift(page) == 0


@pytest.mark.parametrize("name", ["both", "many", "large", "hostile"])
def test_a_phone_scrolls_one_way(page: Page, address, name) -> None:
    """On 390 pixels no page is wider than the screen."""
    page.set_viewport_size(PHONE)
    page.goto(address(name))
    scroll_through(page)
    assert overflow(page) <= 0


def test_charts_wait_until_they_are_seen(page: Page, address) -> None:
    """With 100 layers no chart of a layer exists before it is opened, and what is below the screen is not drawn."""
    page.goto(address("large"))
    assert page.locator(".chart").count() == 3  # Loss, accuracy, and all layers at a glance.
    until(page, lambda: page.locator(DRAWN).count() >= 2)
    page.wait_for_timeout(300)
    assert page.locator(DRAWN).count() == 2
    page.locator(".chart").last.scroll_into_view_if_needed()
    until(page, lambda: page.locator(DRAWN).count() == 3)
    assert page.locator("tbody button.open").count() == 100


def test_tables_do_not_wait_for_plotly(page: Page, address) -> None:
    """When the page is loaded its tables and controls are there and Plotly is text that nobody has read yet."""
    page.add_init_script("addEventListener('load', () => { window.atLoad = [typeof Plotly, "
                         "document.querySelectorAll('tbody tr').length]; })")  # fmt: skip
    page.goto(address("large"))
    kind, rows = page.evaluate("window.atLoad")
    assert kind == "undefined"
    assert rows > 100
    page.wait_for_selector(DRAWN)
    assert page.evaluate("typeof Plotly") == "object"


def test_paper_waits_for_nobody(page: Page, address) -> None:
    """Whoever prints before Plotly was read gets every chart."""
    page.add_init_script("window.requestAnimationFrame = () => 0;")  # Its turn never comes.
    page.goto(address("large"))
    assert page.evaluate("typeof Plotly") == "undefined"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(DRAWN).count() == page.locator(".chart").count() == 3


def test_the_filter_takes_every_word(page: Page, address) -> None:
    """Typing leaves the layers that hold every word, counts them aloud, and the chart above shows the same ones."""
    page.goto(address("large"))
    box = page.get_by_label("Filter layers")
    box.fill("block3")
    assert page.locator("output").inner_text() == "10 of 100 layers"
    assert page.locator("tbody button.open").count() == 10
    box.fill("STAGE2 block3 fp4_e3m0")
    assert page.locator("tbody button.open").all_inner_texts() == ["stage2.block3.convolution"]
    page.get_by_label("Drawn as").select_option("lines")
    page.locator(".chart").last.scroll_into_view_if_needed()
    until(page, lambda: page.locator(DRAWN).count() == 3)
    assert traces(page, 2) == ["stage2.block3.convolution"]
    box.fill("nothing like it")
    assert page.locator("output").inner_text() == "0 of 100 layers"
    box.fill("")
    assert page.locator("tbody button.open").count() == 100


def test_a_layer_opens_by_keyboard(page: Page, address) -> None:
    """Enter on a layer opens its charts below it, codes included; Enter again closes them."""
    page.goto(address("group"))
    button = page.get_by_role("button", name="body2.conv")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    captions = page.locator("tr.detail figcaption").all_inner_texts()
    assert captions[0] == "Scale, log2"
    assert captions[-1] == "How often each value of fp4_e3m0_r4 was used"
    page.locator("tr.detail .chart").last.scroll_into_view_if_needed()
    until(page, lambda: page.locator(f"tr.detail {DRAWN}").count() == 6)
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "false"
    assert page.locator("tr.detail").count() == 0


def test_everything_is_reached_by_tab(page: Page, address) -> None:
    """The first stop leads past the header; every control that is shown comes in the order of the page."""
    page.goto(address("group"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"theme", "g0-on-test", "g0-range-all", "g0-show-0", "g0-show-2"} <= seen
    assert {"g0-recipe", "g0-slot", "g0-measure", "g0-as", "g0-filter", "g0-layer-1"} <= seen


def test_the_space_bar_takes_a_recipe_out(page: Page, address) -> None:
    """Unchecking a recipe takes its line out of every chart; training data are other lines."""
    page.goto(address("group"))
    page.wait_for_selector(DRAWN)
    assert traces(page) == ["fp32", "bf16", "ibm2020"]
    page.get_by_role("checkbox", name="bf16").focus()
    page.keyboard.press("Space")
    assert traces(page) == ["fp32", "ibm2020"]
    page.get_by_role("radio", name="second half").check()
    assert page.evaluate("document.querySelector('.chart').data.at(-1).x") == [2, 3]


def test_the_numbers_of_the_table(page: Page, address) -> None:
    """The gap table says the mean, the paired interval and what to make of it."""
    page.goto(address("group"))
    cells = page.locator("section table").first.locator("tbody tr").nth(2).locator("td").all_inner_texts()
    assert cells == ["3", "97.10 ± 0.10", "−2.00", "−2.00 to −2.00", "", "worse"]


def test_other_measures_and_commits_have_their_recipes(page: Page, address) -> None:
    """A second measure stands behind the reading, and which commit ran what is listed where there are several."""
    page.goto(address("mixed"))
    table = page.locator("section table").first
    assert table.locator("thead th").last.inner_text() == "Letters, %"
    last = [row.locator("td").last.inner_text() for row in table.locator("tbody tr").all()]
    assert last == ["4.00 ± 0.00", "5.50 ± 0.00 (+1.50)", "6.00 (1 of 2 runs)"]
    assert "2, listed below" in page.locator("dl.facts").inner_text()
    ran = page.get_by_role("list", name="Commits").locator("li").all_inner_texts()
    expected = ["fp32: seeds 0, 1 at aaaaaaa", "luq: seed 0 at aaaaaaa; seed 1 at bbbbbbb"]
    assert ran == [*expected, "nvfp4: seeds 0, 1 at aaaaaaa"]


def test_dark_and_back(page: Page, address) -> None:
    """The page follows the system, the button turns it, and the charts' text turns with it."""

    def colors() -> tuple[str, str]:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return background, page.evaluate(f"document.querySelector('{DRAWN}').layout.font.color")

    page.goto(address("group"))
    page.wait_for_selector(DRAWN)
    light, button = colors(), page.get_by_role("button", name="Dark colors")
    assert button.get_attribute("aria-pressed") == "false"
    page.emulate_media(color_scheme="dark")
    until(page, lambda: button.get_attribute("aria-pressed") == "true")
    dark = colors()
    assert all(a != b for a, b in zip(light, dark, strict=True))
    button.click()
    assert (colors(), button.get_attribute("aria-pressed")) == (light, "false")
    page.emulate_media(color_scheme="light")
    button.click()
    assert colors() == dark


def test_on_paper(page: Page, address) -> None:
    """Print is black on white even in dark colors, without buttons, and recipes that are not shown have no key."""
    page.emulate_media(color_scheme="dark")
    page.goto(address("group"))
    page.wait_for_selector(DRAWN)
    page.get_by_role("checkbox", name="bf16").uncheck()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#theme").is_visible()
    assert [label.is_visible() for label in page.locator("label.chip", has_text="bf16").all()] == [False]
    until(page, lambda: page.evaluate(f"document.querySelector('{DRAWN}').layout.font.color") == "#444")


def test_names_are_no_markup(page: Page, address) -> None:
    """A recipe, task or layer whose name is markup is shown letter by letter, and runs nothing."""
    page.goto(address("hostile"))
    page.locator("button.open").first.click()
    scroll_through(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img").count() == 0
    assert page.locator("button.open").first.inner_text() == HOSTILE


@pytest.mark.parametrize("name", ["group", "large", "many"])
def test_a_file_is_below_six_megabytes(address, name) -> None:
    """Whatever it shows, the file stays below 6 MB, Plotly included."""
    path = Path(address(name).removeprefix("file://"))
    assert path.stat().st_size < 6_000_000


def test_a_live_page_keeps_what_was_typed(page: Page, tmp_path) -> None:
    """A new epoch and a new record appear by themselves; focus, filter and an open layer stay."""
    records = group()
    for place, one in enumerate(records[:3]):
        record.write(one, tmp_path / f"{place}.json")
    with server([tmp_path]) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            page.goto(f"http://127.0.0.1:{running.server_port}/")
            until(page, lambda: page.locator("#status").inner_text().startswith("Live: as of"))
            page.get_by_role("button", name="body1.conv").click()
            page.get_by_label("Filter layers").press_sequentially("body1")
            record.write_partial(of("luq", 5.0), tmp_path / "luq" / "progress.json", 2, 4)
            page.wait_for_selector("text=luq, seed 0: epoch 2 of 4")
            assert page.evaluate("document.activeElement.id") == "g0-filter"
            page.keyboard.type(".conv")
            assert page.get_by_label("Filter layers").input_value() == "body1.conv"
            assert page.locator("tr.detail").count() == 1
            record.write(of("luq", 98.0), tmp_path / "luq" / "record.json")
            page.wait_for_selector("section table >> text=98.00")
            assert axe_violations(page) == []
        finally:
            page.close()  # Else it asks a server that is gone.
            running.shutdown()
            thread.join()
