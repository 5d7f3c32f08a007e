"""CIFAR-10 and CIFAR-100 in their binary form; the other published form is a pickle, which could run code, and is refused."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difffeat.errors import ConfigError, DecodeError, SourceError, SourceFormatError, UntrustedFile
from difffeat.runtime.blobs import MAX_BYTES, SliceBlob
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources_options import SourceOptions, read_class_names
from difffeat.runtime.understood import Understood

SIDE = 32
PIXELS = 3 * SIDE * SIDE
FILES_10 = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
FILES_100 = {"train": ("train.bin",), "test": ("test.bin",)}


@dataclass(frozen=True, slots=True)
class PlanesBlob:
    """A CIFAR image: 1024 bytes of red, of green, of blue, row by row. Read as a BMP file, which every decoder takes and which loses nothing."""

    planes: SliceBlob

    @property
    def size(self) -> int:
        return self.planes.size

    def read(self, limit: int = MAX_BYTES) -> bytes:
        if limit < PIXELS + 54:
            raise DecodeError(f"the image has {PIXELS + 54} bytes, more than the limit of {limit}.")
        rgb = np.frombuffer(self.planes.read(), np.uint8).reshape(3, SIDE, SIDE)
        rows = np.ascontiguousarray(rgb[::-1, ::-1].transpose(1, 2, 0))  # BMP: blue first, lowest row first
        header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54 + PIXELS, 0, 0, 54, 40, SIDE, SIDE, 1, 24, 0, PIXELS, 0, 0, 0, 0)
        return header + rows.tobytes()


def is_cifar10(root: Path) -> bool:
    """Whether this folder is cifar-10-batches-bin, or its pickled twin."""
    return (root / "test_batch.bin").is_file() or (root / "batches.meta").is_file()


def is_cifar100(root: Path) -> bool:
    """Whether this folder is cifar-100-binary, or its pickled twin."""
    return (root / "fine_label_names.txt").is_file() or all((root / file).is_file() for file in ("meta", "train", "test"))


def read_cifar10(root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """cifar-10-batches-bin: `data_batch_1.bin` ... `test_batch.bin`, records of a label byte and 3072 bytes of pixels; names in
    `batches.meta.txt`. Ids are `<split>-00000` ... in the order of the files.

    Raises UntrustedFile for the pickled form, SourceError, SourceFormatError.
    """
    _refuse_pickles(root, ("batches.meta", "data_batch_1"), "cifar-10-binary.tar.gz")
    return _read(root, FILES_10[split], 1, 0, root / "batches.meta.txt", split, name)


def read_cifar100(root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """cifar-100-binary: `train.bin`, `test.bin`, records of a coarse label, a fine label and 3072 bytes of pixels; names in
    `fine_label_names.txt` and `coarse_label_names.txt`. Labels are the fine ones, unless `label_column` is `coarse`. Ids as for CIFAR-10.

    Raises UntrustedFile for the pickled form, SourceError, SourceFormatError, ConfigError.
    """
    _refuse_pickles(root, ("meta", "train"), "cifar-100-binary.tar.gz")
    kind = options.label_column or "fine"
    if kind not in ("fine", "coarse"):
        raise ConfigError(f"--label-column of cifar100 must be fine or coarse; got {kind!r}")
    return _read(root, FILES_100[split], 2, int(kind == "fine"), root / f"{kind}_label_names.txt", split, name)


def _refuse_pickles(root: Path, files: tuple[str, ...], archive: str) -> None:
    present = [file for file in files if (root / file).is_file()]
    if present and not any(root.glob("*.bin")):
        raise UntrustedFile(f"{root / present[0]} is a pickle, which could run code when it is read. Get the binary version, {archive}, instead.")


def _read(root: Path, files: tuple[str, ...], head: int, label: int, names: Path, split: str, name: str) -> Source:
    classes = read_class_names(names)
    tuples = [(text,) for text in classes]
    samples: list[Sample] = []
    for file in files:
        path, record = root / file, head + PIXELS
        try:
            content = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} cannot be read ({error}). Unpack the data set again.") from None
        if len(content) % record:
            raise SourceFormatError(f"{path} has {len(content)} bytes, no multiple of {record}: it is cut off. Unpack the data set again.")
        for row, number in enumerate(content[label::record].tolist()):
            if number >= len(classes):
                raise SourceFormatError(f"{path}, record {row + 1} has label {number}, and {names.name} names {len(classes)} classes.")
            blob = PlanesBlob(SliceBlob(str(path), row * record + head, PIXELS))
            samples.append(Sample(f"{split}-{len(samples):05d}", blob, f"{file}#{row + 1}", labels=tuples[number]))
    understood = Understood(form=f"CIFAR, split {split}", ids="split and number of the record", labels="a byte of each record", classes=names.name)
    return Source(name, tuple(samples), classes, understood=understood)
