"""A report is one valid page that needs nothing else, escapes what it is given, and holds figures that decode."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from difffeat.errors import ConfigError, MissingExtra
from difffeat.probe.figures import Step, heat_map_png, image_png
from difffeat.probe.report import (
    BarChart,
    Expectations,
    Gallery,
    Heading,
    HeatMap,
    LineChart,
    Paragraph,
    Report,
    Scatter,
    Section,
    Table,
    search_steps,
)
from difffeat.probe.search import Grid, local_search

HOSTILE = "<script>alert(\"1\")</script> & 'x' $\\frac$ <img src=y>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


@dataclass(frozen=True)
class Came:
    expected: str
    kept: bool
    evidence: str


class Page(HTMLParser):
    """Tags with their attributes, and the visible text; fails on tags that do not nest."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def pngs(self) -> Sequence[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        prefix = "data:image/png;base64,"
        assert all(source.startswith(prefix) for source in sources)
        images = [Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :], validate=True))) for source in sources]
        for image in images:
            image.load()
        return images


def _heat_map(**more) -> HeatMap:
    values = np.array([[0.5, 0.61, 0.55], [0.52, np.nan, 0.4]])
    return HeatMap(f"Image {HOSTILE}", values, (4, 12), (0, 30, 100), (9.2, 5.31, 2.0), **more)


@pytest.fixture(scope="module")
def everything() -> str:
    rng = np.random.default_rng(0)
    sections: list[Section] = [
        Heading(HOSTILE),
        Paragraph(HOSTILE),
        Table(("system", HOSTILE), [(HOSTILE, 0.123456), ("none", None), ("count", 3)], caption=HOSTILE),
        _heat_map(caption=HOSTILE, steps=(Step(4, 30, 1), Step(12, 0, 2, chosen=True))),
        BarChart(HOSTILE, [HOSTILE, "b"], [0.5, 0.25], [(0.4, 0.6), None], caption=HOSTILE),
        LineChart(HOSTILE, [(HOSTILE, [1, 2], [0.5, 0.1]), ("b", [1, 2], [1, 2])], HOSTILE, HOSTILE, log_x=True),
        Scatter(HOSTILE, rng.normal(size=(9, 2)), np.arange(9) % 3, ("a", "b", HOSTILE)),
        Gallery([rng.integers(0, 255, (24, 20, 3), np.uint8), rng.integers(0, 255, (8, 8), np.uint8)], [HOSTILE, "b"]),
        Expectations([Came("Fusion is above text alone.", True, "2.0 points"), Came(HOSTILE, False, HOSTILE)]),
    ]
    return Report(HOSTILE, sections, subtitle=HOSTILE).html()


def test_it_is_one_well_formed_page_for_screen_and_phone(everything: str) -> None:
    page = Page(everything)
    assert everything.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")
    assert "@media print" in everything
    assert "max-width: 640px" in everything


def test_it_refers_to_nothing_outside_itself(everything: str) -> None:
    page = Page(everything)
    assert all(image.format == "PNG" for image in page.pngs())  # every image is inside
    markup = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", everything)  # base64 may hold any letters, `//h` among them
    assert not re.search(r"https?:|//[a-z]|@import|url\(", markup)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert "href" not in attributes


def test_text_is_escaped_and_shown_as_it_is(everything: str) -> None:
    page = Page(everything)
    assert "<script" not in everything
    assert page.text.count(HOSTILE) >= 12
    alts = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    assert all(alts)
    assert sum(HOSTILE in alt for alt in alts) >= 4


def test_figures_decode_and_are_large_enough_to_read(everything: str) -> None:
    images = Page(everything).pngs()
    assert len(images) == 6
    assert all(image.format == "PNG" for image in images)
    assert [image.size for image in images[4:]] == [(20, 24), (8, 8)]
    assert all(image.width >= 620 for image in images[:4])  # never enlarged on a phone, where charts are at least 620 wide


def test_images_are_kept_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 7, 3), (5, 7), (1, 1, 3)):
        pixels = rng.integers(0, 256, shape, np.uint8)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image_png(pixels)))), pixels)


