"""What the quickstart is expected to show, stated before any of its models was trained.

Each expectation is judged from the finished numbers and printed with what came, kept or broken. Scores are mAP in percent on the test split;
"above" means that the paired 95 % bootstrap interval of the difference lies above zero.
"""

from __future__ import annotations

from dataclasses import dataclass

EXPECTATIONS: dict[str, str] = {
    "image-block-inside": "The best image block lies strictly inside the network: neither block 0 nor the last one.",
    "image-timestep-noisy": "The best image timestep is above 0: a little noise helps.",
    "text-timestep-clean": "The best text timestep is 0, the clean end.",
    "image-above-pixels": "Image features are above raw pixels.",
    "image-above-random": "Image features are above those of a randomly initialised backbone at its own best tap.",
    "fused-above-image": "Fusion is above image features alone.",
    "fused-above-text": "Fusion is above text features alone.",
    "fused-above-latents-and-words": "Fusion of features is above the same fusion of raw latents and a bag of words.",
    "shuffled-falls-back": "With captions shuffled between scenes, fusion falls back to the image's level: at most one point above it.",
    "search-regret-small": "The local search ends within half a point of the exhaustive pair grid, on validation.",
}


@dataclass(frozen=True)
class Outcome:
    """What came of one expectation. `evidence` holds the numbers in words."""

    key: str
    expected: str
    kept: bool
    evidence: str


def judge(findings: dict[str, tuple[bool, str]]) -> list[Outcome]:
    """Join findings (key -> kept, evidence) with `EXPECTATIONS`; every expectation must have been looked at."""
    missing = sorted(set(EXPECTATIONS) - set(findings))
    if missing:
        raise KeyError(f"not judged: {', '.join(missing)}")
    return [Outcome(key, text, *findings[key]) for key, text in EXPECTATIONS.items()]
