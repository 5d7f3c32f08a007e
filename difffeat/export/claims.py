"""What is said about a network beside its tensors, and whether it is true of them.

SiT, REPA and DiT trained with another schedule have DiT's names and shapes; only what stands around the weights tells them apart: settings saved with
them, names of files and folders, configs, the scheduler's config, and what the caller asks for. Each function returns contradictions in words.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

DIT_TRAINING = "noise prediction, linear β from 0.0001 to 0.02 in 1000 steps"
DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel", "DiTPipeline", "DiT")
PATCHES, SIDES = (1, 2, 4, 8, 16), (64, 128, 256, 384, 512, 768, 1024)

_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"sit(?:[-_ ]?(?:xxl|xl|s|b|l|h|g))?", "SiT (flow matching, velocity)"),
    (r"i?repa(?:[-_ ]?e)?", "REPA (flow matching, velocity)"),
    (r"self[-_ ]?flow", "Self-Flow (flow matching)"),
    (r"light(?:ning)?[-_ ]?dit", "LightningDiT (flow matching, another autoencoder)"),
    (r"mean[-_ ]?flows?|re[-_ ]?flow|rectified[-_ ]?flows?|flow[-_ ]?match(?:ing)?|velocity", "a flow-matching network"),
    (r"flow[-_ ]?dcn|decoupled[-_ ]?dit|ddt", "DDT"),
    (r"mask[-_ ]?dit|mdt(?:v\d)?", "a masked DiT"),
    (r"pix[-_ ]?art\w*", "PixArt"),
    (r"hunyuan[-_ ]?\w*|hy[-_ ]?dit", "HunyuanDiT"),
    (r"mm[-_ ]?dit|sd[-_ ]?3\w*|stable[-_ ]?diffusion[-_ ]?3\w*", "Stable Diffusion 3"),
    (r"sd[-_ ]?xl\w*|sd[-_ ]?v?(?:1|2)[-_ .]?\d|stable[-_ ]?diffusion[-_ ]?(?:v?\d|xl)\w*", "Stable Diffusion 1, 2 or XL"),
    (r"flux\w*", "FLUX"),
    (r"sana\w*", "Sana"),
    (r"lumina\w*|latte|u[-_ ]?vit|u[-_ ]?dit|edm\d?|vdm|fit(?:v\d)?[-_ ](?:xl|b|l)", "another diffusion network"),
    (r"va[-_ ]?vae|vavae\w*", "a network on VA-VAE's latents"),
    (r"mdlm|sedd|llada|d3pm|bd3lm?", "a masked text diffusion"),
    (r"plaid[-_ ]?\w*", "Plaid (text)"),
    (r"unet\w*|control[-_ ]?net\w*", "a UNet"),
    (r"dit(?:[-_ ]?(?:xxl|xl|s|b|l|h|g))?", "DiT"),
)
_SIZE = re.compile(r"(?<![a-z])dit[-_ ]?(xxl|xl|s|b|l|h|g)(?:[-_/ ]?(1|2|4|8|16))?(?![a-z0-9])", re.I)
_SETTLED = {  # a setting's last name -> the values that DiT has
    "prediction": ("epsilon", "eps", "noise"), "prediction_type": ("epsilon", "eps", "noise"), "pred_type": ("epsilon", "eps", "noise"),
    "parameterization": ("eps", "epsilon"), "objective": ("pred_noise", "epsilon", "eps", "noise", "mse"), "target": None, "loss_target": None,
    "noise_schedule": ("linear",), "beta_schedule": ("linear",), "schedule_name": ("linear",), "schedule": None,
    "diffusion_steps": (1000,), "num_train_timesteps": (1000,), "beta_start": (0.0001,), "beta_end": (0.02,),
    "predict_xstart": (False,), "predict_v": (False,), "v_pred": (False,), "v_prediction": (False,), "rescale_betas_zero_snr": (False,),
    "zero_terminal_snr": (False,), "enforce_zero_terminal_snr": (False,), "flow": (False,), "use_flow": (False,), "rectified_flow": (False,),
    "flow_matching": (False,), "use_flow_sigmas": (False,),
    "norm_type": ("ada_norm_zero",), "activation_fn": ("gelu-approximate",), "cross_attention_dim": (), "caption_channels": (), "caption_dim": (),
    "qk_norm": (False, "", "none", "None"), "use_rope": (False,), "use_swiglu": (False,), "use_rmsnorm": (False,), "wo_shift": (False,),
}  # fmt: skip
_FLOW_ONLY = (
    "path_type",
    "sample_eps",
    "train_eps",
    "enc_type",
    "proj_coeff",
    "projector_dim",
    "flow_shift",
    "time_dist_shift",
    "use_dynamic_shifting",
)
_SPELT = re.compile(r"(?<![a-z])(path[_-]type|prediction(_type)?)['\"]?\s*[=: ]\s*['\"]?(linear|gvp|vp|velocity|v_prediction|v|score)(?![a-z])", re.I)
_OTHER_PART = re.compile(
    r"(^|[._])(vae|first_stage\w*|autoencoder|ddconfig|cond_stage\w*|text\w*|discriminator|lossconfig|ema_config|trainer|logger)[._]", re.I
)
_NAMES = frozenset(
    {
        "model",
        "arch",
        "architecture",
        "architectures",
        "model_name",
        "model_type",
        "backbone",
        "class_name",
        "_class_name",
        "_target_",
        "net",
        "network",
        "method",
        "framework",
        "algorithm",
        "transport",
        "exp_name",
        "experiment_name",
        "base_model",
        "title",
        "transformer",
        "scheduler",
        "vae",
        "vae_type",
        "vae_model",
        "autoencoder",
    }
)
_COUNTS = {
    "num_layers": "depth", "depth": "depth", "n_layers": "depth", "num_blocks": "depth",
    "hidden_size": "width", "hidden_dim": "width", "embed_dim": "width", "d_model": "width",
    "patch_size": "patch", "in_channels": "in_channels", "latent_channels": "in_channels", "out_channels": "out_channels",
    "sample_size": "input_size", "latent_size": "input_size", "input_size": "input_size",
    "num_classes": "num_classes", "num_embeds_ada_norm": "num_classes", "class_num": "num_classes",
    "image_size": "pixels", "resolution": "pixels", "img_size": "pixels", "image_resolution": "pixels",
    "mlp_ratio": "mlp_ratio", "num_attention_heads": "heads", "num_heads": "heads", "n_heads": "heads",
}  # fmt: skip


def families_in(text: str) -> list[tuple[str, str]]:
    """Families of networks that a name speaks of: (the word in it, the family)."""
    found = []
    for pattern, family in _FAMILIES:
        match = re.search(rf"(?<![a-z])(?:{pattern})(?![a-z])", text, re.I)
        if match and not any(match[0].lower() in word.lower() and family == "DiT" for word, _ in found):
            found.append((match[0], family))
    return found


def speaking_names(place: Path, said: str) -> list[str]:
    """Names of a file or folder that say something of it: its own, those of the run's folder above it, and the hub id as it was given."""
    resolved, target = Path(os.path.abspath(place)), place.resolve()  # not through links first: the hub's cache links to digests
    parents = [resolved.parent] if resolved.parent != resolved else []
    if parents and re.fullmatch(r"checkpoints?|ckpts?|weights|models?|transformer|ema|snapshots|[0-9a-f]{40}", parents[0].name, re.I):
        parents.append(parents[0].parent)
    if len(parents) > 1 and parents[1].name == "snapshots":
        parents.append(parents[1].parent)
    names = [resolved.stem if place.suffix in _SUFFIXES else resolved.name, *(parent.name for parent in parents)]
    if target.name != resolved.name:
        names.insert(1, target.stem if target.suffix in _SUFFIXES else target.name)
    return list(dict.fromkeys(name for name in (*names, "" if Path(said).is_absolute() or place.exists() else said) if name))


