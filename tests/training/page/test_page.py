"""Pages: what stands in them, and how a real browser shows them."""

import io
import json
import re

import pytest
from PIL import Image

from galore_torch.training.page.page import Page
from galore_torch.training.run.plots import COLORS, add_legend, line_style, new_axes

BACKS = {"light": "#ffffff", "dark": "#14171a"}


def page() -> Page:
    made = Page("Two <b>methods</b>", "A & B")
    for _ in range(2):
        figure, axes = new_axes('id="x" <tokens>', "loss")
        for index in range(3):
            axes.plot([1, 2, 3], [index, 1, 2], label=f"line {index}", **line_style(index, 3))
        add_legend(figure)
        made.heading("Loss")
        made.figure(figure, "Losses")
    made.table(["method", *(f"a long column {index}" for index in range(8))], [["<i>galore</i>", *range(8)]] * 2)
    made.code("galore " * 60)
    made.facts({"torch": "2", "a<b": "x" * 90})
    return made


def luminance(colour: tuple[float, float, float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def of_hex(text: str) -> tuple[float, ...]:
    return tuple(int(text[at : at + 2], 16) / 255 for at in (1, 3, 5))


@pytest.mark.parametrize("back", BACKS.values(), ids=BACKS)
def test_lines_stand_out_from_both_backgrounds(back):
    assert min(contrast(of_hex(colour), of_hex(back)) for colour in COLORS) >= 3


def test_text_is_escaped_ids_are_apart_and_nothing_is_fetched():
    html = page().render()
    assert "<b>" not in html
    assert "<i>" not in html
    assert "Two &lt;b&gt;" in html
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 20
    for target in re.findall(r'(?:href="|url\()#([^")]+)', html):
        assert target in ids
    assert not re.search(r'(?:src|href)="(?:https?:)?//', html)
    assert "#000000" not in html
    assert page().render() == html


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        Page("x").table(["a", "b"], [["1"]])


def test_rows_lead_to_folders():
    made = Page("x")
    made.table(["run", "loss"], [["full & whole", 1], ["galore", 2]], links=["full/lr 1", "galore/lr-1"])
    html = made.render()
    assert re.findall('<td class="words"><a href="(.*?)">(.*?)</a></td>', html) == [
        ("full/lr%201/", "full &amp; whole"), ("galore/lr-1/", "galore"),
    ]  # fmt: skip
    assert html.count("<a ") == 2


@pytest.mark.parametrize("share", [0, 1])
def test_a_point_at_an_end_of_both_axes_is_whole(share):
    def drawn(point: float) -> int:
        figure, axes = new_axes("", "")
        axes.plot([point], [point], **line_style(0, 1))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_axis_off()  # which is drawn above its first half
        picture = io.BytesIO()
        figure.savefig(picture, dpi=100)
        pixels = Image.open(picture).convert("RGB").getdata()
        return sum(pixel != (255, 255, 255) for pixel in pixels)

    assert drawn(share) == pytest.approx(drawn(0.5), rel=0.15)


def test_no_two_of_many_lines_of_few_points_look_the_same():
    styles = [line_style(index, 1) for index in range(4 * len(COLORS))]
    assert len({(style["color"], style["marker"]) for style in styles}) == len(styles)


COLOUR = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"


def shown(browser, selector: str, property: str) -> tuple[float, ...]:
    return tuple(int(c) / 255 for c in re.findall(r"\d+", browser.execute_script(COLOUR, selector, property))[:3])


@pytest.mark.slow
def test_a_browser_shows_it_light_dark_and_on_a_phone(browser, tmp_path):
    path = tmp_path / "page.html"
    page().write(path)
    backs = {}
    for scheme in BACKS:
        for width in (375, 1200):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            browser.get(path.as_uri())
            assert browser.execute_script("return innerWidth") == width
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            sizes = browser.execute_script(
                "return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect())"
                ".map(r => [r.width, r.height])"
            )
            assert len(sizes) == 2
            assert all(wide > 300 and high > 150 for wide, high in sizes)
            assert browser.execute_script("return document.querySelectorAll('tbody tr').length") == 2
            backs[scheme] = shown(browser, "body", "backgroundColor")
            assert contrast(shown(browser, "body", "color"), backs[scheme]) >= 7
            assert contrast(shown(browser, "figure svg text", "fill"), backs[scheme]) >= 7
            assert contrast(shown(browser, "figcaption", "color"), backs[scheme]) >= 4.5
    assert backs["light"] != backs["dark"]
    assert browser.get_log("browser") == []
    # The browser may ask for pages of its own: what counts is what ours asked for.
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    urls = {each["request"]["url"] for each in sent if each["documentURL"] == path.as_uri()}
    assert {url for url in urls if not url.startswith("data:")} == {path.as_uri()}


def corner(browser, box) -> set:
    """Return the colours of the right end of the strip below a table."""
    drawn = Image.open(io.BytesIO(box.screenshot_as_png)).convert("RGB")
    wide, high = drawn.size
    strip = drawn.crop((wide - 22, high - 20, wide - 2, high - 2))
    return {colour for _, colour in strip.getcolors(maxcolors=1000)}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", BACKS)
def test_a_table_shows_that_it_scrolls_where_it_does_until_its_end(scheme, browser, tmp_path):
    path, made = tmp_path / "page.html", Page("Scrolls")
    made.table(["method", *(f"a long column {index}" for index in range(5))], [["galore", *range(5)]] * 2)
    made.write(path)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})  # a phone's is seen for a moment alone
    for width, scrolls in ((390, True), (1400, False)):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        (box,) = browser.find_elements("css selector", ".box")
        over = browser.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", box)
        assert (over > 0) is scrolls
        back = tuple(round(255 * part) for part in of_hex(BACKS[scheme]))
        assert (corner(browser, box) != {back}) is scrolls
        browser.execute_script("arguments[0].scrollLeft = 10000", box)
        assert corner(browser, box) == {back}