def test_a_heat_map_gives_log_snr_beside_every_timestep_and_its_numbers() -> None:
    page = Page(_heat_map().html())
    for text in ("t = 0 (log-SNR +9.20)", "t = 30 (log-SNR +5.31)", "t = 100 (log-SNR +2.00)", "0.6100"):
        assert text in page.text
    assert "–" in page.text


def test_the_trace_is_drawn() -> None:
    values, snr = np.random.default_rng(0).random((2, 3)), (3.0, 2.0, 1.0)
    plain = heat_map_png(values, (4, 12), (0, 30, 100), snr)
    assert plain == heat_map_png(values, (4, 12), (0, 30, 100), snr)
    assert plain != heat_map_png(values, (4, 12), (0, 30, 100), snr, steps=[Step(4, 0, 1)])
    with pytest.raises(ConfigError, match="the search visited block 5 at t = 0, which this heat map does not show"):
        heat_map_png(values, (4, 12), (0, 30, 100), snr, steps=[Step(5, 0, 1)])


def test_a_searchs_steps_are_the_taps_it_fused_in_order() -> None:
    grid = Grid((1, 2, 3, 4), (0, 30))
    found = local_search(
        lambda b, t: -abs(b - 2) - t, lambda b, t: -b - t, lambda i, j: float(i == "b3/t0"), image_grid=grid, text_grid=Grid((1,), (0,))
    )
    steps = search_steps(found, "image")
    assert [(step.block, step.timestep, step.order) for step in steps] == [
        (1, 0, 1),
        (1, 30, 2),
        (2, 0, 3),
        (2, 30, 4),
        (3, 0, 5),
        (3, 30, 6),
    ]
    assert [step.block for step in steps if step.chosen] == [3]
    assert [step.chosen for step in search_steps(found, "text")] == [True]


def test_expectations_show_what_was_broken() -> None:
    page = Page(Expectations([Came("a", True, "1"), Came("b", False, "2")]).html())
    assert "1 of 2 expectations were kept." in page.text
    assert [attributes["class"] for tag, attributes in page.tags if tag == "li"] == ["kept", "broken"]


def test_the_quickstarts_outcomes_can_be_shown() -> None:
    from difffeat.workflows.expectations import EXPECTATIONS, judge

    text = Page(Expectations(judge(dict.fromkeys(EXPECTATIONS, (True, "numbers")))).html()).text
    assert all(expected in text for expected in EXPECTATIONS.values())


def test_saving_writes_utf8_as_a_whole(tmp_path) -> None:
    path = Report("Größe", [Paragraph("ω_t")]).save(tmp_path / "out" / "report.html")
    assert Page(path.read_text(encoding="utf-8")).text.count("ω_t") == 1
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_without_matplotlib_the_command_to_install_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = "drawing a report's figures needs matplotlib, which is not installed. Run: pip install 'difffeat[report]' -c constraints.txt"
    with pytest.raises(MissingExtra, match=re.escape(message)):
        _heat_map().html()
    Report("text needs no matplotlib", [Paragraph("x"), Table(("a",), [(1,)])]).html()


def test_sections_that_do_not_fit_are_refused() -> None:
    cases = [
        (lambda: Table(("a", "b"), [(1,)]).html(), "every row of this table needs 2 cells: a, b"),
        (lambda: Gallery([np.zeros((2, 2), np.uint8)], ["a", "b"]).html(), "there are 1 images and 2 captions"),
        (lambda: image_png(np.zeros((2, 2, 4), np.uint8)), "an image must be uint8 [H, W] or [H, W, 3], got uint8 of shape [2, 2, 4]"),
        (lambda: heat_map_png(np.zeros((2, 2)), (1,), (0, 1), (1, 2)), "a heat map of 1 blocks and 2 timesteps got values [2, 2]"),
        (lambda: heat_map_png(np.full((1, 1), np.nan), (1,), (0,), (1,)), "a heat map needs at least one finite value"),
        (lambda: BarChart("x", ["a"], [], []).html(), "a bar chart needs as many names, values and intervals: 1, 0, 0"),
        (lambda: LineChart("x", [("a", [1], [])], "x", "y").html(), "a line chart needs at least one line"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=re.escape(message)):
            call()
