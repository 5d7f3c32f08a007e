"""`difffeat store info`, `diff` and `convert`: one function per verb, and the words that come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError
from difffeat.recognise import quoted
from difffeat.runtime.compare import NAMED, Comparison, TapDifference, compare_stores
from difffeat.runtime.convert import DESCRIPTION, ROWS_PER_FILE, Converted, convert
from difffeat.workflows.describing import describe_store


def run_info(store: Path) -> dict[str, Any]:
    """Say what is in a store. Raises StoreError with its subclasses."""
    return describe_store(store)


def run_convert(
    store: Path,
    output: Path | None,
    layout: str,
    *,
    taps: str | None = None,
    dtype: str | None = None,
    rows_per_file: int = ROWS_PER_FILE,
    keep_quarantined: bool = False,
) -> dict[str, Any]:
    """Write a store in another layout. Raises what `convert` raises, ConfigError without an output folder."""
    if output is None:
        raise ConfigError(f"say where to write: difffeat store convert {quoted(store)} --to {layout} -o {quoted(f'{store.name}-{layout}')}")
    names = _names(taps)
    result = convert(store, output, layout, taps=names, dtype=dtype, rows_per_file=rows_per_file, keep_quarantined=keep_quarantined)
    return {**asdict(result), "path": str(result.path), "bytes": result.bytes, "text": "\n".join(_converted_lines(result))}


def _converted_lines(result: Converted) -> list[str]:
    left_out = f"; {result.left_out} in quarantine left out (--keep-quarantined keeps them, marked)" if result.left_out else ""
    parts = {
        "npy": "a folder of img_emb/ or text_emb/ and metadata/ for each tap" if len(result.taps) > 1 else "img_emb/ or text_emb/, and metadata/",
        "parquet": "data/, a column of fixed-size lists for each tap",
        "webdataset": "KEY.TAP.npy and KEY.json; KEY is the percent-encoded id",
    }
    return [
        f"{result.path}: {result.rows} rows as {result.layout} in {len(result.files)} files, {result.bytes / 1e6:.1f} MB, {result.dtype}{left_out}",
        f"  {parts[result.layout]}; {DESCRIPTION} holds recipe and digests",
        *(f"  {tap} is called {entry['name']}: {entry['shape']}" for tap, entry in result.taps.items()),
    ]


def run_diff(a: Path, b: Path, *, taps: str | None = None) -> dict[str, Any]:
    """Compare two stores, joined by sample id. Raises what `compare_stores` raises."""
    found = compare_stores(a, b, taps=_names(taps))
    joined = {
        "compared": len(found.joined.rows_a),
        "only_a": list(found.joined.only_a),
        "only_b": list(found.joined.only_b),
        "in_quarantine": list(found.joined.set_aside),
    }
    return {
        "a": str(a),
        "b": str(b),
        "samples": joined,
        "taps": [asdict(tap) for tap in found.taps],
        "taps_only_a": list(found.taps_only_a),
        "taps_only_b": list(found.taps_only_b),
        "recipe": list(found.recipe),
        "text": "\n".join(_diff_lines(a, b, found)),
    }


def _diff_lines(a: Path, b: Path, found: Comparison) -> list[str]:
    joined = found.joined
    return [
        f"A {a}",
        f"B {b}",
        f"  {len(joined.rows_a)} samples compared"
        + "".join(
            f"; {len(ids)} {words}: {', '.join(ids[:NAMED])}{' ...' if len(ids) > NAMED else ''}"
            for ids, words in ((joined.only_a, "only in A"), (joined.only_b, "only in B"), (joined.set_aside, "in quarantine in either"))
            if ids
        ),
        *(f"  taps only in {name}: {', '.join(taps)}" for name, taps in (("A", found.taps_only_a), ("B", found.taps_only_b)) if taps),
        *(line for tap in found.taps for line in _tap_lines(tap)),
        *(["  configurations differ (A -> B):", *(f"    {line}" for line in found.recipe)] if found.recipe else ["  same configuration"]),
    ]


def _tap_lines(tap: TapDifference) -> list[str]:
    name = tap.tap_a if tap.tap_a == tap.tap_b else f"{tap.tap_a} = {tap.tap_b}"
    shapes = str(list(tap.shape_a)) if tap.shape_a == tap.shape_b else f"{list(tap.shape_a)} and {list(tap.shape_b)}"
    ratio = "" if tap.norm_ratio is None else f" (ratio {tap.norm_ratio:.6g})"
    lines = [f"  {name}: {shapes}, norms {tap.norm_a:.6g} and {tap.norm_b:.6g}{ratio}, CKA {_number(tap.cka)}{f' ({tap.note})' if tap.note else ''}"]
    if tap.cosine is not None:
        spread = ", ".join(f"{key} {tap.cosine[key]:.6f}" for key in ("p1", "p5", "p50"))
        zero = f"; {tap.cosine['zero_rows']} rows are zero" if tap.cosine["zero_rows"] else ""
        lines.append(f"    cosine mean {tap.cosine['mean']:.6f}, {spread}, min {tap.cosine['min']:.6f} ({tap.cosine['worst']}){zero}")
    if tap.max_difference is not None:
        lines.append(f"    relative L2 {_number(tap.relative_l2)}, largest difference {_number(tap.max_difference)}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _names(taps: str | None) -> Sequence[str] | None:
    return None if taps is None else [name.strip() for name in taps.split(",") if name.strip()]
