"""The recipe: everything that decides a feature's value, frozen, in two parts, with one fingerprint.

The *graph recipe* is set at export and travels in the ONNX metadata; the *run recipe* is set at extraction.
Their canonical JSON (sorted keys, no spaces, shortest round-trip floats) hashed with SHA-256 is the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from difffeat.errors import ConfigError, ForeignGraph

FORMAT = "difffeat-recipe/1"
METADATA_KEY = "difffeat.recipe"
ALIASES_KEY = "difffeat.aliases"

GRAPH_KINDS = ("image", "latents", "from-latents", "sweep", "text", "text-sweep")
NOISINGS = ("random", "constant", "mean", "ddim")
POOLINGS = ("mean", "max", "grid", "tokens")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
PIXELS = ("shown", "pillow", "strict")


def canonical_json(value: Any, between: str = ",") -> str:
    """`value` as JSON text that is the same for equal values: sorted keys, no spaces, no NaN; `between` items."""
    try:
        return json.dumps(value, sort_keys=True, separators=(between, ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"this cannot be part of a recipe: {error}") from error


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def format_timestep(t: float) -> str:
    """A timestep as it stands in a tap's name: `30`, `0`, `0.05`."""
    return str(int(t)) if float(t).is_integer() else repr(float(t))


def ddim_path(family: str, t: float, steps: int) -> tuple[float, ...]:
    """Timesteps of a deterministic inversion from 0 to t in `steps` equal steps, 0 first; DiT's are whole numbers, equal ones taken once.

    At t = 0 a DiT still takes one step, from the clean latent to the noise level of timestep 0; Plaid takes none.
    """
    if family == "dit":
        path = [float(round(t * index / steps)) for index in range(steps + 1)]
        return (0.0, 0.0) if t == 0 else tuple(dict.fromkeys(path))
    return tuple(t * index / steps for index in range(steps + 1)) if t else (0.0,)


def tap_name(block: int, t: float) -> str:
    """The name of a tap, as in `b12/t30`."""
    return f"b{block}/t{format_timestep(t)}"


def parse_tap(name: str) -> tuple[int, float]:
    """`b12/t30` -> (12, 30.0). Raises ConfigError when it is no tap."""
    block, _, t = name.partition("/")
    try:
        if not (block.startswith("b") and t.startswith("t")):
            raise ValueError
        parsed = int(block[1:]), float(t[1:])
        if parsed[0] < 0 or not math.isfinite(parsed[1]):
            raise ValueError
        return parsed
    except ValueError:
        raise ConfigError(f"{name!r} is no tap: write b<block>/t<timestep>, for example b12/t30 or b20/t0.05") from None


