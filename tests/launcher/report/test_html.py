"""The page of `muster report` in a real browser: it draws, answers the mouse, says nothing to any network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.report import html, report
from tests.support.made_runs import finetuned, rewarded

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (apt-get install chromium)"),
    pytest.mark.timeout(180),
]
SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


class Visit:
    """The open page, and all that it complained about or asked the network for."""

    def __init__(self, tab, file: Path):
        self.tab = tab
        self.complaints: list[str] = []
        self.requests: list[str] = []
        tab.on(
            "console",
            lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None,
        )
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.goto(file.as_uri())
        self.see_all()

    def see_all(self) -> None:
        """Scroll through: charts are drawn when they come into sight."""
        self.tab.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        for place in self.tab.query_selector_all(".canvas, .plot"):
            place.scroll_into_view_if_needed()
        undrawn = "[...document.querySelectorAll('.canvas, .plot')].filter((each) => !each.dataset.drawn).length"
        deadline = time.monotonic() + 30  # the page's policy forbids what Playwright itself would wait with
        while self.tab.evaluate(undrawn):
            assert time.monotonic() < deadline, "charts that were seen are not drawn"
            self.tab.wait_for_timeout(50)

    def charts(self) -> dict[str, list[dict]]:
        """What is drawn, by title: the name and the numbers of every curve."""
        return self.tab.evaluate(
            """Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) => [
                chart.querySelector('h4').textContent,
                chart.querySelector('.canvas').data.map(
                    (curve) => ({name: curve.name, x: [...curve.x], y: [...curve.y], paths: 0})
                ),
            ]))"""
        )

    def picture(self, selector: str) -> bytes:
        return self.tab.query_selector(selector).screenshot()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("report")
    runs = [
        finetuned(place / "runs", "answers <b>"),
        finetuned(place / "runs", "critiques", "cft"),
        rewarded(place / "runs"),
    ]
    return html.write(report.report([str(run.folder) for run in runs]), place / "report.html")


@pytest.fixture
def visit(browser, file):
    tabs = []

    def open_page(size: str = "desk", scheme: str = "light", **more) -> Visit:
        tab = browser.new_page(viewport=SIZES[size], color_scheme=scheme, **more)
        tabs.append(tab)
        return Visit(tab, file)

    yield open_page
    for tab in tabs:
        tab.close()


def test_it_draws_every_curve_without_a_complaint_or_a_request(visit, file, tmp_path):
    seen = visit()
    charts = seen.charts()
    assert set(charts) >= {
        "Loss",
        "Held-out loss",
        "Answer accuracy",
        "Reward per response",
        "KL from the start",
        "Throughput (ppo)",
        "Peak memory",
    }
    for curves in charts.values():
        assert curves
        assert all(len(curve["x"]) == len(curve["y"]) > 0 for curve in curves)
    loss = {curve["name"]: curve for curve in charts["Loss"]}
    assert set(loss) == {"answers &lt;b&gt;/sft", "critiques/cft"}
    assert (loss["critiques/cft"]["x"][0], loss["critiques/cft"]["x"][-1], len(loss["critiques/cft"]["x"])) == (
        1,
        400,
        400,
    )
    drawn = seen.tab.evaluate(
        "[...document.querySelectorAll('.canvas')].map((c) => c.querySelectorAll('.scatterlayer path.js-line').length)"
    )
    assert min(drawn) > 0
    assert seen.tab.evaluate("document.querySelectorAll('#timeline .bars path').length") > 10
    assert seen.tab.evaluate("document.querySelectorAll('#spent .bars path').length") > 10
    assert seen.complaints == []
    assert seen.requests == [file.as_uri()]
    seen.tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 100_000  # an empty page of this size has a tenth of that


def test_pointing_at_a_curve_tells_its_numbers_and_dragging_zooms(visit):
    seen = visit()
    box = seen.tab.query_selector(".canvas .nsewdrag").bounding_box()
    seen.tab.query_selector(".canvas").scroll_into_view_if_needed()
    box = seen.tab.query_selector(".canvas .nsewdrag").bounding_box()
    middle, left = box["y"] + box["height"] / 2, box["x"] + box["width"] / 4
    seen.tab.mouse.move(left, middle)
    told = seen.tab.wait_for_selector(
        ".canvas .hoverlayer .legend, .canvas .hoverlayer .hovertext", timeout=5000
    ).text_content()
    assert "critiques/cft" in told
    assert "answers <b>/sft" in told
    seen.tab.mouse.down()
    seen.tab.mouse.move(left + box["width"] / 2, middle, steps=5)
    seen.tab.mouse.up()
    low, high = seen.tab.evaluate("document.querySelector('.canvas').layout.xaxis.range")
    assert (low, high) == (pytest.approx(100, abs=15), pytest.approx(300, abs=15))


def test_curves_can_be_hidden_smoothed_and_drawn_over_something_else(visit):
    seen = visit()
    seen.tab.click(".chip >> text=critiques/cft")
    assert [curve["name"] for curve in seen.charts()["Loss"]] == ["answers &lt;b&gt;/sft"]
    seen.tab.click(".chip >> text=critiques/cft")
    seen.tab.select_option("#axis", "tokens")
    (first, _) = seen.charts()["Loss"]
    assert (first["x"][0], first["x"][-1]) == (4000, 1_600_000)
    seen.tab.check("#smooth")
    raw, smooth, *_ = seen.charts()["Loss"]
    jumps = [sum(abs(b - a) for a, b in zip(each["y"], each["y"][1:], strict=False)) for each in (raw, smooth)]
    assert jumps[1] < jumps[0] / 2
    assert seen.complaints == []


def test_light_and_dark(visit):
    """Text can be read on its ground: a contrast of 4.5 at least (WCAG 2.2, 1.4.3)."""
    for scheme in ("light", "dark"):
        seen = visit(scheme=scheme)
        for selector, ground in (
            ("h1", "body"),
            ("p.quiet", "body"),
            (".card dd", ".card"),
            ("table th", ".wide"),
            (".tag.good", ".tag.good"),
            (".tag.bad", ".tag.bad"),
        ):
            colours = seen.tab.evaluate(
                "([a, b]) => [getComputedStyle(document.querySelector(a)).color, "
                "getComputedStyle(document.querySelector(b)).backgroundColor]",
                [selector, ground],
            )
            assert contrast(*map(parsed, colours)) > 4.5, (scheme, selector, colours)
        assert (sum(parsed(seen.tab.evaluate("getComputedStyle(document.body).backgroundColor"))) < 200) == (
            scheme == "dark"
        )
        assert seen.complaints == []
    before = seen.picture(".chart")
    seen.tab.click("#theme")
    assert seen.tab.evaluate("document.documentElement.classList.contains('dark')") is False
    seen.tab.wait_for_timeout(200)
    assert seen.picture(".chart") != before


def parsed(colour: str) -> list[float]:
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")][:3]


def contrast(one: list[float], other: list[float]) -> float:
    def luminance(colour: list[float]) -> float:
        linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_on_a_phone_nothing_hangs_out_and_a_finger_scrolls(visit):
    seen = visit("phone", has_touch=True, is_mobile=True)
    assert seen.tab.evaluate("document.documentElement.scrollWidth") <= 390
    widths = seen.tab.evaluate(
        "[...document.querySelectorAll('.canvas .main-svg')].map((each) => each.getBoundingClientRect().right)"
    )
    assert max(widths) <= 390
    assert seen.tab.evaluate("document.querySelector('.canvas').layout.dragmode") is False
    assert seen.complaints == []
