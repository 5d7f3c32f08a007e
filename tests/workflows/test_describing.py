"""What a store says of the source that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from difffeat.workflows.describing import describe_store
from tests.runtime.fake import FakeEngine, encoded


def test_a_store_says_what_was_understood_of_its_source(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/1.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(0))
    extract(FakeEngine(), open_source(tmp_path / "photos"), tmp_path / "out", batch_size=2)
    found = describe_store(tmp_path / "out")
    assert found["understood"]["classes"]["first"] == ["cat", "dog"]
    assert "  source: labels: names of the first folder; 2 of 2 rows are labelled" in found["text"]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"understood": {}}', '{"understood": {"rows": 3}}', '{"understood": 5}'])
def test_a_summary_that_does_not_say_it_is_passed_over(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(0))
    extract(FakeEngine(), open_source(tmp_path / "0.png"), tmp_path / "out", batch_size=2)
    (tmp_path / "out/summary.json").unlink()
    if content is not None:
        (tmp_path / "out/summary.json").write_text(content)
    found = describe_store(tmp_path / "out")
    assert json.loads(json.dumps(found))["understood"] is None
    assert "source:" not in found["text"]