_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def name_contradictions(names: Iterable[str], own: str, config: Any | None) -> Iterator[str]:
    """What names say against `own` (the family) and against the geometry, the nearest first: a name that agrees speaks for those further away."""
    family_said = side_said = size_said = False
    for index, name in enumerate(names):
        families = families_in(name)
        others = [(word, family) for word, family in families if not family.lower().startswith(own)]
        agrees = len(others) < len(families)
        if others and not family_said and not (agrees and index):
            yield f"the name {name!r} speaks of {others[0][1]} ({others[0][0]!r})"
        family_said = family_said or bool(families)
        if config is None or own != "dit":
            continue
        if not side_said and (sides := _sides(name, bool(families))):
            side_said = True
            yield from _other_side(f"the name {name!r}", sides, config)
        if not size_said and _SIZE.search(name):
            size_said = True
            yield from size_contradictions(f"the name {name!r}", name, config)


def _sides(name: str, about: bool) -> set[int]:
    """Sides in pixels that a name states: `256x256`, or `256` in a name about a network."""
    squares = {int(a) for a, b in re.findall(r"(?<!\d)(\d{2,4})[x×](\d{2,4})(?!\d)", name) if a == b}
    if squares or not (about or re.search(r"imagenet|px|res", name, re.I)):
        return squares
    words = re.findall(r"(?:([a-z]+)[-_]?)?(?<!\d)(\d{2,4})(?:px|p)?(?![\d])", name, re.I)
    counted = ("bs", "batch", "step", "steps", "ep", "epoch", "epochs", "iter", "iters", "dim", "w", "h", "d", "seed", "k", "cfg", "width", "hidden")
    return {int(number) for word, number in words if int(number) in SIDES and word.lower() not in counted and not number.startswith("0")}


