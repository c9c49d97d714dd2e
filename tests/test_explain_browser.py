"""The page of `halfbyte explain` under the hands of a visitor, in a real browser."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from browser import DESK, PHONE, axe_violations, layout_shift, overflow
from halfbyte import explain

CHAPTERS = ("picture", "unit", "ranges", "spread", "phases", "run")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the page is."""
    path = tmp_path_factory.mktemp("explain") / "explain.html"
    explain.write(path)
    return path.as_uri()


@pytest.fixture
def opened(page, address):
    """The page, open on a desk."""
    page.goto(address)
    return page


def data(page):
    """The tables that the page was given."""
    return json.loads(page.locator("#data").text_content())


def sample(width=6, height=4):
    """A PNG in which every red is another."""
    image = Image.new("RGB", (width, height))
    image.putdata([(10 * k, 128, 255) for k in range(width * height)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(page, canvas, every=1):
    """The bytes of a canvas, red, green, blue and alpha, of each pixel or of one in so many."""
    return page.evaluate(
        "([id, every]) => { const c = document.getElementById(id);"
        "const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [...all].filter((_, k) => (k >> 2) % every === 0); }",
        [canvas, every],
    )


DROP = """([text, name, type]) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
}"""


def drop(page, content, name, kind):
    """Drops a file onto the page."""
    page.evaluate(DROP, [base64.b64encode(content).decode(), name, kind])


def test_bits_by_keyboard(opened):
    """Arrow keys take bits away, down to one, and the picture then holds what the table says and nothing else."""
    slider = opened.locator("#bits")
    slider.focus()
    for expected in ("3 bits, 8 steps", "2 bits, 4 steps", "1 bit, 2 steps"):
        opened.keyboard.press("ArrowLeft")
        assert opened.locator("#bits-out").text_content() == expected
    before, after = pixels(opened, "before", 97), pixels(opened, "after", 97)
    grays = data(opened)["pictures"]["grays"][0]
    assert after == [gray if k % 4 == 3 else grays[gray] for k, gray in enumerate(before)]
    assert slider.get_attribute("aria-valuetext") == "1 bit, 2 steps"


def test_dropped_picture(opened):
    """A picture dropped anywhere takes the place of the built-in one, and loses its bits by the table."""
    drop(opened, sample(), "mine.png", "image/png")
    opened.wait_for_function("document.getElementById('picture-news').textContent.includes('mine.png, 6 × 4')")
    before, after = pixels(opened, "before"), pixels(opened, "after")
    assert before[::4] == [10 * k for k in range(24)]
    grays = data(opened)["pictures"]["grays"][3]
    assert after[::4] == [grays[10 * k] for k in range(24)]
    assert opened.locator("#drop").is_hidden()


def test_dropped_text(opened):
    """A file that is no picture is refused in words, and the picture stays."""
    before = pixels(opened, "before", 97)
    drop(opened, b"no picture", "notes.txt", "text/plain")
    opened.wait_for_function("document.getElementById('picture-news').textContent.includes('no picture')")
    assert pixels(opened, "before", 97) == before


def test_chosen_picture(opened):
    """The button does what dropping does."""
    opened.locator("#file").set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": sample()})
    opened.wait_for_function("document.getElementById('picture-news').textContent.includes('mine.png')")
    assert len(pixels(opened, "after")) == 6 * 4 * 4


def test_three_tenths(opened):
    """The second chapter opens at 0.3 and says -4; an arrow key goes to the next number, which is -3."""
    assert opened.locator("#number-in").text_content() == "0.300"
    assert opened.locator("#number-code").text_content() == "−4"
    assert opened.locator("#number-out").text_content() == "0.267"
    opened.locator("#number").focus()
    opened.keyboard.press("ArrowRight")
    assert opened.locator("#number-code").text_content() == "−3"


def test_number_by_pointer(opened):
    """Dragging in the drawing moves the number: to the far right it is 1, whose code is 7."""
    drawing = opened.locator("#staircase")
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] - 2, box["y"] + 100)
    opened.mouse.up()
    assert opened.locator("#number-code").text_content() == "7"
    opened.mouse.move(box["x"] + 60, box["y"] + 100)
    assert opened.locator("#number-code").text_content() == "7"


def test_range_by_keyboard_and_button(opened):
    """Both ends move by arrow keys, never past each other, and the errors shown are those of the table's row."""
    rows = data(opened)["ranges"]["rows"]

    def shown():
        return [opened.locator(f"#{ruler}-error").text_content() for ruler in ("fixed", "own")]

    def expected(row):
        return [f"{rows[row][ruler]['error']:.4f}" for ruler in ("fixed", "own")]

    assert shown() == expected("4,18")
    opened.locator("#low").focus()
    opened.keyboard.press("ArrowRight")
    assert shown() == expected("5,18")
    opened.locator("#high").focus()
    opened.keyboard.press("Home")
    assert shown() == expected("5,6")
    opened.get_by_role("button", name="The next: 0.1 to 0.7").click()
    assert shown() == expected("2,14")
    assert opened.locator("[aria-pressed=true][data-range]").count() == 1


def test_range_by_pointer(opened):
    """Dragging moves the nearer end."""
    drawing = opened.locator("#rulers")
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    inside = box["width"] - 28
    opened.mouse.move(box["x"] + 14 + 0.85 * inside, box["y"] + 150)
    opened.mouse.down()
    opened.mouse.move(box["x"] + 14 + 0.5 * inside, box["y"] + 150)
    opened.mouse.up()
    assert [opened.locator(f"#{end}").input_value() for end in ("low", "high")] == ["4", "10"]


