"""What came of an extraction, in words and as files beside the store: `summary.json`, and `summary.html` for the eye. No digest covers them."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from difffeat.runtime.files import Files
from difffeat.runtime.progress import Summary
from difffeat.runtime.understood import passed_over
from difffeat.runtime.writer import SUMMARY_HTML, SUMMARY_JSON, writing

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:.6rem 0 1.6rem}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}.bar{display:inline-block;height:.7em;background:#36c}.wait{background:#ccc}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}}"
)


def summary_dict(summary: Summary) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "store": str(summary.path),
        "rows": summary.rows,
        "quarantined": summary.quarantined,
        "added": summary.added,
        "healed": summary.healed,
        "retried": summary.retried,
        "missing_shards": list(summary.missing),
        "computed_shards": summary.computed,
        "skipped_shards": summary.skipped,
        "samples": summary.samples,
        "seconds": summary.seconds,
        "samples_per_second": summary.rate,
        "batch_size": summary.batch_size,
        "num_workers": summary.workers,
        "executor": summary.executor,
        "device": summary.device,
        "stages": summary.stages,
        "waiting": summary.waiting,
        "bottleneck": summary.bottleneck,
        "advice": summary.advice,
        "quarantine": summary.reasons,
        "remarks": summary.remarks,
        "tokens": summary.tokens,
        "unknown_tokens": summary.unknown,
        "ignored": summary.ignored,
        "understood": summary.understood,
        "exit_code": summary.exit_code,
    }


def summary_text(summary: Summary) -> str:
    """A few lines for the terminal."""
    lines = [f"{summary.path}: {summary.rows} rows in {summary.computed + summary.skipped} shards ({summary.skipped} were there already)"]
    if summary.samples:
        spent = ", ".join(f"{name} {seconds:.1f} s (waited {summary.waiting.get(name, 0.0):.1f})" for name, seconds in summary.stages.items())
        lines.append(f"  {summary.rate:.1f} samples/s at batch size {summary.batch_size}; stages overlap: {spent}")
        lines.append(f"  slowest: {summary.bottleneck}. {summary.advice}")
    if summary.added:
        lines.append(f"  {summary.added} rows were added")
    if summary.retried == 0 and summary.quarantined:
        lines.append("  nothing was retried: the source holds none of the samples in quarantine, by their ids")
    if summary.healed:
        lines.append(f"  {summary.healed} quarantined samples are good now")
    if summary.quarantined:
        lines.append(f"  {summary.quarantined} samples are in quarantine; the reasons stand in {summary.path / 'quarantine.jsonl'}")
    if summary.tokens:
        lines.append(f"  {summary.unknown} of {summary.tokens} tokens are unknown to the tokenizer ({summary.unknown / summary.tokens:.1%})")
    for remark, found in summary.remarks.items():
        more = ", ..." if found["samples"] > len(found["first_ids"]) else ""
        lines.append(
            f"  {found['samples']} {'sample' if found['samples'] == 1 else 'samples'} computed now: {remark} ({', '.join(found['first_ids'])}{more})"
        )
    if summary.ignored:
        lines.append(f"  passed over: {passed_over(summary.ignored)}")
    return "\n".join(lines)


def write_summary(summary: Summary, files: Files | None = None) -> None:
    """Both files, unless nothing was computed and they are there. Raises StoreWriteError."""
    if not summary.computed and all((summary.path / name).exists() for name in (SUMMARY_JSON, SUMMARY_HTML)):
        return
    with writing(summary.path):
        (files or Files()).commit_json(summary.path / SUMMARY_JSON, summary_dict(summary))
        page = summary_html(summary).encode()
        (files or Files()).commit(summary.path / SUMMARY_HTML, [page], len(page))


def summary_html(summary: Summary) -> str:
    """One page that loads nothing."""
    name = html.escape(summary.path.name)
    facts = {
        "rows": summary.rows,
        "in quarantine": summary.quarantined,
        "computed in this run": f"{summary.samples} samples, {summary.computed} shards",
        "samples per second": f"{summary.rate:.1f}",
        "seconds": f"{summary.seconds:.1f}",
        "batch size": summary.batch_size,
        "threads that decode": summary.workers,
        "device": f"{summary.device} ({summary.executor})",
    }
    if summary.tokens:
        facts["unknown tokens"] = f"{summary.unknown} of {summary.tokens}"
    longest = max((s + summary.waiting.get(n, 0.0) for n, s in summary.stages.items()), default=0.0) or 1.0
    stages = ((stage, f"{s:.1f} s", f"{summary.waiting.get(stage, 0.0):.1f} s", _bar(s, summary.waiting.get(stage, 0.0), longest)) for stage, s in
              summary.stages.items())  # fmt: skip
    reasons = (
        (html.escape(reason), str(found["samples"]), html.escape(", ".join(found["first_ids"])), html.escape(found["example"]))
        for reason, found in summary.reasons.items()
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style><h1>{name}</h1>",
        _table((), ((html.escape(key), html.escape(str(value))) for key, value in facts.items())),
        "<h2>Where the time went</h2>",
        _table(("stage", "worked", "waited", ""), stages),
        f"<p>{html.escape(summary.advice)} Stages overlap; of stages with several threads this is the mean.</p>",
    ]
    if summary.reasons:
        parts += ["<h2>In quarantine</h2>", _table(("why", "samples", "first ids", "for example"), reasons)]
    if summary.remarks:
        remarks = (
            (html.escape(remark), str(found["samples"]), html.escape(", ".join(found["first_ids"]))) for remark, found in summary.remarks.items()
        )
        parts += ["<h2>Good, and not plain</h2>", _table(("what", "samples", "first ids"), remarks)]
    return "".join(parts) + "\n"


def _bar(worked: float, waited: float, longest: float) -> str:
    parts = (("bar", worked), ("bar wait", waited))
    return "".join(f'<span class="{kind}" style="width:{16 * seconds / longest:.2f}rem"></span>' for kind, seconds in parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th>{title}" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<table>{f'<tr>{titles}' if titles else ''}{body}</table>"