def _other_side(who: str, sides: set[int], config: Any) -> Iterator[str]:
    pixels = config.input_size * 8
    if pixels not in sides and config.input_size not in sides:
        stated = ", ".join(map(str, sorted(sides)))
        yield f"{who} says {stated} pixels, but the positions are of {config.input_size} × {config.input_size} latents, {pixels} pixels"


def size_contradictions(who: str, text: str, config: Any) -> Iterator[str]:
    """What a name such as DiT-B/4 says against the geometry. Of a geometry that was never published it says nothing: sizes are edited."""
    from difffeat.export.dit_config import SIZES

    match = _SIZE.search(text)
    known = SIZES.get(match[1].lower()) if match else None
    if match is None or known is None or (config.depth, config.width) not in {(depth, width) for depth, width, _ in SIZES.values()}:
        return
    if known[:2] != (config.depth, config.width):
        yield f"{who} speaks of {match[0]} ({known[0]} blocks of {known[1]}), but the tensors are {config.depth} blocks of {config.width}"
    elif match[2] and int(match[2]) != config.patch:
        yield f"{who} speaks of patches of {match[2]}, but the tensors have patches of {config.patch}"


def size_notes(facts: Mapping[str, Any], config: Any) -> Iterator[str]:
    """What names of sizes say against a geometry that was never published: said, and the tensors believed."""
    from difffeat.export.dit_config import SIZES

    if config.num_classes == 999:
        yield (
            "the table of labels has 1000 rows: if they are ImageNet's 1000 classes, there is no null label, and 999, which is taken for it, is "
            "a class; pass --label"
        )
    if (config.depth, config.width) in {(depth, width) for depth, width, _ in SIZES.values()}:
        return
    for key, value in facts.items():
        match = _SIZE.search(value) if isinstance(value, str) and _last(key) in _NAMES else None
        if match and match[1].lower() in SIZES:
            depth, width, _ = SIZES[match[1].lower()]
            yield f"{key} = {value!r} is published as {depth} blocks of {width}; the tensors are {config.depth} of {config.width}, and are believed"


def setting_contradictions(facts: Mapping[str, Any], config: Any) -> Iterator[str]:
    """What settings saved with, or lying beside, the weights say against DiT's training and the geometry."""
    for key, value in facts.items():
        last = _last(key)
        if _OTHER_PART.search(key):
            continue
        if last in _FLOW_ONLY:
            if value not in (None, False, "None", "none", ""):
                yield f"{key} = {value!r} is a setting of SiT and REPA (flow matching), which DiT does not have"
        elif last == "learn_sigma":
            if isinstance(value, bool) and value != (config.out_channels == 2 * config.in_channels):
                yield f"{key} = {value!r}, but the last layer gives {config.out_channels} channels for {config.in_channels}"
        elif last in _SETTLED:
            yield from _settled(key, value, _SETTLED[last])
        elif last in _COUNTS:
            yield from _counted(key, value, _COUNTS[last], config)
        if isinstance(value, str) and (match := _SPELT.search(value)):
            yield f"{key} says {match[0]!r}, a setting of SiT and REPA (flow matching), which DiT does not have"
        if last in _NAMES and isinstance(value, str):
            others = [(word, family) for word, family in families_in(value) if family != "DiT"]
            if others:
                yield f"{key} = {value!r} speaks of {others[0][1]}"
            yield from size_contradictions(f"{key} = {value!r}", value, config)
            if last == "_class_name" and not others and value not in DIT_CLASSES and not value.endswith("Scheduler"):
                yield f"{key} = {value!r} is not DiT's class (DiTTransformer2DModel)"
            if last == "_class_name" and re.search("FlowMatch|EDM|VPSDE|SdeVe|LCM|RectifiedFlow", value):
                yield f"{key} = {value!r} is not a scheduler of DiT's noise"


