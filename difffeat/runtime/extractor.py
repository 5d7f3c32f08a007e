"""Features in memory, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from difffeat.errors import ConfigError
from difffeat.recipe import tap_name
from difffeat.runtime.batches import per_timestep, tap_shapes
from difffeat.runtime.blobs import Blob, FileBlob
from difffeat.runtime.feeds import batch_noise
from difffeat.runtime.inversion import open_inversion
from difffeat.runtime.preprocess import decode, preprocess, quiet_pillow, to_rgb
from difffeat.runtime.samples import Sample
from difffeat.runtime.tokens import Captions, batches_by_length, pad_tokens


class Extractor:
    """An open artifact that turns images or captions into features.

    with Extractor.from_artifact("artifacts/dit-xl-2-256-b12-t30") as extractor:
        features = extractor(["cat.jpg", "dog.jpg"])["b12/t30"]        # float32 [2, 1152]
    """

    def __init__(
        self,
        artifact: Any,
        engine: Any,
        latents_engine: Any | None,
        invert: Any | None,
        stack: ExitStack,
        *,
        seed: int,
        batch_size: int,
        preprocessing: str,
    ) -> None:
        self._artifact, self._engine, self._latents, self._invert, self._stack = artifact, engine, latents_engine, invert, stack
        self._seed, self._batch_size, self._preprocessing = seed, batch_size, preprocessing
        self._runs = per_timestep(engine, artifact.sweep_table())

    @classmethod
    def from_artifact(
        cls,
        path: str | Path,
        engine: str = "ort",
        *,
        device: str | None = None,
        threads: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        preprocessing: str = "center",
    ) -> Extractor:
        """Open an artifact. Arguments and errors as for `difffeat.open_engine` and `RunRecipe`."""
        from difffeat.engines import Artifact, EngineOptions, open_engine

        artifact, options = Artifact.open(path), EngineOptions(batch=batch_size)
        opening: dict[str, Any] = {"device": device, "threads": threads, "options": options}
        with ExitStack() as stack:
            opened = stack.enter_context(open_engine(artifact, engine, **opening))
            latents = None
            if "pixels" not in opened.inputs and artifact.latents_graph is not None:
                latents = stack.enter_context(open_engine(artifact, engine, graph="latents", **opening))
            invert = open_inversion(artifact, stack, engine, **opening)
            return cls(artifact, opened, latents, invert, stack.pop_all(), seed=seed, batch_size=batch_size, preprocessing=preprocessing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of what is returned."""
        return self._engine.recipe.taps

    def __call__(self, inputs: Sequence[Any] | np.ndarray, ids: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Features by tap, float32 [n, ...], in the order of the inputs.

        **Arguments:** `inputs` images (paths, bytes, PIL images, uint8 arrays [H, W, 3], or what `Sample.image` is) or, for a text graph, captions;
        `ids` key the noise, default `0`, `1`, ...: give the ids of the store to get the store's features.

        Raises SampleError with its subclasses for a bad input: in memory nothing is set aside.
        """
        names = [str(i) for i in range(len(inputs))] if ids is None else list(ids)
        if len(names) != len(inputs):
            raise ConfigError(f"{len(inputs)} inputs but {len(names)} ids")
        parts = self._text_batches(inputs) if self._engine.recipe.takes_text else self._image_batches(inputs)
        out = {tap: np.empty((len(names), *shape), np.float32) for tap, shape in tap_shapes(self._engine).items()}
        with quiet_pillow():
            for rows, feeds in parts:
                for tap, values in self._run(feeds, [names[row] for row in rows]):
                    out[tap][rows] = values.reshape(len(rows), *out[tap].shape[1:])
        return out

    def _run(self, feeds: dict[str, np.ndarray], names: list[str]) -> Any:
        if self._latents is not None:
            feeds = self._latents.run(feeds)
        for t, parameters in self._runs:
            given = {**(feeds if self._invert is None else self._invert(feeds, t or 0.0)), **parameters}
            if "noise" in self._engine.inputs:
                given["noise"] = batch_noise(self._engine.inputs["noise"], feeds, names, seed=self._seed, t=t or 0.0, draw=0)
            for name, values in self._engine.run(given).items():
                yield (name if t is None else tap_name(int(name[1:]), t)), values

    def _image_batches(self, inputs: Sequence[Any] | np.ndarray) -> Any:
        if "pixels" not in (self._latents or self._engine).inputs:
            raise ConfigError(f"{self._artifact.path} takes latents and holds no VAE, so it cannot start from images. Export it with --vae.")
        side = int((self._latents or self._engine).inputs["pixels"].shape[1])
        for start in range(0, len(inputs), self._batch_size):
            rows = np.arange(start, min(start + self._batch_size, len(inputs)))
            yield rows, {"pixels": np.stack([self._pixels(inputs[int(row)], side) for row in rows])}

    def _pixels(self, image: Any, side: int) -> np.ndarray:
        if isinstance(image, str | Path):
            return decode(FileBlob("", str(image)).read(), side, self._preprocessing)
        if isinstance(image, bytes):
            return decode(image, side, self._preprocessing)
        if isinstance(image, Blob):
            return decode(image.read(), side, self._preprocessing)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ConfigError(f"an image array must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
            if image.shape[:2] == (side, side):
                return image
            from PIL import Image

            image = Image.fromarray(image)
        return preprocess(to_rgb(image), side, self._preprocessing)

    def _text_batches(self, inputs: Sequence[Any] | np.ndarray) -> Any:
        architecture = self._engine.recipe.architecture
        if self._artifact.tokenizer is None:
            raise ConfigError(f"{self._artifact.path} has lost its tokenizer.json. Export it again.")
        captions = Captions(
            self._artifact.tokenizer, max_length=architecture["max_length"], vocab=architecture["vocab"], protocol="joined", truncate=False
        )
        ids = [captions.encode(Sample(str(row), captions=(str(text),))) for row, text in enumerate(inputs)]
        for rows, length in batches_by_length(np.array([len(own) for own in ids]), self._batch_size, 8):
            tokens, lengths = pad_tokens([ids[row] for row in rows], len(rows), length)
            yield rows, {"tokens": tokens, "lengths": lengths}
