"""`report.html`: one file that needs nothing else, light, printable, and readable on a phone.

A report is a list of sections, plain dataclasses; every text in them is escaped, every figure is a PNG inside the file.

    Report("Digit scenes", [Paragraph("Select on validation, report on test."), HeatMap(...), Table(...)]).save("report.html")
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Protocol

from difffeat.errors import ConfigError
from difffeat.probe import figures
from difffeat.probe.figures import Step
from difffeat.probe.output import replace_bytes
from difffeat.probe.search import SearchResult
from difffeat.recipe import format_timestep, parse_tap

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1d2733; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #dfe4ea; }
p { max-width: 46rem; margin: .6rem 0; }
.subtitle { color: #55606d; margin-bottom: 1.4rem; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figcaption, caption { color: #55606d; font-size: .9rem; text-align: left; padding: .3rem 0; max-width: 46rem; }
.scroll { overflow-x: auto; }
.chart { max-width: 100%; height: auto; display: block; }
.wide .chart { min-width: 620px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; font-size: .95rem; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #dfe4ea; text-align: left; vertical-align: top; }
td.number { text-align: right; }
th { font-weight: 600; }
details { margin: .3rem 0; }
summary { cursor: pointer; color: #2563a8; font-size: .9rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: .9rem; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; image-rendering: pixelated; display: block; border: 1px solid #dfe4ea; }
.outcomes { list-style: none; padding: 0; }
.outcomes li { padding: .5rem 0 .5rem .9rem; margin: .5rem 0; border-left: 4px solid #3f8f5f; break-inside: avoid; }
.outcomes li.broken { border-color: #b0433f; }
.verdict { font-weight: 700; color: #2d6b47; }
.broken .verdict { color: #9c2f2b; }
.evidence { color: #55606d; display: block; }
@page { margin: 16mm; }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; } tr { break-inside: avoid; }
  .scroll { overflow: visible; } .wide .chart { min-width: 0; } details { display: none; } }
@media (max-width: 640px) { main { padding: 1.2rem .9rem 3rem; } h1 { font-size: 1.5rem; } .gallery { grid-template-columns: repeat(3, 1fr);
} }
"""


class Section(Protocol):
    """A part of a report."""

    def html(self) -> str:
        """Escaped markup, without external references."""
        ...


class Judged(Protocol):
    """An expectation stated beforehand and what came of it, such as `workflows.expectations.Outcome`."""

    @property
    def expected(self) -> str:
        """The expectation in words."""
        ...

    @property
    def kept(self) -> bool:
        """Whether it came true."""
        ...

    @property
    def evidence(self) -> str:
        """The numbers in words."""
        ...


@dataclass(frozen=True)
class Report:
    """A title and sections. `subtitle` says on which split the report was selected and on which it reports."""

    title: str
    sections: Sequence[Section]
    subtitle: str = ""

    def html(self) -> str:
        """The whole page."""
        body = "\n".join(section.html() for section in self.sections)
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{escape(self.title)}</h1>\n{subtitle}\n{body}\n</main>\n</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page as a whole, in UTF-8."""
        return replace_bytes(path, self.html().encode())


@dataclass(frozen=True)
class Heading:
    """Begins a chapter."""

    text: str

    def html(self) -> str:
        """Escaped markup."""
        return f"<h2>{escape(self.text)}</h2>"


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str

    def html(self) -> str:
        """Escaped markup."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers. Numbers are right-aligned; floats are printed with `digits` after the point, None as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    digits: int = 2

    def html(self) -> str:
        """Escaped markup. Raises ConfigError on a row of another length than the columns."""
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ConfigError(f"every row of this table needs {len(self.columns)} cells: {', '.join(self.columns)}")
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        body = "\n".join("<tr>" + "".join(self._cell(value) for value in row) + "</tr>" for row in self.rows)
        return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'

    def _cell(self, value: Any) -> str:
        if value is None or value != value:
            return '<td class="number">–</td>'
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            text = f"{value:.{self.digits}f}" if isinstance(value, float) else str(value)
            return f'<td class="number">{text}</td>'
        return f"<td>{escape(str(value))}</td>"


@dataclass(frozen=True)
class HeatMap:
    """A score over block and timestep, its numbers also as a table. `log_snr` stands beside each timestep.

    `steps` draws a search onto it; see `search_steps`.
    """

    title: str
    values: Any
    blocks: Sequence[int]
    timesteps: Sequence[float]
    log_snr: Sequence[float]
    unit: str = "mAP"
    steps: Sequence[Step] = ()
    caption: str = ""

    def html(self) -> str:
        """Escaped markup with the figure inside."""
        png = figures.heat_map_png(self.values, self.blocks, self.timesteps, self.log_snr, unit=self.unit, steps=self.steps)
        columns = [
            "block",
            *(f"t = {format_timestep(t)} (log-SNR {snr:+.2f})" for t, snr in zip(self.timesteps, self.log_snr, strict=True)),
        ]
        rows = [[str(block), *(float(value) for value in row)] for block, row in zip(self.blocks, self.values, strict=True)]
        numbers = f"<details><summary>The numbers</summary>{Table(columns, rows, digits=4).html()}</details>"
        return _figure(png, f"{self.title}: {self.unit} over blocks and timesteps", f"{self.title}. {self.caption}".strip(), wide=True) + numbers