def _settled(key: str, value: Any, allowed: tuple[Any, ...] | None) -> Iterator[str]:
    if value is None:
        return
    if allowed is None:  # a word of many meanings: only what it says of flows counts
        if isinstance(value, str) and (found := families_in(value)) and found[0][1] != "DiT":
            yield f"{key} = {value!r} speaks of {found[0][1]}"
        return
    words = tuple(item.lower() if isinstance(item, str) else item for item in allowed)
    given = value.lower() if isinstance(value, str) else value
    if given not in words and not (isinstance(given, int | float) and any(isinstance(w, int | float) and math.isclose(w, given) for w in words)):
        yield f"{key} = {value!r}, where DiT has {' or '.join(map(repr, allowed[:1])) or 'none'} ({DIT_TRAINING})"


def _counted(key: str, value: Any, name: str, config: Any) -> Iterator[str]:
    number = _whole(value)
    if number is None:
        return
    if name == "pixels":
        if number not in (config.input_size * 8, config.input_size):
            yield from _other_side(f"{key} = {value!r}", {number}, config)
        return
    if name in ("input_size", "out_channels") and number in (config.input_size, config.input_size * 8, config.out_channels, config.out_channels // 2):
        return  # some name pixels or latents, with or without the variance
    found = getattr(config, name)
    if number != found and not (name == "num_classes" and number == found + 1 and "embeds" not in key):
        more = " (and a null label)" if name == "num_classes" else ""
        yield f"{key} = {value!r}, but the tensors have {found}{more}"
    elif name == "num_classes" and number == found + 1:
        yield f"{key} = {value!r}, and the table of labels has {number} rows: trained without label dropout, there is no null label"


def stated_heads(facts: Mapping[str, Any]) -> tuple[str, int] | None:
    """How many heads the settings state: (where, number)."""
    for key, value in facts.items():
        if _last(key) in ("num_attention_heads", "num_heads", "n_heads") and (number := _whole(value)) is not None:
            return key, number
    return None


def output_contradictions(config: Any, names: Iterable[str]) -> Iterator[str]:
    """What the tensors themselves say: other outputs than noise and variance, projectors of REPA."""
    if config.out_channels == config.in_channels:
        rows = config.patch**2 * config.out_channels
        yield (
            f"final_layer.linear has {rows} rows where DiT has {2 * rows}: it predicts no variance (learn_sigma), as SiT and REPA of 512 pixels and "
            "others do not"
        )
    elif config.out_channels != 2 * config.in_channels:
        yield f"the last layer gives {config.out_channels} channels for {config.in_channels}, where DiT gives noise and variance, twice as many"
    if extra := sorted(name for name in names if re.match(r"(.*\.)?(projectors?|repa_\w+|proj_heads?)\.", name)):
        yield f"the file has {extra[0]}, a projector of REPA or Self-Flow (flow matching)"


def model_contradictions(model: str, config: Any) -> Iterator[str]:
    """What --model says against the geometry."""
    from difffeat.export.dit_config import DIT_CONFIGS

    asked = DIT_CONFIGS.get(model)
    match = re.fullmatch(r"dit-(\d{1,4})x(\d{1,5})-(\d{1,2})-(\d{1,5})", model)
    if asked is not None:
        geometry = asked.depth, asked.width, asked.patch, asked.input_size * 8
    elif match:
        geometry = tuple(map(int, match.groups()))
    else:
        return
    found = config.depth, config.width, config.patch, config.input_size * 8
    if geometry != found:
        words = "{} blocks of {}, patches of {}, {} pixels"
        yield f"--model {model} means {words.format(*geometry)}, but the weights are {config.name}: {words.format(*found)}"


def _last(key: str) -> str:
    parts = [part for part in key.split(".") if not part.isdigit()]
    return parts[-1].lower().replace("-", "_") if parts else key


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12 else None
