# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""From modules to the ONNX graphs of an artifact: stable names, reproducible bytes, the recipe inside.

The small modules here are the graphs' outer shells: what is an input, what is baked in. Input and output names are stable API.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difffeat.errors import GraphError
from difffeat.export.folded import DiTTrunk, PlaidTrunk
from difffeat.export.layers import Affine, Scale, set_form
from difffeat.export.plaid import NORM_EPS
from difffeat.export.vae import VaeEncoder
from difffeat.recipe import ALIASES_KEY, METADATA_KEY, GraphRecipe, canonical_json

OPSET = 22


class Noising(nn.Module):
    """z_t = α·z + σ·ε with α, σ constant. ε is an input (`random`), baked in (`constant`), or absent (`mean`)."""

    def __init__(self, alpha: float, sigma: float, constant: Tensor | None = None) -> None:
        super().__init__()
        self.alpha, self.sigma = alpha, sigma
        # σ·ε and not ε: the exporter would multiply the two constants itself, and the parameter would be gone from the graph.
        self.scaled = None if constant is None else nn.Parameter((sigma * constant.double()).float(), requires_grad=False)

    def forward(self, z: Tensor, noise: Tensor | None) -> Tensor:
        if noise is not None:
            return self.alpha * z + self.sigma * noise
        return self.alpha * z if self.scaled is None else self.alpha * z + self.scaled


class LatentsGraph(nn.Module):
    """pixels -> latents."""

    def __init__(self, encoder: VaeEncoder) -> None:
        super().__init__()
        self.vae = encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.vae(pixels),)


class FromLatentsGraph(nn.Module):
    """latents (+ noise) -> taps."""

    def __init__(self, trunk: DiTTrunk, noising: Noising) -> None:
        super().__init__()
        self.noising, self.trunk = noising, trunk

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.trunk(self.noising(latents, noise))


class ImageGraph(nn.Module):
    """pixels (+ noise) -> taps."""

    def __init__(self, encoder: VaeEncoder, trunk: DiTTrunk, noising: Noising) -> None:
        super().__init__()
        self.vae, self.noising, self.trunk = encoder, noising, trunk

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.trunk(self.noising(self.vae(pixels), noise))


