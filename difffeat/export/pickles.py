"""torch.load without code: what training scripts put beside the weights becomes plain values of ours; nothing that a file names is imported.

torch's own restricted unpickler reads the file (`weights_only=True`). It takes a stand-in for a name; all stand-ins are here and hold data only.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from difffeat.errors import CheckpointMismatch, UntrustedFile
from difffeat.export.file_kinds import PICKLE, TORCH_ZIP

MAX_PICKLE = 1 << 28
"""Bytes of the pickle inside a torch file that are looked through; that of DiT-XL with its optimizer has less than a hundredth."""


MAX_INSTRUCTIONS = 20_000_000
"""Instructions of a pickle that are looked through; a history of a million losses has a tenth."""


class Record:
    """An object that a checkpoint holds beside its tensors: its attributes, without its class."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({str(key): value for key, value in part.items()})

    def __hash__(self) -> int:
        return id(self)


class _Dict:
    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _Path:
    def __new__(cls, *parts: Any) -> Any:
        return "/".join(str(part) for part in parts)


class DType:
    """A numpy type as a pickle spells it."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def numpy(self) -> np.dtype[Any] | None:
        """None for types that hold no numbers or text."""
        return np.dtype(self.order + self.code) if re.fullmatch(r"[biufcUS]\d{1,4}", self.code) else None


class Array:
    """A numpy array as a pickle spells it; `values` None where it holds no numbers."""

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        kind = dtype.numpy() if isinstance(dtype, DType) else None
        if kind is not None and isinstance(raw, bytes):
            self.values = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")


def _scalar(dtype: Any = None, raw: Any = b"", *_: Any) -> Any:
    kind = dtype.numpy() if isinstance(dtype, DType) else None
    if kind is None or not isinstance(raw, bytes) or len(raw) != kind.itemsize:
        return Record(raw)
    return np.frombuffer(raw, kind)[0].item()


def _new_array(*_: Any) -> Array:
    return Array()


_CONTAINERS = frozenset(
    ["omegaconf", "hydra", "pytorch_lightning", "lightning", "lightning_fabric", "ml_collections", "yacs", "wandb", "typing", "__main__"]
)
"""Packages whose objects are settings; a class of the training script itself (`__main__`) too."""
_DICTS = frozenset(
    {
        "collections.defaultdict",
        "easydict.EasyDict",
        "addict.addict.Dict",
        "munch.Munch",
        "yacs.config.CfgNode",
        "mmengine.config.config.ConfigDict",
        "mmcv.utils.config.ConfigDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
    }
)
_RECORDS = frozenset(
    {
        *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "frozenset", "slice", "range", "object")),
        "argparse.Namespace",
        "types.SimpleNamespace",
        "datetime.datetime",
        "datetime.date",
        "datetime.timedelta",
        "datetime.timezone",
        "uuid.UUID",
        "decimal.Decimal",
        "fractions.Fraction",
        "copyreg._reconstructor",
        "numpy.random.mtrand.RandomState",
    }
)


def stand_in(name: str) -> Any | None:
    """What takes the place of a global of a pickle, by its full name; None where there is nothing that would be safe and of use."""
    if name in _DICTS:
        return _Dict
    if re.fullmatch(r"numpy\.(_?core)\.multiarray\.(scalar|_reconstruct)", name):
        return _scalar if name.endswith("scalar") else _new_array
    if name in ("numpy.ndarray", "numpy.dtype"):
        return Array if name.endswith("ndarray") else DType
    if re.fullmatch(r"pathlib(\._local)?\.\w*Path", name):
        return _Path
    if name in _RECORDS or name.startswith("numpy.random.") or re.fullmatch(r"numpy\.(float|int|uint|bool|complex)_?\d*", name):
        return Record
    if name.startswith(("omegaconf.listconfig.", "omegaconf.dictconfig.")):
        return Record
    return Record if name.split(".")[0] in _CONTAINERS else None


def load_pickle(path: Path, kind: str) -> Any:
    """What torch.save wrote, tensors on the CPU, memory-mapped where the format allows it.

    Raises UntrustedFile (the file names code or unknown objects), CheckpointMismatch (damaged, or of a kind that is not read).
    """
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise UntrustedFile(
            f"reading torch files safely needs torch 2.10 or newer, this is {torch.__version__}. Upgrade torch, or convert {path} to safetensors."
        )
    names = _globals(path, kind)
    known: list[Any] = [(stand, name) for name in names if (stand := stand_in(name)) is not None]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(known):
            warnings.simplefilter("ignore", UserWarning)  # torch warns of foreign pickle protocols just before it refuses them
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == TORCH_ZIP)
            with path.open("rb") as file:  # torch goes by that suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, kind, names, str(error)) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
        AssertionError,
        NotImplementedError,
    ) as error:
        if kind == PICKLE:
            raise _bare(path) from None
        reason = plain(f"{type(error).__name__}: {error}")
        raise CheckpointMismatch(f"{path} is no readable torch file ({reason}): cut short or damaged. Download it again.") from None
    except (MemoryError, OverflowError, RecursionError) as error:
        raise CheckpointMismatch(f"{path} is no readable torch file ({type(error).__name__}): it asks for more than it can hold.") from None


def _refusal(path: Path, kind: str, names: list[str], reason: str) -> Exception:
    found = re.search(r"GLOBAL ([\w.]+)", reason)
    unknown = [name for name in names if stand_in(name) is None and not name.startswith(("torch.", "collections.", "_codecs."))]
    if found and found[1] not in unknown and stand_in(found[1]) is None:
        unknown.insert(0, found[1])
    if any("DTensor" in name or "ShardedTensor" in name or "DeviceMesh" in name for name in (*names, *unknown)) or "DTensor" in reason:
        return CheckpointMismatch(
            f"{path} holds DTensors, one process's part of a sharded model. Gather it where it was trained "
            "(get_model_state_dict with full_state_dict=True) and save that as safetensors."
        )
    if any(name.startswith("torch.nn.modules.") for name in names):
        return UntrustedFile(
            f"{path} wants to run code or holds more than tensors, so it was not opened: it is a whole module ({', '.join(unknown[:3])}), "
            "whose class would have to be imported. Convert it to safetensors where it was trained, from model.state_dict()."
        )
    if not unknown and ("operand" in reason or "protocol" in reason):
        return CheckpointMismatch(
            f"{path} is written with a pickle protocol of which torch reads only a part without code. Save it again with torch.save's default "
            "protocol, or convert it to safetensors where it was trained."
        )
    if not unknown and kind == PICKLE:
        return _bare(path)
    what = ", ".join(unknown[:4]) or plain(reason)
    return UntrustedFile(
        f"{path} wants to run code or holds more than tensors, so it was not opened (it names {what}). "
        "Convert it to safetensors where it was trained: the state dict alone."
    )


def _bare(path: Path) -> CheckpointMismatch:
    return CheckpointMismatch(f"{path} is a bare pickle, which torch.save did not write. Convert it to safetensors where it was trained.")


def plain(text: str, most: int = 200) -> str:
    """One line of a library's message: no escape codes, no advice to trust the file."""
    bare = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    line = next((line.strip() for line in bare.splitlines() if line.strip()), "")
    line = re.split(r"(?:Please|please|In PyTorch 2\.6|Re-running|\(1\)|[Uu]se `?torch\.|weights_only)", line)[0].strip()
    return "".join(character for character in line if character.isprintable())[:most] or "no reason given"