@dataclass(frozen=True, kw_only=True)
class GraphRecipe:
    """What an exported graph computes.

    **Fields:**

    - `backbone`: e.g. `dit-xl-2-256`; `family`: `dit` or `plaid`.
    - `architecture`: the numbers the backbone is built from (depth, width, heads, patch, ...); JSON scalars or lists.
    - `weights`: role (`backbone`, `vae`, `tokenizer`) -> SHA-256; equal tensors have equal digests whatever the file's layout.
    - `origin`: `file` or `random:<seed>` (weights drawn at random, for timing only).
    - `kind`: one of `GRAPH_KINDS`; `blocks`: taps asked for, ascending; `timesteps` with `log_snr` beside them.
    - `diffusion`: what the family takes for granted of the weights (schedule, prediction, time, latents, the null label), and under `assumed`
      what contradicted it where the caller knew better; empty in recipes of older exports, and then not part of the JSON.
    - `noising`, `noise_seed` (for `constant`), `pooling`, `label` (class label, DiT), `precision`, `calibration`.
    """

    backbone: str
    family: str
    architecture: Mapping[str, Any]
    weights: Mapping[str, str]
    kind: str
    blocks: tuple[int, ...]
    timesteps: tuple[float, ...]
    log_snr: tuple[float, ...]
    noising: str
    pooling: str = "mean"
    origin: str = "file"
    noise_seed: int | None = None
    label: int | None = None
    precision: str = "fp32"
    calibration: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, GRAPH_KINDS)
        _one_of("noising", self.noising, NOISINGS)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("precision", self.precision, PRECISIONS)
        for name in ("architecture", "weights", "options", "diffusion"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} must be a mapping, got {type(getattr(self, name)).__name__}")
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ConfigError(f"blocks must be ascending and distinct, got {list(self.blocks)}")
        if len(self.timesteps) != len(self.log_snr):
            raise ConfigError("every timestep needs its log-SNR")

    @property
    def noised_outside(self) -> bool:
        """Whether the graph takes latents that a denoiser has noised (ddim) or looked at (self-conditioning) already."""
        return self.noising == "ddim" or self.self_conditioned

    @property
    def takes_text(self) -> bool:
        """Whether the samples of the graph are captions."""
        return self.kind in ("text", "text-sweep")

    @property
    def self_conditioned(self) -> bool:
        """Whether a text graph is conditioned on the denoiser's first guess."""
        return bool(self.options.get("self_conditioning"))

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of all taps this graph can give, timestep-major; `latents` for a latents graph."""
        if self.kind == "latents":
            return ("latents",)
        return tuple(tap_name(block, t) for t in self.timesteps for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        if not values["diffusion"]:
            del values["diffusion"]  # recipes of older exports keep their digests
        return {"format": FORMAT, **json.loads(canonical_json(values))}

    def to_json(self) -> str:
        """Canonical JSON, as stored in the graph's metadata."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> GraphRecipe:
        """The inverse of `to_dict`. Raises ForeignGraph on anything else."""
        return _from_dict(cls, data)

    @classmethod
    def from_json(cls, text: str) -> GraphRecipe:
        """The inverse of `to_json`. Raises ForeignGraph on anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ForeignGraph(f"the recipe is not JSON ({error}). Export the graph again with difffeat export.") from None
        return cls.from_dict(data)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON."""
        return digest(self.to_dict())


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """What an extraction adds to the graph: seed and draws of the noise, preprocessing, captions, the store's type.

    `preprocessing`: `center` or `squash`; `captions`: `joined` (all, joined by a space) or `first`; `pixels` of image files: `shown` (as viewers show
    them), `pillow` (as `Image.open(...).convert("RGB")` gives them) or `strict` (as shown; CMYK and more than 8 bits are refused). It decides values
    and which rows are valid. A recipe that does not state it is of the time when all were strict; in text it has no meaning.
    """

    seed: int = 0
    draws: int = 1
    preprocessing: str = "center"
    captions: str = "joined"
    truncate: bool = False
    store_dtype: str = "fp16"
    pixels: str = "shown"

    def __post_init__(self) -> None:
        _one_of("preprocessing", self.preprocessing, ("center", "squash"))
        _one_of("captions", self.captions, ("joined", "first"))
        _one_of("store_dtype", self.store_dtype, ("fp16", "fp32"))
        _one_of("pixels", self.pixels, PIXELS)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2^63-1, got {self.seed}")
        if self.draws < 1:
            raise ConfigError(f"draws must be at least 1, got {self.draws}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        if self.pixels == "strict":
            del values["pixels"]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, data: Any) -> RunRecipe:
        """The inverse of `to_dict`. Raises ForeignGraph on anything else."""
        return _from_dict(cls, {"pixels": "strict", **data} if isinstance(data, dict) else data)


@dataclass(frozen=True)
class Recipe:
    """Both parts, and the fingerprint of the features they give."""

    graph: GraphRecipe
    run: RunRecipe

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        run = replace(self.run, pixels="strict") if self.graph.takes_text else self.run
        return {"graph": self.graph.to_dict(), "run": run.to_dict()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of both parts."""
        return digest(self.to_dict())


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _from_dict(cls: Any, data: Any) -> Any:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ForeignGraph(f"expected a recipe of format {FORMAT}, found {found!r}. Export the graph again with difffeat export.")
    known = {f.name for f in fields(cls)}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "format"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ForeignGraph(f"the recipe has fields this version does not know: {', '.join(unknown)}")
    try:
        recipe = cls(**values)
        recipe.to_dict()
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ForeignGraph(f"the recipe is incomplete or ill-formed: {error}") from None
    return recipe
