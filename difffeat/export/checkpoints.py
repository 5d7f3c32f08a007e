"""From what a training script saved to one state dict: out of nested dicts, wrappers' prefixes taken off, averaged weights before raw ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch
from difffeat.export.pickles import Array, Record

WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_forward_module.", "_ddp_module.")
"""What PyTorch's wrappers put into names, at any depth."""
_NO_WEIGHTS = re.compile(r"(opt(im\w*)?\d*|optimizers?(_states?)?|optim_\w+|lr_schedulers?|schedulers?|sched|scaler|callbacks|loops|rng\w*)", re.I)
_EMA = re.compile(r"(?<![a-z])ema(?![a-z])|averaged", re.I)
_NO_EMA = re.compile(r"(?<![a-z])(no|non|without)[-_ ]?ema(?![a-z])", re.I)
_DEPTH, _FACTS = 5, 4000


@dataclass(frozen=True)
class Checkpoint:
    """One state dict of a file.

    **Fields:** `tensors`; `place` where it lies in the file (`ema`, `state_dict / model.`; empty at the top); `averaged` whether that place says EMA;
    `others` places of other copies of the network; `names` all tensors' names in the file; `facts` the plain values that the file holds
    beside tensors, by dotted name; `notes` what a user should know.
    """

    tensors: dict[str, Tensor]
    place: str = ""
    averaged: bool = False
    others: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    path: tuple[str, ...]
    prefix: str
    tensors: dict[str, Any]

    @property
    def place(self) -> str:
        return " / ".join([*self.path, *([self.prefix] if self.prefix else [])])

    @property
    def averaged(self) -> bool:
        return bool(_EMA.search(self.place)) and not _NO_EMA.search(self.place)


def choose_state(loaded: Any, what: str, markers: Sequence[str]) -> Checkpoint:
    """The state dict among all that a file holds.

    **Arguments:** `markers` names, one of which every state dict of the family has: where such a name ends, its prefix is known.

    Raises CheckpointMismatch where there is none, or several between which nothing chooses.
    """
    states = list(_states(loaded))
    candidates = [candidate for path, state in states for candidate in _by_prefix(path, state, markers)]
    facts = dict(_facts(loaded))
    if not candidates:
        return _without_markers(loaded, states, what, facts)
    chosen = _preferred(candidates, what)
    others = tuple(candidate.place or "the top" for candidate in candidates if candidate is not chosen)
    state = next(state for path, state in states if path == chosen.path)
    tensors = _tensors(chosen.tensors, what)
    tensors |= _flat_average(state, chosen, tensors)
    averaged = chosen.averaged or any(key.startswith("model_ema.") for key in state)
    place = "model_ema." if averaged and not chosen.averaged else chosen.place
    notes = [f"weights are those under {place!r}"] if place else []
    if others and averaged:
        notes = [f"the file holds averaged and raw weights: the averaged ones ({place!r}) are taken, not {', '.join(map(repr, others))}"]
    left = sorted({key.split(".")[0] for key in state if not key.startswith(chosen.prefix)})
    if chosen.prefix and left:
        notes.append(f"other tensors of the file are passed over: {', '.join(left[:6])}{' and more' if len(left) > 6 else ''}")
    names = tuple(dict.fromkeys(name for _, held in states for name in held))
    return Checkpoint(tensors, place, averaged, others, names, facts, tuple(notes))