def _globals(path: Path, kind: str) -> list[str]:
    """Full names of the classes and functions that a file's pickles name, by reading their instructions; nothing is executed."""
    found: dict[str, None] = {}
    try:
        for stream in _streams(path, kind):
            _collect(path, stream, found)
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError, IndexError):
        return list(found)  # damaged: torch.load says so in its own words
    return list(found)


def _collect(path: Path, stream: BinaryIO | bytes, found: dict[str, None]) -> None:
    """Add the globals of one pickle; those of protocol 4, which lie on the stack, by the last two texts before them."""
    texts: list[str] = []
    memo: list[str | None] = []
    last: str | None = None
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_INSTRUCTIONS:
            raise CheckpointMismatch(
                f"{path} has a pickle of more than {MAX_INSTRUCTIONS} instructions, which no checkpoint needs: it was not opened."
            )
        if operation.name in ("GLOBAL", "INST") and isinstance(argument, str):
            module, _, name = argument.partition(" ")
            found[f"{_MODERN.get(module, module)}.{name}"] = None
        elif operation.name == "STACK_GLOBAL":
            found[".".join(texts[-2:])] = None
        if operation.name == "MEMOIZE":
            memo.append(last)
            continue
        last = argument if "UNICODE" in operation.name and isinstance(argument, str) else None
        if operation.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int) and argument < len(memo):
            last = memo[argument]
        if last is not None:
            texts = [*texts[-1:], last]


_MODERN = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _streams(path: Path, kind: str) -> Iterator[BinaryIO | bytes]:
    if kind == TORCH_ZIP:
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename == "data.pkl" or entry.filename.endswith("/data.pkl"))
            if entry.file_size > MAX_PICKLE:
                raise CheckpointMismatch(f"{path} has a pickle of {entry.file_size} bytes, more than any checkpoint needs: it was not opened.")
            yield archive.read(entry)
        return
    with path.open("rb") as file:
        for _ in range(4):  # magic number, protocol, system, and the object itself
            yield file
