"""A little engine in NumPy and small sources, for what does not depend on a real graph."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from difffeat.engines.base import Submitting, TensorSpec, check_feeds
from difffeat.recipe import GraphRecipe
from difffeat.runtime.files import Files

SIDE = 8
RECIPE = GraphRecipe(
    backbone="fake",
    family="dit",
    architecture={"input_size": 4, "in_channels": 2},
    weights={"backbone": "0" * 64},
    kind="image",
    blocks=(1, 2),
    timesteps=(30.0,),
    log_snr=(3.0,),
    noising="random",
)


class FakeEngine(Submitting):
    """Features that show pixels and noise of their own row; counts its runs. `before` is called ahead of each run."""

    name, device, precision, digest = "fake", "cpu", "fp32", "f" * 64
    recipe = RECIPE

    def __init__(self, before: Callable[[int], Any] | None = None, scale: float = 1.0) -> None:
        self.runs, self._before, self._scale = 0, before, scale
        pixels = TensorSpec("pixels", "uint8", ("batch", SIDE, SIDE, 3))
        noise = TensorSpec("noise", "float32", ("batch", 2, 4, 4))
        self.inputs: Mapping[str, TensorSpec] = {"pixels": pixels, "noise": noise}
        self.outputs: Mapping[str, TensorSpec] = {f"b{block}": TensorSpec(f"b{block}", "float32", ("batch", 3)) for block in RECIPE.blocks}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_feeds(self.inputs, feeds)
        if self._before is not None:
            self._before(self.runs)
        self.runs += 1
        colour = feeds["pixels"].mean(axis=(1, 2), dtype=np.float32) / np.float32(255)
        shift = feeds["noise"].reshape(len(colour), -1)[:, :3]
        with np.errstate(invalid="ignore"):
            return {f"b{block}": np.float32(self._scale) * (block * colour + shift) for block in RECIPE.blocks}


TEXT_RECIPE = replace(
    RECIPE, family="plaid", architecture={"max_length": 32, "vocab": 64}, weights={"backbone": "0" * 64, "tokenizer": "0" * 64}, kind="text"
)


class FakeTextEngine(FakeEngine):
    """Features that show tokens and noise of their own row, and nothing of the padding."""

    recipe = TEXT_RECIPE

    def __init__(self, before: Callable[[int], Any] | None = None, scale: float = 1.0) -> None:
        super().__init__(before, scale)
        tokens, lengths = TensorSpec("tokens", "int64", ("batch", "length")), TensorSpec("lengths", "int64", ("batch",))
        self.inputs = {"tokens": tokens, "lengths": lengths, "noise": TensorSpec("noise", "float32", ("batch", "length", 3))}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_feeds(self.inputs, feeds)
        if self._before is not None:
            self._before(self.runs)
        self.runs += 1
        tokens, lengths = feeds["tokens"], feeds["lengths"]
        own = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.float32)
        value = ((tokens[:, :, None] / np.float32(8) + feeds["noise"]) * own[:, :, None]).sum(axis=1, dtype=np.float32) / lengths[:, None]
        return {f"b{block}": np.float32(self._scale * block) * value.astype(np.float32) for block in RECIPE.blocks}


def picture(index: int, side: int = 16) -> Image.Image:
    """A small image that differs from its neighbours."""
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(index: int, kind: str = "PNG") -> bytes:
    """Its bytes."""
    buffer = io.BytesIO()
    picture(index).save(buffer, kind)
    return buffer.getvalue()


def folder_of_images(folder: Path, count: int) -> Path:
    """`count` PNGs, `00.png` ...; with captions of several lengths beside them."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:02d}.png").write_bytes(encoded(index))
        (folder / f"{index:02d}.txt").write_text("the " * (1 + 5 * index % 9) + "two")
    return folder


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder; of a store without its summary, which tells how long a run took."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.stem != "summary")
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class CountedFiles(Files):
    """Numbers every primitive operation and calls `at(number, name)` ahead of it."""

    def __init__(self, at: Callable[[int, str], Any]) -> None:
        self.count, self._at = 0, at

    def _next(self, name: str) -> None:
        number, self.count = self.count, self.count + 1
        self._at(number, name)

    def create(self, path: Path) -> int:
        self._next("create")
        return super().create(path)

    def allocate(self, descriptor: int, size: int) -> None:
        self._next("allocate")
        super().allocate(descriptor, size)

    def write(self, descriptor: int, chunk: bytes | memoryview) -> None:
        self._next("write")
        super().write(descriptor, chunk)

    def sync(self, descriptor: int) -> None:
        self._next("sync")
        super().sync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._next("rename")
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._next("remove")
        super().remove(path)

    def link(self, source: Path, target: Path) -> None:
        self._next("link")
        super().link(source, target)

    def make_one_folder(self, path: Path) -> None:
        self._next("make_one_folder")
        super().make_one_folder(path)

    def remove_one_folder(self, path: Path) -> None:
        self._next("remove_one_folder")
        super().remove_one_folder(path)
