"""Small stores with chosen contents, for what reads stores; made by the extraction itself, from images whose colour is their row number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from difffeat.engines.base import TensorSpec
from difffeat.recipe import RunRecipe, parse_tap
from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store
from tests.runtime.fake import RECIPE, SIDE, TEXT_RECIPE, FakeEngine


class Recall(FakeEngine):
    """An engine that knows the features of every row, and reads the row off the image's colour."""

    def __init__(self, features: Mapping[str, np.ndarray], **recipe: Any) -> None:
        super().__init__()
        blocks, timesteps = zip(*map(parse_tap, features), strict=True)
        self.recipe = replace(RECIPE, **{"blocks": tuple(sorted(blocks)), "timesteps": (timesteps[0],), **recipe})
        self.features = {f"b{block}": values for block, values in zip(blocks, features.values(), strict=True)}
        self.inputs = {"pixels": self.inputs["pixels"]}
        self.outputs = {name: TensorSpec(name, "float32", ("batch", *values.shape[1:])) for name, values in self.features.items()}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        colour = feeds["pixels"][:, 0, 0].astype(int)
        rows = colour[:, 0] + 256 * colour[:, 1]
        return {name: values[np.minimum(rows, len(values) - 1)].astype(np.float32) for name, values in self.features.items()}


class RecallText(Recall):
    """The same of captions: the first token of each is its row's number."""

    def __init__(self, features: Mapping[str, np.ndarray], **recipe: Any) -> None:
        rows = len(next(iter(features.values())))
        about = {"family": "plaid", "architecture": {"max_length": 32, "vocab": rows + 1}, "kind": "text"}
        super().__init__(features, **{**about, "weights": TEXT_RECIPE.weights, **recipe})
        self.inputs = {"tokens": TensorSpec("tokens", "int64", ("batch", "length")), "lengths": TensorSpec("lengths", "int64", ("batch",))}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        rows = feeds["tokens"][:, 0]
        return {name: values[np.minimum(rows, len(values) - 1)].astype(np.float32) for name, values in self.features.items()}


def row_tokenizer(path: Path, rows: int) -> Path:
    """A tokenizer whose words are the numbers of rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({**{str(row): row for row in range(rows)}, "<unk>": rows}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.save(str(path))
    return path


def make_source(folder: Path, count: int, *, ids: Sequence[str] | None = None, bad: Sequence[int] = (), labels: bool = True) -> Path:
    """A manifest of images for `Recall`; those of `bad` are no images."""
    folder.mkdir(parents=True)
    lines = []
    for row in range(count):
        path = folder / f"{row}.png"
        Image.new("RGB", (SIDE, SIDE), (row % 256, row // 256, 0)).save(path)
        if row in bad:
            path.write_bytes(b"no image")
        name = f"s{row}" if ids is None else ids[row]
        entry: dict[str, Any] = {"id": name, "image": path.name, "captions": [f"caption of {name}", "second"]}
        if labels:
            entry["labels"] = ["a"] if row % 2 else ["b", "a"]
        lines.append(json.dumps(entry))
    manifest = folder / "samples.jsonl"
    manifest.write_text("\n".join(lines))
    return manifest


def make_store(
    path: Path,
    features: Mapping[str, np.ndarray],
    *,
    ids: Sequence[str] | None = None,
    bad: Sequence[int] = (),
    shard: int = 4,
    labels: bool = True,
    **recipe: Any,
) -> Store:
    """A finished store with these features [n, ...]; rows in `bad` are in quarantine. `<path>-source/samples.jsonl` is its source."""
    values = next(iter(features.values()))
    source = make_source(path.with_name(f"{path.name}-source"), len(values), ids=ids, bad=bad, labels=labels)
    run = RunRecipe(store_dtype="fp32" if values.dtype == np.float32 else "fp16")
    extract(Recall(features, **recipe), open_source(str(source)), path, run=run, batch_size=4, shard_size=shard, max_bad_fraction=1.0, num_workers=1)
    return Store.open(path)