@dataclass(frozen=True)
class BarChart:
    """Scores side by side, with their 95 % intervals (low, high) where known."""

    title: str
    names: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]
    unit: str = "mAP"
    caption: str = ""

    def html(self) -> str:
        """Escaped markup with the figure inside."""
        png = figures.bar_chart_png(self.names, self.values, self.intervals, unit=self.unit)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.names, self.values, strict=True))
        return _figure(png, f"{self.title}: {numbers}", f"{self.title}. {self.caption}".strip())


@dataclass(frozen=True)
class LineChart:
    """Lines (name, xs, ys) in one frame."""

    title: str
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]
    x_label: str
    y_label: str
    caption: str = ""
    log_x: bool = False

    def html(self) -> str:
        """Escaped markup with the figure inside."""
        png = figures.line_chart_png(self.lines, x_label=self.x_label, y_label=self.y_label, log_x=self.log_x)
        return _figure(png, f"{self.title}: {self.y_label} over {self.x_label}", f"{self.title}. {self.caption}".strip())


@dataclass(frozen=True)
class Scatter:
    """Points [n, 2] coloured by class, as from `clusters.tsne`."""

    title: str
    points: Any
    classes: Any
    names: Sequence[str]
    caption: str = ""

    def html(self) -> str:
        """Escaped markup with the figure inside."""
        png = figures.scatter_png(self.points, self.classes, self.names)
        return _figure(png, f"{self.title}: points coloured by class", f"{self.title}. {self.caption}".strip())


@dataclass(frozen=True)
class Gallery:
    """Images uint8 [H, W] or [H, W, 3], each with its caption, enlarged without smoothing."""

    images: Sequence[Any]
    captions: Sequence[str] = field(default_factory=tuple)

    def html(self) -> str:
        """Escaped markup with the images inside. Raises ConfigError unless every image, or none, has a caption."""
        captions = self.captions or [""] * len(self.images)
        if len(captions) != len(self.images):
            raise ConfigError(f"there are {len(self.images)} images and {len(captions)} captions")
        parts = []
        for number, (image, caption) in enumerate(zip(self.images, captions, strict=True), 1):
            alt, below = escape(caption or f"image {number}", quote=True), f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
            parts.append(f'<figure><img alt="{alt}" src="{_data_uri(figures.image_png(image))}">{below}</figure>')
        return f'<div class="gallery">{"".join(parts)}</div>'


@dataclass(frozen=True)
class Expectations:
    """What was expected beforehand and what came, kept or broken; nothing is left out."""

    outcomes: Sequence[Judged]

    def html(self) -> str:
        """Escaped markup, the count first."""
        kept = sum(outcome.kept for outcome in self.outcomes)
        items = "\n".join(self._item(outcome) for outcome in self.outcomes)
        return f'<p>{kept} of {len(self.outcomes)} expectations were kept.</p>\n<ul class="outcomes">{items}</ul>'

    def _item(self, outcome: Judged) -> str:
        name = "kept" if outcome.kept else "broken"
        evidence = f'<span class="evidence">{escape(outcome.evidence)}</span>'
        return f'<li class="{name}"><span class="verdict">{name}</span> {escape(outcome.expected)}{evidence}</li>'


def search_steps(result: SearchResult, modality: str) -> tuple[Step, ...]:
    """What a search did in one modality (`image` or `text`): each tap's first fused evaluation, numbered in order, and the tap chosen.

    Evaluations of one modality alone cover the whole heat map, so drawing them would say nothing.
    """
    if modality not in ("image", "text"):
        raise ConfigError(f"modality must be image or text, got {modality!r}")
    side = 0 if modality == "image" else 1
    chosen = (result.image_tap, result.text_tap)[side]
    visited = dict.fromkeys(evaluation.taps[side] for evaluation in result.trace if evaluation.kind == "pair")
    return tuple(Step(*parse_tap(tap), order=number, chosen=tap == chosen) for number, tap in enumerate(visited, 1))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figure(png: bytes, alt: str, caption: str, *, wide: bool = False) -> str:
    kind = "scroll wide" if wide else "scroll"
    image = f'<img class="chart" alt="{escape(alt, quote=True)}" src="{_data_uri(png)}">'
    return f'<figure><div class="{kind}">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'