def test_scales(opened):
    """Another scale is drawn and marked in the table; hollow are exactly the gradients that the table says are lost."""
    table = data(opened)["spread"]
    middle = table["largest_middle"] - int(opened.locator("#middle").input_value())
    for name, words in (("linear", "linear"), ("base10", "base 10")):
        opened.get_by_label(words, exact=True).check()
        lost = opened.locator("#cloud circle.gone").count()
        assert lost == len(table["offsets"]) - table["scales"][name]["survivors"][middle]
        assert opened.locator("#survival tr.on th").text_content() == words
    opened.locator("#middle").focus()
    opened.keyboard.press("Home")
    assert opened.locator("#survival tr").nth(0).locator("td").first.text_content() == "0 of 60"


def test_phases(opened):
    """The two results of a gradient and the sum of their errors are those of the table, wherever the slider is."""
    table = data(opened)["phases"]
    opened.locator("#gradient").focus()
    for key in ("ArrowLeft", "PageUp", "Home", "End"):
        opened.keyboard.press(key)
        k = int(opened.locator("#gradient").input_value())
        for name, phase in (("gradient-even", "even"), ("gradient-odd", "odd")):
            assert opened.locator(f"#{name}").text_content() == table[phase]["labels"][k]
        shown = opened.locator("#gradient-sum").text_content().replace("−", "-").removesuffix(" %")
        assert float(shown) == pytest.approx(100 * table["together"][k], abs=0.51)


def test_run_by_keyboard(opened):
    """Stepping shows that step's accuracy, loss and answer, and its codes, each one of sixteen."""
    run = data(opened)["run"]
    opened.locator("#step").focus()
    opened.keyboard.press("End")
    assert opened.locator("#run-step").text_content() == f"{run['about']['steps'][-1]} of {run['about']['steps'][-1]}"
    assert opened.locator("#run-accuracy").text_content() == f"{run['accuracy'][-1]:.1f} %"
    opened.keyboard.press("ArrowLeft")
    opened.get_by_role("radio", name="7").check()
    answer = run["answers"][-2][7]
    assert opened.locator("#run-answer").text_content() == f"{answer} {'✓' if answer == '7' else '✗'}"
    cells = opened.locator(".tensors.forward > div").first.locator("text").all_text_contents()
    codes = run["tensors"]["stem.fprop.input"]["codes"][-2][7 * 64 : 8 * 64]
    assert [int(cell.replace("−", "-")) for cell in cells] == [(int(c, 16) ^ 8) - 8 for c in codes]


def test_play_and_pause(opened):
    """Play goes on by itself until it is stopped."""
    play = opened.locator("#play")
    play.click()
    opened.wait_for_function("Number(document.getElementById('step').value) >= 2")
    assert play.text_content() == "Pause"
    play.click()
    assert play.text_content() == "Play"
    at = opened.locator("#step").input_value()
    opened.wait_for_timeout(500)
    assert opened.locator("#step").input_value() == at


def test_dark_and_light(opened):
    """The page follows the system's colors, and the button changes them."""

    def paper():
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    light, button = paper(), opened.locator("#theme")
    assert button.get_attribute("aria-pressed") == "false"
    opened.emulate_media(color_scheme="dark")
    dark = paper()
    assert dark != light
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert paper() == light
    opened.emulate_media(media="print", color_scheme="dark")
    button.evaluate("(button) => button.click()")
    assert paper() in (light, "rgba(0, 0, 0, 0)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(opened, scheme):
    """axe-core has nothing to object to, in either theme."""
    opened.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    assert axe_violations(opened) == []


@pytest.mark.parametrize("screen", [DESK, PHONE, {"width": 320, "height": 640}], ids=lambda s: str(s["width"]))
def test_no_sideways_scrolling(page, address, screen):
    """On a desk, a phone and a small phone nothing sticks out, and no word of a drawing leaves its figure."""
    page.set_viewport_size(screen)
    page.goto(address)
    assert overflow(page) <= 0
    outside = page.evaluate(
        "[...document.querySelectorAll('.drawing text')].filter((text) => {"
        "const box = text.getBoundingClientRect();"
        "return box.left < -1 || box.right > innerWidth + 1; }).map((text) => text.textContent)"
    )
    assert outside == []


def test_nothing_shifts(page, address):
    """Nothing moves while the page opens, nor when a visitor reads from top to bottom."""
    page.goto(address)
    for chapter in CHAPTERS:
        page.locator(f"#{chapter}").scroll_into_view_if_needed()
    assert layout_shift(page) == 0


def test_every_control_is_reached_by_tab(opened):
    """The tabulator reaches every slider, button, link and choice, in the order of the page."""
    wanted = ["theme", "bits", "file", "number", "low", "high", "middle", "gradient", "play", "step", "neuron"]
    seen = []
    while not seen or seen[-1] != "neuron":
        assert len(seen) < 60, f"no end: {seen}"
        opened.keyboard.press("Tab")
        seen.append(opened.evaluate("document.activeElement.id || document.activeElement.name"))
    assert [name for name in seen if name in wanted] == wanted
    assert {"scale", "digit"} <= set(seen)