def _states(loaded: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dict of tensors in a loaded file, with the keys that lead to it; wrappers' parts of names taken out. Bounded in depth, each dict once."""
    seen: set[int] = set()
    queue: list[tuple[tuple[str, ...], Any]] = [((), loaded)]
    while queue:
        path, value = queue.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        tensors = {unwrapped(str(key)): item for key, item in value.items() if isinstance(item, Tensor | Array)}
        if tensors:
            yield path, tensors
        if len(path) < _DEPTH:
            inner = [(str(key), item) for key, item in value.items() if isinstance(item, Mapping) and not _NO_WEIGHTS.fullmatch(str(key))]
            inner.sort(key=lambda entry: not _EMA.search(entry[0]))  # one dict under two names, as before the first step, is the averaged one
            queue += [((*path, key), item) for key, item in inner]


def unwrapped(name: str) -> str:
    """A tensor's name without what PyTorch's wrappers put in."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _by_prefix(path: tuple[str, ...], state: dict[str, Any], markers: Sequence[str]) -> list[_Candidate]:
    """The networks of one dict, told apart by what stands before a marker."""
    prefixes = sorted({key[: -len(marker)] for key in state for marker in markers if key == marker or key.endswith(f".{marker}")}, key=len)
    found = []
    for prefix in prefixes:
        longer = [other for other in prefixes if len(other) > len(prefix) and other.startswith(prefix)]
        own = {key[len(prefix) :]: item for key, item in state.items() if key.startswith(prefix) and not any(key.startswith(o) for o in longer)}
        found.append(_Candidate(path, prefix, own))
    return found


def _preferred(candidates: list[_Candidate], what: str) -> _Candidate:
    averaged = [candidate for candidate in candidates if candidate.averaged]
    left = averaged or candidates
    for part in (lambda candidate: candidate.prefix, lambda candidate: candidate.path[-1] if candidate.path else ""):
        nearer = [candidate for candidate in left if _EMA.search(part(candidate))]
        left = nearer if len(left) > 1 and nearer else left
    if len(left) > 1:
        names = ", ".join(candidate.place or "the top of the file" for candidate in left[:6])
        raise CheckpointMismatch(
            f"{what} holds {len(left)} copies of the network, and nothing says which is meant: {names}. "
            "Save the one that is meant in a file of its own."
        )
    return left[0]


def _flat_average(state: Mapping[str, Any], chosen: _Candidate, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averages as latent-diffusion's LitEma keeps them, `model_ema.<name without dots>`, under the names of the raw weights."""
    if chosen.averaged or not any(key.startswith("model_ema.") for key in state):
        return {}
    inner = chosen.prefix.removeprefix("model.")
    flat = {name: f"model_ema.{(inner + name).replace('.', '')}" for name in tensors}
    return _tensors({name: state[key] for name, key in flat.items() if key in state}, chosen.place)


def _tensors(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Numpy arrays among tensors made tensors."""
    found: dict[str, Tensor] = {}
    for name, item in state.items():
        if isinstance(item, Tensor):
            found[name] = item.detach()
        elif item.values is not None and item.values.dtype.kind in "fiub" and item.values.dtype.isnative:
            found[name] = torch.from_numpy(item.values.copy())
        else:
            raise CheckpointMismatch(f"{what}: {name} is an array of a kind that holds no weights.")
    return found


def _without_markers(loaded: Any, states: list[tuple[tuple[str, ...], dict[str, Any]]], what: str, facts: Mapping[str, Any]) -> Checkpoint:
    """A file without a network of the family: its largest dict, for an error that names what is missing; or what it holds instead."""
    if not states:
        keys = ", ".join(str(key)[:60] for key in list(loaded)[:5]) if isinstance(loaded, Mapping) else type(loaded).__name__
        if isinstance(loaded, Tensor):
            keys = "a single tensor"
        elif isinstance(loaded, list | tuple):
            keys = "a list: names are lost, as in the shadow_params of an EMA; save a state dict"
        raise CheckpointMismatch(f"{what} holds no flat dict of tensors (found: {keys or 'an empty dict'}).")
    path, state = max(states, key=lambda found: len(found[1]))
    return Checkpoint(_tensors(state, what), " / ".join(path), False, (), tuple(state), facts)


def _facts(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Numbers, texts and truths that a file holds beside its tensors, by dotted name. Bounded in depth and number, each container once."""
    seen: set[int] = set()
    queue: list[tuple[str, int, Any]] = [("", 0, loaded)]
    count = 0
    while queue and count < _FACTS:
        name, depth, value = queue.pop(0)
        items = value if isinstance(value, Mapping) else vars(value) if isinstance(value, Record) else None
        if items is None:
            if isinstance(value, str | int | float | bool) and name:
                count += 1
                yield name, value[:500] if isinstance(value, str) else value
            continue
        if id(value) in seen or depth > _DEPTH + 3:
            continue
        seen.add(id(value))
        for key, item in list(items.items())[:_FACTS]:
            if not isinstance(item, Tensor | Array) and not (depth == 0 and _NO_WEIGHTS.fullmatch(str(key))):
                part = "" if key in ("_val", "_content") else str(key)[:80]
                queue.append((".".join(filter(None, (name, part))), depth + 1, item))


def facts_of(value: Any, prefix: str) -> dict[str, Any]:
    """The plain values of a config, by dotted name under `prefix`."""
    return dict(_facts({prefix: value}))


def read_beside(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Plain values of the settings that training scripts leave beside a checkpoint or one folder above it, and notes on those not readable."""
    import json

    facts: dict[str, Any] = {}
    notes: list[str] = []
    for above, folder in enumerate((path.parent, path.parent.parent)):
        for name in ("args.json", "config.json", "model_index.json", "hparams.yaml", "config.yaml"):
            place = folder / name
            if (above and name in ("config.json", "model_index.json", "config.yaml")) or not place.is_file():
                continue
            try:
                if place.stat().st_size > 1 << 20:
                    raise ValueError("larger than 1 MiB")
                text = place.read_text()
                content = json.loads(text) if name.endswith(".json") else _yaml(text)
            except (OSError, ValueError, RecursionError) as error:
                notes.append(f"{place} beside the weights cannot be read ({type(error).__name__}); what it says is not considered")
                continue
            facts |= facts_of(content, name) if isinstance(content, dict) else {}
    return facts, tuple(notes)


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        return {}
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
