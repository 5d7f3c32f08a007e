"""Features in memory, in one line."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from difffeat.errors import ConfigError, DecodeError
from difffeat.recipe import RunRecipe, tap_name
from difffeat.runtime.batches import per_timestep, tap_shapes
from difffeat.runtime.blobs import Blob
from difffeat.runtime.feeds import batch_noise
from difffeat.runtime.inversion import open_inversion
from difffeat.runtime.pixels import to_rgb
from difffeat.runtime.places import blob_at
from difffeat.runtime.preprocess import decode, preprocess, quiet_pillow
from difffeat.runtime.samples import Sample
from difffeat.runtime.tokens import MOSTLY, Captions, batches_by_length, pad_tokens

if TYPE_CHECKING:
    from difffeat.engines import EngineOptions


class Extractor:
    """An open artifact that turns images or captions into features.

    with Extractor.from_artifact("artifacts/dit-xl-2-256-b12-t30") as extractor:
        features = extractor(["cat.jpg", "dog.jpg"])["b12/t30"]        # float32 [2, 1152]

    Noise is drawn from a digest of what the network is given: the preprocessed pixels of an image, the tokens of captions. So equal pictures have
    equal features to rounding, whatever their order, number, batch size and form: a path, a URL, the file's bytes, a PIL image opened from it, or its
    pixels as an array. A picture that was turned, scaled, or saved with loss in between is another one.
    """

    def __init__(
        self,
        artifact: Any,
        engine: Any,
        latents_engine: Any | None,
        invert: Any | None,
        stack: ExitStack,
        *,
        run: RunRecipe,
        batch_size: int,
    ) -> None:
        self._artifact, self._engine, self._latents, self._invert, self._stack = artifact, engine, latents_engine, invert, stack
        self._recipe, self._batch_size = run, batch_size
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
        captions: str = "joined",
        truncate: bool = False,
        pixels: str = "shown",
        options: EngineOptions | None = None,
    ) -> Extractor:
        """Open an artifact. Arguments and errors as for `difffeat.open_engine` and `RunRecipe`; `batch_size` at least 1.

        An engine that compiles for each shape (torch on a GPU, unless `options` say `compile=False`) is given batches of this size alone, and fewer
        inputs are padded: choose it small where single images come.
        """
        from difffeat.engines import Artifact, EngineOptions, open_engine

        run = RunRecipe(seed=seed, preprocessing=preprocessing, captions=captions, truncate=truncate, pixels=pixels)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not isinstance(options, EngineOptions | None):
            raise ConfigError(f"options must be EngineOptions, such as EngineOptions(compile=False), got {type(options).__name__}")
        artifact, options = Artifact.open(path), replace(options or EngineOptions(), batch=batch_size)
        opening: dict[str, Any] = {"device": device, "threads": threads, "options": options}
        with ExitStack() as stack:
            opened = stack.enter_context(open_engine(artifact, engine, **opening))
            latents = None
            if "pixels" not in opened.inputs and artifact.latents_graph is not None:
                latents = stack.enter_context(open_engine(artifact, engine, graph="latents", **opening))
            invert = open_inversion(artifact, stack, engine, **opening)
            return cls(artifact, opened, latents, invert, stack.pop_all(), run=run, batch_size=batch_size)

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

        **Arguments:** `inputs` images (paths, URLs, bytes, PIL images, uint8 arrays [H, W, 3], or what `Sample.image` is) or, for a text graph,
        captions: a string for each sample, or several, which are joined or of which the first is taken as `captions` says; `ids` key the noise
        (default: a digest of each input): give the ids of the store to get the store's features.

        Warns where most tokens are unknown to the tokenizer. Raises SampleError with its subclasses for a bad input (in memory nothing is set aside),
        ConfigError for what is no image or caption at all.
        """
        if isinstance(inputs, str | bytes | bytearray | Path) or not hasattr(inputs, "__len__"):
            raise ConfigError(f"inputs must be a list, one entry a sample; got a single {type(inputs).__name__}. Put it in a list.")
        names = None if ids is None else list(ids)
        if isinstance(ids, str) or any(not isinstance(name, str) for name in names or ()):
            raise ConfigError("ids must be a list of strings, one a sample, as Store.ids gives them")
        if names is not None and len(names) != len(inputs):
            raise ConfigError(f"{len(inputs)} inputs but {len(names)} ids")
        parts = self._text_batches(inputs) if self._engine.recipe.takes_text else self._image_batches(inputs)
        out = {tap: np.empty((len(inputs), *shape), np.float32) for tap, shape in tap_shapes(self._engine).items()}
        with quiet_pillow():
            for rows, feeds in parts:
                for tap, values in self._run(feeds, _content_names(feeds, len(rows)) if names is None else [names[row] for row in rows]):
                    out[tap][rows] = values[: len(rows)].reshape(len(rows), *out[tap].shape[1:])
        return out

    def _run(self, feeds: dict[str, np.ndarray], names: list[str]) -> Any:
        if self._latents is not None:
            feeds = self._latents.run(feeds)
        for t, parameters in self._runs:
            given = {**(feeds if self._invert is None else self._invert(feeds, t or 0.0)), **parameters}
            if "noise" in self._engine.inputs:
                given["noise"] = batch_noise(self._engine.inputs["noise"], feeds, names, seed=self._recipe.seed, t=t or 0.0, draw=0)
            for name, values in self._engine.run(given).items():
                yield (name if t is None else tap_name(int(name[1:]), t)), values

    def _image_batches(self, inputs: Sequence[Any] | np.ndarray) -> Any:
        if "pixels" not in (self._latents or self._engine).inputs:
            raise ConfigError(f"{self._artifact.path} takes latents and holds no VAE, so it cannot start from images. Export it with --vae.")
        side = int((self._latents or self._engine).inputs["pixels"].shape[1])
        for start in range(0, len(inputs), self._batch_size):
            rows = np.arange(start, min(start + self._batch_size, len(inputs)))
            pixels = np.zeros((self._rows(len(rows)), side, side, 3), np.uint8)
            for place, row in enumerate(rows):
                pixels[place] = self._pixels(inputs[int(row)], side)
            yield rows, {"pixels": pixels}

    def _rows(self, count: int) -> int:
        """Rows of a batch that holds so many inputs."""
        return self._batch_size if (self._latents or self._engine).static_shapes else count

    def _pixels(self, image: Any, side: int) -> np.ndarray:
        preprocessing = self._recipe.preprocessing
        if isinstance(image, str | Path):
            image = blob_at("", str(image))
        if isinstance(image, bytes | bytearray | memoryview | Blob):
            return decode(image.read() if isinstance(image, Blob) else bytes(image), side, preprocessing, self._recipe.pixels)
        if isinstance(image, np.ndarray) and _checked(image).shape[:2] == (side, side):
            return image
        return preprocess(to_rgb(_loaded(image), self._recipe.pixels), side, preprocessing)

    def _text_batches(self, inputs: Sequence[Any] | np.ndarray) -> Any:
        architecture = self._engine.recipe.architecture
        if self._artifact.tokenizer is None:
            raise ConfigError(f"{self._artifact.path} has lost its tokenizer.json. Export it again.")
        run = self._recipe
        captions = Captions(
            self._artifact.tokenizer, max_length=architecture["max_length"], vocab=architecture["vocab"], protocol=run.captions, truncate=run.truncate
        )
        counted = [captions.encode_counted(Sample(str(row), captions=_captions(own, row))) for row, own in enumerate(inputs)]
        ids = [own for own, _ in counted]
        _warn_of_unknown(sum(map(len, ids)), sum(unknown for _, unknown in counted))
        for rows, length in batches_by_length(np.array([len(own) for own in ids]), self._batch_size, 8):
            tokens, lengths = pad_tokens([ids[row] for row in rows], self._rows(len(rows)), length)
            yield rows, {"tokens": tokens, "lengths": lengths}


