"""The settings of probes that `probe` and `fuse` take, and which method takes which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from difffeat.errors import ConfigError

TAKES: dict[str, tuple[str, ...]] = {
    "adam": ("lr", "epochs", "batch_size", "weight_decay", "loss"),
    "ridge": ("alphas",),
    "logistic": ("c",),
}
"""Options by method; each method also chooses what is left out."""


@dataclass(frozen=True)
class ProbeOptions:
    """Settings as they were asked for; None is left to the probe, which chooses `lr`, `alphas` and `c` on validation.

    **Fields:** `lr` and `alphas` one number, or several separated by commas to choose from.
    """

    lr: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    weight_decay: float | None = None
    alphas: str | None = None
    c: float | None = None
    loss: str | None = None

    def require(self, methods: Sequence[str]) -> None:
        """Raises ConfigError for an option that none of the methods takes: it would be passed over in silence."""
        for field in fields(self):
            if getattr(self, field.name) is None or any(field.name in TAKES[method] for method in methods):
                continue
            owner = next(method for method, names in TAKES.items() if field.name in names)
            own = "; ".join(f"{method} takes {', '.join(map(_flag, TAKES[method]))}" for method in methods)
            raise ConfigError(f"{_flag(field.name)} is for --method {owner}, and --method is {','.join(methods)}: {own}. Change one of the two.")

    def settings(self, method: str) -> dict[str, Any]:
        """The constructor's arguments of a method's probe. Raises ConfigError for text that is no number."""
        given = {name: getattr(self, name) for name in TAKES[method] if getattr(self, name) is not None}
        if "lr" in given:
            rates = _numbers(given["lr"], "--lr")
            given["lr"] = rates[0] if len(rates) == 1 else rates
        if "alphas" in given:
            given["alphas"] = _numbers(given["alphas"], "--alphas")
        return given


def methods_asked(text: str) -> tuple[str, ...]:
    """`adam,ridge` to methods, each once. Raises ConfigError for none and for one that there is not."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names or set(names) - set(TAKES):
        raise ConfigError(f"--method takes {', '.join(TAKES)}; got {text!r}")
    return names


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} takes a number, or several separated by commas, got {text!r}") from None
    if not all(0 < value < float("inf") for value in found):
        raise ConfigError(f"{option} takes numbers above 0, got {text!r}")
    return found
