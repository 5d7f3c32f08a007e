"""Whether what a verb is given is what it wants: said before any work, with the command that helps."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

from difffeat.engines.artifact import MODEL_FILE, RECIPE_FILE
from difffeat.errors import ConfigError, SourceError
from difffeat.recognise import not_a_source, quoted, recognise
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.files import LOCK, TEMPORARY
from difffeat.runtime.manifest import MANIFEST, SAMPLES
from difffeat.runtime.origin import ORIGIN
from difffeat.runtime.remote import is_url
from difffeat.runtime.samples import Source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.workflows.loading import DIGITS, PUBLISHED_DIT

SHARDS, RECEIPTS = "shards", "receipts"
LOOKED_FOR = 100
"""Images of a list that are looked for before an extraction is begun."""


def check_model(model: str, weights: str | None) -> None:
    """Raises ConfigError where `--model` is given a place instead of a name, and where `--weights` is something that the program itself has made."""
    is_place = "/" in model or model.endswith((".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".onnx"))
    if is_place or (recognise(model).kind != "nothing" and not model.startswith(("dit", "plaid"))):
        raise ConfigError(
            f"--model takes the name of a network (dit, plaid, dit-digits, plaid-digits, dit-b-4-256 ...), and {model} is a place. Type: difffeat "
            f"export --model dit --weights {quoted(weights or model)}"
        )
    known = (*DIGITS, *PUBLISHED_DIT, "plaid")
    if weights is None and model not in known and model.startswith(("dit", "plaid")):
        near = difflib.get_close_matches(model, known, 1)
        raise ConfigError(
            f"--model {model} has no published weights here{f' (is it {near[0]}?)' if near else ''}. Those with weights: {', '.join(known)}; "
            "for another one pass --weights PATH."
        )
    thing = recognise(weights) if weights not in (None, "random") else None
    if thing is not None and thing.kind in ("artifact", "store", "latent cache", "images", "image", "plan", "graph", "probe", "results", "table"):
        hint = f" It can be used as it is: difffeat extract {quoted(str(weights))} SOURCE" if thing.kind == "artifact" else ""
        raise ConfigError(f"--weights {weights} {thing.words}, and weights are a checkpoint: a file, a folder, or a hub id.{hint}")


def check_arguments(verb: str, artifact: Path | None, source: str | None) -> None:
    """Raises ConfigError where ARTIFACT and SOURCE are the wrong way round, and where a source is something else that is known."""
    if source is None or is_url(source):
        return
    if artifact is not None and recognise(source).kind == "artifact" and (given := recognise(artifact)).kind != "artifact":
        raise ConfigError(
            f"the artifact comes first, then the source: {source} is an artifact, and {artifact} {given.words}. "
            f"Type: difffeat {verb} {quoted(source)} {quoted(artifact)}"
        )
    if artifact is not None and recognise(artifact).kind != "artifact":
        return  # which opening it says
    if (why := not_a_source(source)) is not None:
        raise ConfigError(why)


def check_store_place(out: Path, source: str) -> None:
    """Raises ConfigError, before any work, where a store cannot lie at `out`, or would lie among the files of its own source."""
    thing, place = recognise(out), out.expanduser().resolve()
    free = thing.kind in ("nothing", "empty", "store", "latent cache", "unreadable") or (place / MANIFEST).is_file() or _was_begun(place)
    if not free:
        raise ConfigError(f"-o {out} {thing.words}; a feature store needs a folder of its own. Choose another -o, for example features/NAME.")
    for folder in place.parents:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}, where -o {out} would lie, is a file. Choose another -o.")
        if _is_ours(folder):
            raise ConfigError(f"-o {out} lies within {folder}, which has files of its own. Choose another -o.")
    if is_url(source) or not (read := Path(source).expanduser()).is_dir():
        return
    if place == read.resolve() or (read.resolve() in place.parents and recognise(read).kind == "images"):
        raise ConfigError(f"-o {out} lies in {source}, the folder that is read: its files would be taken for samples. Choose another -o.")


def check_images_are_there(listed: Source, source: str, options: SourceOptions, *, takes_images: bool) -> None:
    """Raises SourceError where a list names images of which not one is there: the folder of its relative paths is another one."""
    paths = (sample.image.path for sample in listed.samples if isinstance(sample.image, FileBlob)) if takes_images else iter(())
    looked_for = list(itertools.islice(paths, LOOKED_FOR))
    if not looked_for or any(os.path.exists(path) for path in looked_for):
        return
    advice = "correct --images" if options.images is not None else "pass --images FOLDER, the folder that those names start from"
    raise SourceError(
        f"{source} names {len(listed)} images, and of the first {len(looked_for)} none is there; the first is {looked_for[0]}: {advice}."
    )


def _was_begun(place: Path) -> bool:
    """Whether a folder holds no more than a run leaves that was stopped before its manifest stood."""
    folders = {place / SHARDS, place / RECEIPTS}
    own = {place / name for name in ((SAMPLES, ORIGIN, LOCK) if all(folder.is_dir() for folder in folders) else (LOCK,))}
    return place.is_dir() and all(path in folders if path.is_dir() else path in own or path.name.endswith(TEMPORARY) for path in place.rglob("*"))


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a store or an artifact."""
    is_store = (folder / MANIFEST).is_file() and (folder / "shards").is_dir()
    return is_store or ((folder / MODEL_FILE).is_file() and (folder / RECIPE_FILE).is_file())
