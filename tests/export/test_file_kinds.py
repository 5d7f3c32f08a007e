"""A file is what its bytes say, and is named for it."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from difffeat.errors import CheckpointMismatch
from tests.export.checkpoints import load, saved, state


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.bin", "w.ckpt", "weights", "w.old"])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_the_suffix_is_only_a_name(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "safetensors":
        save_file(state(), tmp_path / name)
        path = tmp_path / name
    else:
        path = saved(tmp_path, state(), name, _use_new_zipfile_serialization=kind == "torch")
    assert torch.equal(load(path).tensors["pos_embed"], state()["pos_embed"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 27\n", "is a Git LFS pointer.*git lfs pull"),
        (b"<!doctype html><title>404</title>", "is an HTML page"),
        (b"\n \n<HTML><body>sign in</body>", "is an HTML page"),
        (b'{"error": "Repository not found"}', "is JSON.*Repository not found"),
        (b"Entry not found", "is text.*Entry not found"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML.*a storage service's error"),
        (b"", r"is empty \(0 bytes\)"),
        (gzip.compress(b"x" * 99), "compressed by gzip: unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(32), "is a 7z archive: unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(32), "compressed by zstd"),
        (b"GGUF\x03\x00" + bytes(64), "is a GGUF file"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(50), "is an ONNX graph"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"\x93NUMPY\x01\x00" + bytes(64), "a single numpy array"),
        (b"PK\x03\x04" + bytes(64), "begins like a torch file and does not end like one"),
        (bytes(range(255)), "neither a safetensors nor a torch file"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, words: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointMismatch, match=words) as caught:
        load(tmp_path / name)
    assert "run code" not in str(caught.value)


def test_archives_that_are_no_torch_file_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("DiT/model.safetensors", b"")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name, words in (
        ("tar.pt", "a tar archive"),
        ("x.npz", "a numpy archive"),
        ("zip.pt", r"holds DiT/model"),
        ("script.pt", "a TorchScript archive"),
    ):
        with pytest.raises(CheckpointMismatch, match=words):
            load(tmp_path / name)


def test_a_compressed_torch_file_is_not_unpacked_into_memory(tmp_path: Path) -> None:
    original = saved(tmp_path, state())
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointMismatch, match="has compressed records"):
        load(tmp_path / "bomb.pt")


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.99])
def test_files_that_are_cut_short_are_said_to_be(tmp_path: Path, cut: float) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    for path in (saved(tmp_path, state()), tmp_path / "w.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[: int(cut * len(content))])
        with pytest.raises(CheckpointMismatch, match="cut short or damaged"):
            load(path)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 0),
        *(
            struct.pack("<Q", len(text)) + text + bytes(8)
            for text in (
                json.dumps({"x": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode(),
                json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}}).encode(),
                json.dumps({"x": {"dtype": "EVIL", "shape": [2], "data_offsets": [0, 8]}}).encode(),
            )
        ),
    ],
)
def test_absurd_headers_are_typed_errors(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(header)
    with pytest.raises(CheckpointMismatch, match=r"w\.safetensors"):
        load(tmp_path / "w.safetensors")


def test_a_storage_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    original = saved(tmp_path, {**state(), "pos_embed": torch.zeros(1, 64, 32)})
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(tmp_path / "w.pt", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content.replace(b"M\x00\x08t", b"J\xff\xff\xff\x7ft") if name.endswith("data.pkl") else content)
    with pytest.raises(CheckpointMismatch, match=r"made to fill memory|cut short or damaged"):
        load(tmp_path / "w.pt")
