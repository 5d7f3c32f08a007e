"""The stores that `fuse` and `search` are given, as paths: opened, split and recorded in one place, so that both hold out the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError
from difffeat.probe.provenance import provenance
from difffeat.workflows.pair_splits import Pair, PairSplits, pair_splits
from difffeat.workflows.probe_stores import features_of, require_distinct, splits_of


@dataclass(frozen=True)
class PairStores:
    """An image and a text store, those of validation and test where they have stores of their own, and a file of splits."""

    image: Path
    text: Path
    validation_image: Path | None = None
    validation_text: Path | None = None
    test_image: Path | None = None
    test_text: Path | None = None
    splits: Path | None = None
    allow_shared: bool = False

    def open(self) -> Pair:
        """The image and the text store. Raises ConfigError for half a pair, for one folder in two roles, and for what is not a feature store."""
        for name, (image, text) in {"validation": self._validation, "test": self._test}.items():
            if (image is None) != (text is None):
                raise ConfigError(f"give both --{name}-image and --{name}-text, or neither")
        require_distinct(
            {
                "the image store": self.image,
                "the text store": self.text,
                "--validation-image": self.validation_image,
                "--validation-text": self.validation_text,
                "--test-image": self.test_image,
                "--test-text": self.test_text,
            }
        )
        return features_of(self.image), features_of(self.text)

    def split(self, stores: Pair, seed: int) -> PairSplits:
        """Train, validation and test. Raises what `pair_splits` raises."""
        return pair_splits(
            stores, validation=_opened(*self._validation), test=_opened(*self._test), seed=seed, splits=splits_of(self.splits),
            allow_shared=self.allow_shared,
        )  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        """For a result: the command, the version, and where the stores lie."""
        return provenance(
            {
                "image": self.image,
                "text": self.text,
                "validation image": self.validation_image,
                "validation text": self.validation_text,
                "test image": self.test_image,
                "test text": self.test_text,
                "splits": self.splits,
            }
        )

    @property
    def _validation(self) -> tuple[Path | None, Path | None]:
        return self.validation_image, self.validation_text

    @property
    def _test(self) -> tuple[Path | None, Path | None]:
        return self.test_image, self.test_text


def _opened(image: Path | None, text: Path | None) -> Pair | None:
    return None if image is None or text is None else (features_of(image), features_of(text))