def _content_names(feeds: dict[str, np.ndarray], count: int) -> list[str]:
    """A name for each of the first inputs of a batch, made of what the network is given of it, without padding."""
    if "tokens" in feeds:
        contents = [feeds["tokens"][row, : feeds["lengths"][row]].astype("<i8").tobytes() for row in range(count)]
    else:
        contents = [feeds["pixels"][row].tobytes() for row in range(count)]
    return [f"content:{hashlib.sha256(content).hexdigest()}" for content in contents]


def _warn_of_unknown(tokens: int, unknown: int) -> None:
    if unknown > MOSTLY * tokens:
        warnings.warn(
            f"{unknown} of {tokens} tokens are unknown to this artifact's tokenizer, so these features hardly depend on the captions", stacklevel=4
        )


def _captions(own: Any, row: int) -> tuple[str, ...]:
    """The captions of an input. Raises ConfigError for what is neither a string nor several."""
    texts: tuple[Any, ...] = (None,)
    if isinstance(own, str):
        texts = (own,)
    elif isinstance(own, Sequence | np.ndarray) and not isinstance(own, bytes | bytearray | memoryview):
        texts = tuple(own)
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"input {row} is no caption: a string is needed, or a list of strings, got {type(own).__name__}. Decode bytes first.")
    return texts


def _checked(image: np.ndarray) -> np.ndarray:
    """An array of pixels. Raises ConfigError for another type or number of axes, DecodeError where there is no pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ConfigError(f"an image array must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if image.size == 0:
        raise DecodeError(f"the image has no pixels: its shape is {list(image.shape)}")
    return image


def _loaded(image: Any) -> Any:
    """A PIL image, its pixels decoded. Raises ConfigError for what is no image, DecodeError for one that is damaged or has no pixels."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ConfigError(f"an image must be a path, bytes, a PIL image or an array, got {type(image).__name__}")
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DecodeError(f"the image is damaged or truncated ({error}). Open it again from a whole file.") from None
    if 0 in image.size:
        raise DecodeError("the image has no pixels")
    return image