class SweepGraph(nn.Module):
    """latents, noise, alpha, sigma, modulation -> every tap of one timestep."""

    def __init__(self, trunk: DiTTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        return self.trunk(alpha * latents + sigma * noise, modulation)


class MeanSweepGraph(SweepGraph):
    """latents, alpha, modulation -> every tap of one timestep, without noise."""

    def forward(self, latents: Tensor, alpha: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.trunk(alpha * latents, modulation)


class TextGraph(nn.Module):
    """tokens, lengths (+ noise) -> taps."""

    def __init__(self, trunk: PlaidTrunk, noising: Noising) -> None:
        super().__init__()
        self.noising, self.trunk = noising, trunk

    def forward(self, tokens: Tensor, lengths: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.trunk(self.noising(F.embedding(tokens, self.trunk.embeddings), noise), lengths)


class TextSweepGraph(nn.Module):
    """tokens, lengths, noise, alpha, sigma, input_scale, gamma_embedding -> every tap of one timestep."""

    def __init__(self, trunk: PlaidTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, tokens: Tensor, lengths: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, input_scale: Tensor, gamma_embedding: Tensor
    ) -> tuple[Tensor, ...]:
        z = alpha * F.embedding(tokens, self.trunk.embeddings) + sigma * noise
        return self.trunk(z * input_scale, lengths, gamma_embedding)


class MeanTextSweepGraph(TextSweepGraph):
    """tokens, lengths, alpha, input_scale, gamma_embedding -> every tap of one timestep, without noise."""

    def forward(self, tokens: Tensor, lengths: Tensor, alpha: Tensor, input_scale: Tensor, gamma_embedding: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.trunk(alpha * F.embedding(tokens, self.trunk.embeddings) * input_scale, lengths, gamma_embedding)


class GivenGraph(nn.Module):
    """latents, noised already -> taps."""

    def __init__(self, trunk: DiTTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return self.trunk(latents)


class GivenSweepGraph(GivenGraph):
    """latents, noised already, modulation -> every tap of one timestep."""

    def forward(self, latents: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.trunk(latents, modulation)


class GivenTextGraph(nn.Module):
    """latents [B, S, E], noised already, lengths -> taps."""

    def __init__(self, trunk: PlaidTrunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, latents: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        return self.trunk(latents, lengths)


class ConditionedTextGraph(GivenTextGraph):
    """latents, lengths, selfcond (the denoiser's first guess) -> taps."""

    def forward(self, latents: Tensor, lengths: Tensor, selfcond: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.trunk(latents, lengths, None, selfcond)


class GivenTextSweepGraph(GivenTextGraph):
    """latents, lengths, input_scale, gamma_embedding -> every tap of one timestep."""

    def forward(self, latents: Tensor, lengths: Tensor, input_scale: Tensor, gamma_embedding: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.trunk(latents * input_scale, lengths, gamma_embedding)


class ConditionedTextSweepGraph(GivenTextGraph):
    """latents, lengths, input_scale, gamma_embedding, selfcond -> every tap of one timestep."""

    def forward(  # type: ignore[override]
        self, latents: Tensor, lengths: Tensor, input_scale: Tensor, gamma_embedding: Tensor, selfcond: Tensor
    ) -> tuple[Tensor, ...]:
        return self.trunk(latents * input_scale, lengths, gamma_embedding, selfcond)


GIVEN_TEXT = {
    (False, False): GivenTextGraph,
    (False, True): ConditionedTextGraph,
    (True, False): GivenTextSweepGraph,
    (True, True): ConditionedTextSweepGraph,
}
"""(swept, self-conditioned) -> the graph of a text backbone whose latents are noised outside."""


class DiTDenoiserGraph(nn.Module):
    """latents, modulation [L, 6, D], final_modulation [2, D] (shift, 1 + scale) -> epsilon [B, C, S, S], the predicted noise.

    The variance that the network predicts too is left out.
    """

    def __init__(self, trunk: DiTTrunk, patch: int, channels: int) -> None:
        super().__init__()
        self.trunk, self.patch, self.channels = trunk, patch, channels
        width = trunk.pos_embed.shape[-1]
        self.final = Affine(width, patch * patch * channels)

    def forward(self, latents: Tensor, modulation: Tensor, final_modulation: Tensor) -> tuple[Tensor, ...]:
        (x_BND,) = self.trunk(latents, modulation)
        x_BND = F.layer_norm(x_BND, (x_BND.shape[-1],), final_modulation[1], final_modulation[0], eps=1e-6)
        side, patch = latents.shape[-1] // self.patch, self.patch
        y = self.final(x_BND).reshape(-1, side, side, patch, patch, self.channels).permute(0, 5, 1, 3, 2, 4)
        return (y.reshape(-1, self.channels, side * patch, side * patch),)


class PlaidDenoiserGraph(nn.Module):
    """latents, lengths, input_scale, gamma_embedding, prior (α/σ²), selfcond -> denoised [B, S, E], the expected clean embedding.

    softmax(W·LN(x) + b + prior·z·Eᵀ)·E; the norm's weight holds the division by the width multiplier.
    """

    def __init__(self, trunk: PlaidTrunk, vocab: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = Scale(trunk.blocks[0].width, shift=False)
        self.head = Affine(trunk.blocks[0].width, vocab)

    def forward(
        self, latents: Tensor, lengths: Tensor, input_scale: Tensor, gamma_embedding: Tensor, prior: Tensor, selfcond: Tensor
    ) -> tuple[Tensor, ...]:
        *_, x = self.trunk.residual_stream(latents * input_scale, self.trunk.mask(latents, lengths), gamma_embedding, selfcond)
        x = F.layer_norm(x, (x.shape[-1],), self.norm.weight, None, eps=NORM_EPS)
        logits = self.head(x) + prior * (latents @ self.trunk.embeddings.T)
        return (logits.softmax(dim=-1) @ self.trunk.embeddings,)


@dataclass(frozen=True)
class GraphSpec:
    """A module with what its export needs.

    **Fields:** `module`; `feeds` example inputs by name, in the order of `forward`; `dynamic` input name -> {axis: name}; `outputs` names.
    """

    module: nn.Module
    feeds: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: Sequence[str]


def write_graph(spec: GraphSpec, path: Path, recipe: GraphRecipe | None) -> None:
    """Export to `path` with weights in `<path>_data`; opset 22; the recipe in the metadata.

    The exporter writes stack traces with this machine's paths into the nodes; they go, so that the same weights and versions give the same bytes.
    """
    program = _exported(spec)
    model = program.model
    strip(model)
    model.metadata_props[ALIASES_KEY] = canonical_json(aliases(spec.module, model))
    if recipe is not None:
        model.metadata_props[METADATA_KEY] = recipe.to_json()
    import onnx_ir

    onnx_ir.save(model, path, external_data=f"{path.name}_data", size_threshold_bytes=1024)


def aliases(module: nn.Module, model: Any) -> dict[str, str]:
    """Parameters that the exporter left out because an equal one is there already: their name -> its name."""
    state, kept = module.state_dict(), model.graph.initializers
    found: dict[str, str] = {}
    for name in state.keys() - kept.keys():
        equals = [other for other in state.keys() & kept.keys() if state[other].shape == state[name].shape and torch.equal(state[other], state[name])]
        if not equals:
            raise GraphError(f"the exporter lost the parameter {name}; this is a bug of difffeat with this version of torch ({torch.__version__})")
        found[name] = min(equals)
    return found


def strip(model: Any) -> None:
    """Remove everything that depends on the machine or the run: stack traces, name scopes, doc strings."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _exported(spec: GraphSpec) -> Any:
    """torch.export and the conversion, quietly; what the exporter says is kept for the error message."""
    axes = {name: torch.export.Dim(name, max=65536) for per_input in spec.dynamic.values() for name in per_input.values()}
    shapes = {name: {axis: axes[label] for axis, label in spec.dynamic.get(name, {}).items()} for name in spec.feeds}
    with quietly() as spoken, _plainly(spec.module) as module:
        program = torch.onnx.export(
            module,
            args=(),
            kwargs=dict(spec.feeds),
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=list(spec.feeds),
            output_names=list(spec.outputs),
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise GraphError(f"torch.onnx.export returned nothing: {spoken.getvalue()}")
    return program


@contextlib.contextmanager
def _plainly(module: nn.Module) -> Iterator[nn.Module]:
    """Products in the form that graphs are exported in."""
    set_form(module, "plain")
    try:
        yield module.eval()
    finally:
        set_form(module, "host")


@contextlib.contextmanager
def quietly() -> Iterator[io.StringIO]:
    """Without gradients, and with what the exporter says kept for an error's message: it and onnxscript's optimiser report every step."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    spoken = io.StringIO()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken), torch.no_grad():
            warnings.simplefilter("ignore")
            yield spoken
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
