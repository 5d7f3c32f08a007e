"""Figures as PNG bytes: drawn by matplotlib's Agg without pyplot, so without global state or a display."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, MissingExtra
from difffeat.recipe import format_timestep

_DPI = 150
_INK, _ACCENT, _RULE, _MARK = "#1d2733", "#2563a8", "#c9d1da", "#d1495b"
_PALETTE = ("#2563a8", "#d1803c", "#3f8f5f", "#8a5aa8", "#b0433f", "#5f6b78")


@dataclass(frozen=True)
class Step:
    """One cell that a search visited: its `order`, and whether it was `chosen` in the end."""

    block: int
    timestep: float
    order: int
    chosen: bool = False


def heat_map_png(
    values: Any,
    blocks: Sequence[int],
    timesteps: Sequence[float],
    log_snr: Sequence[float],
    *,
    unit: str = "mAP",
    steps: Sequence[Step] = (),
    best: bool = True,
) -> bytes:
    """Blocks (upwards) by timesteps (to the right), every cell with its number and every timestep with its log-SNR.

    **Arguments:** `values` [blocks, timesteps], NaN where nothing was measured; `steps` of a search drawn onto it: the order in small
    figures, the chosen cell framed. `best` frames the highest cell with a dotted line. Raises ConfigError when shapes do not fit.
    """
    surface = np.asarray(values, np.float64)
    if surface.shape != (len(blocks), len(timesteps)) or len(log_snr) != len(timesteps):
        raise ConfigError(
            f"a heat map of {len(blocks)} blocks and {len(timesteps)} timesteps got values {list(surface.shape)}, {len(log_snr)} log-SNRs"
        )
    if not np.isfinite(surface).any():
        raise ConfigError("a heat map needs at least one finite value")
    figure, axes = _canvas(max(4.6, 1.9 + 0.72 * len(timesteps)), max(2.6, 1.3 + 0.42 * len(blocks)))
    image = axes.imshow(np.ma.masked_invalid(surface), origin="lower", aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(timesteps)), [f"{format_timestep(t)}\n{snr:+.1f}" for t, snr in zip(timesteps, log_snr, strict=True)])
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_xlabel("timestep t, and below it the log-SNR (higher: less noise)")
    axes.set_ylabel("after block")
    _write_cells(axes, surface, image)
    if best:
        row, column = np.unravel_index(np.nanargmax(surface), surface.shape)
        _frame(axes, int(row), int(column), _INK, ":")
    _draw_steps(axes, steps, list(blocks), list(timesteps))
    figure.colorbar(image, ax=axes, label=unit, fraction=0.04, pad=0.02)
    return _png(figure)


def bar_chart_png(names: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float] | None], *, unit: str = "mAP") -> bytes:
    """Horizontal bars from the first name down, with whiskers where an interval (low, high) is known."""
    if not names or not len(names) == len(values) == len(intervals):
        raise ConfigError(f"a bar chart needs as many names, values and intervals: {len(names)}, {len(values)}, {len(intervals)}")
    figure, axes = _canvas(7.2, 0.9 + 0.36 * len(names))
    places = np.arange(len(names))[::-1]
    axes.barh(places, values, color=_ACCENT, height=0.62)
    right = max([*values, *(interval[1] for interval in intervals if interval is not None)])
    left = min(0.0, *values, *(interval[0] for interval in intervals if interval is not None))
    for place, value, interval in zip(places, values, intervals, strict=True):
        if interval is not None:
            axes.plot(interval, [place, place], color=_INK, linewidth=1.4, marker="|", markersize=7)
        edge = value if interval is None else max(value, interval[1])
        axes.text(edge + 0.015 * (right - left), place, f"{value:.1f}", va="center", fontsize=8, color=_INK)
    axes.set_yticks(places, [_plain(name) for name in names])
    axes.set_xlim(left, right + 0.12 * (right - left or 1))
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=_RULE, linewidth=0.6)
    return _png(figure)


def line_chart_png(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, x_label: str, y_label: str, log_x: bool = False) -> bytes:
    """Lines (name, xs, ys) in one frame, with a legend when there are several."""
    if not lines or any(len(xs) != len(ys) or len(xs) == 0 for _, xs, ys in lines):
        raise ConfigError("a line chart needs at least one line, and as many x as y in each")
    figure, axes = _canvas(7.2, 3.6)
    for number, line in enumerate(lines):
        name, xs, ys = str(line[0]), line[1], line[2]
        axes.plot(
            xs,
            ys,
            color=_PALETTE[number % len(_PALETTE)],
            label=_plain(name),
            linewidth=1.8,
            marker="o" if len(xs) <= 24 else None,
            markersize=4,
        )
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(_plain(x_label))
    axes.set_ylabel(_plain(y_label))
    axes.grid(color=_RULE, linewidth=0.6)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def scatter_png(points: Any, classes: Any, names: Sequence[str]) -> bytes:
    """Points [n, 2] coloured by class number [n], as for a t-SNE picture; the axes mean nothing and are left out."""
    coordinates, numbers = np.asarray(points), np.asarray(classes)
    if coordinates.ndim != 2 or coordinates.shape != (len(numbers), 2) or len(numbers) == 0:
        raise ConfigError(f"a scatter needs points [n, 2] and a class for each, got {list(coordinates.shape)} and {len(numbers)}")
    figure, axes = _canvas(6.2, 5.0)
    for number in np.unique(numbers):
        chosen = coordinates[numbers == number]
        color = f"C{number % 10}"
        axes.scatter(chosen[:, 0], chosen[:, 1], s=9, color=color, label=_plain(str(names[int(number)])), linewidths=0)
    axes.set_axis_off()
    axes.legend(frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def image_png(image: Any) -> bytes:
    """An array uint8 [H, W] or [H, W, 3] as PNG, pixel by pixel."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ConfigError(f"an image must be uint8 [H, W] or [H, W, 3], got {pixels.dtype} of shape {list(pixels.shape)}")
    height, width = pixels.shape[:2]
    # PNG rows each begin with a filter type; 0 leaves the bytes as they are.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), np.ascontiguousarray(pixels).reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "report", "drawing a report's figures") from None
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_RULE)
    return figure, axes


def _plain(text: str) -> str:
    """Text that matplotlib prints as it is, though it holds dollar signs."""
    return text.replace("$", r"\$")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without Software=None the bytes would depend on matplotlib's version text.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _write_cells(axes: Any, surface: np.ndarray, image: Any) -> None:
    low, high = image.get_clim()
    digits = 1 if np.nanmax(np.abs(surface)) >= 10 else 3
    for (row, column), value in np.ndenumerate(surface):
        if np.isfinite(value):
            dark = value < low + 0.6 * (high - low)
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7.5, color="white" if dark else "black")


def _frame(axes: Any, row: int, column: int, color: str, style: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=color, linewidth=2, linestyle=style))


def _draw_steps(axes: Any, steps: Sequence[Step], blocks: list[int], timesteps: list[float]) -> None:
    for step in steps:
        if step.block not in blocks or step.timestep not in timesteps:
            raise ConfigError(f"the search visited block {step.block} at t = {format_timestep(step.timestep)}, which this heat map does not show")
        row, column = blocks.index(step.block), timesteps.index(step.timestep)
        box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axes.text(column + 0.44, row + 0.40, str(step.order), fontsize=5.5, ha="right", va="top", color=_INK, bbox=box)
        if step.chosen:
            _frame(axes, row, column, _MARK, "-")
