"""Hub ids: what is fetched of a repository, and what is said where it cannot be."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from difffeat.errors import CheckpointNotFound, ConfigError, OutputError
from difffeat.export.hub import HubPlace, locate, parse_hub_id, place_words
from difffeat.export.weights import load_dit, random_dit, save_dit_diffusers
from tests.export.hub_server import COMMIT, Hub, serving
from tests.export.test_weights import SMALL_DIT

CONNECT = socket.socket.connect
STEM = "diffusion_pytorch_model"
EVERYTHING = {
    name: name.encode()
    for name in (
        "model_index.json", "README.md", "config.json", f"{STEM}.safetensors", "vae/config.json", f"vae/{STEM}.safetensors",
        f"vae/{STEM}.fp16.safetensors", f"vae/{STEM}.bin", f"vae/{STEM}.onnx", "vae/flax_model.msgpack", "vae/old/config.json",
        f"vae/old/{STEM}.safetensors", "safety_checker/config.json", "unet/config.json", f"unet/{STEM}.safetensors",
    )
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, which is the one that huggingface_hub asks; its cache is empty, waiting takes no time."""
    import huggingface_hub.constants as constants

    def loopback_only(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"a test tried to reach {address}"
        CONNECT(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback_only)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    with serving(Hub({})) as server:
        use(server.url, monkeypatch)
        yield server


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which is read at import."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def fetched(hub: Hub, files: Mapping[str, bytes], place: str = "own/model", subfolder: str = "vae") -> list[str]:
    hub.files["own/model"] = files
    locate(place, option="--vae", subfolder=subfolder)
    return sorted(hub.asked)


def test_only_the_files_that_are_read_are_fetched(hub: Hub) -> None:
    assert fetched(hub, EVERYTHING) == ["vae/config.json", f"vae/{STEM}.safetensors"]


def test_without_the_folder_the_root_is_taken(hub: Hub) -> None:
    files = {name: content for name, content in EVERYTHING.items() if not name.startswith("vae/")}
    assert fetched(hub, files) == ["config.json", f"{STEM}.safetensors"]


def test_pickles_only_where_the_wanted_folder_has_nothing_else(hub: Hub) -> None:
    files = {name: content for name, content in EVERYTHING.items() if name != f"vae/{STEM}.safetensors"}
    assert fetched(hub, files) == ["vae/config.json", f"vae/{STEM}.bin"]


def test_weights_in_parts_by_their_index(hub: Hub) -> None:
    parts = {f"vae/{STEM}-0000{k}-of-00002.safetensors": bytes([k]) for k in (1, 2)}
    first, second = (Path(name).name for name in parts)
    index = {"weight_map": {"a": first, "b": second, "c": second}}
    files = {"vae/config.json": b"{}", f"vae/{STEM}.safetensors.index.json": json.dumps(index).encode(), **parts, f"vae/{STEM}.bin": b"no"}
    assert fetched(hub, files) == sorted(set(files) - {f"vae/{STEM}.bin"})


@pytest.mark.parametrize("index", [b"[]", b"{", b'{"weight_map": 3}', b'{"weight_map": {"a": "../../x.safetensors", "b": 7}}'])
def test_an_index_that_is_none_fetches_nothing_by_it(index: bytes, hub: Hub) -> None:
    files = {"config.json": b"{}", f"{STEM}.safetensors.index.json": index}
    assert fetched(hub, files) == sorted(files)


def test_a_part_that_is_missing_is_named(hub: Hub) -> None:
    index = json.dumps({"weight_map": {"a": "part-1.safetensors"}}).encode()
    with pytest.raises(CheckpointNotFound, match=r"own/model on the hub does not have the file vae/part-1\.safetensors\. It has vae/config\.json"):
        fetched(hub, {"vae/config.json": b"{}", f"vae/{STEM}.safetensors.index.json": index})


@pytest.mark.parametrize("place", ["own/model/vae/old", "own/model/vae/old@main", "hf://own/model@main/vae/old",
                                   "https://huggingface.co/own/model/tree/main/vae/old", f"own/model/vae/old@{COMMIT}"])  # fmt: skip
def test_a_folder_of_a_repository(place: str, hub: Hub) -> None:
    assert fetched(hub, EVERYTHING, place) == ["vae/old/config.json", f"vae/old/{STEM}.safetensors"]
    assert (locate(place, option="--vae", subfolder="vae") / "config.json").read_bytes() == b"vae/old/config.json"


def test_one_file_of_a_repository(hub: Hub) -> None:
    hub.files["own/model"] = {**EVERYTHING, "weights/last.pt": b"pt"}
    assert locate("own/model/weights/last.pt", option="--weights").read_bytes() == b"pt"
    assert hub.asked == ["weights/last.pt"]


def test_what_is_cached_is_not_fetched_again_and_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: content for name, content in EVERYTHING.items() if not name.startswith("vae/")}
    fetched(hub, files)
    hub.asked.clear()
    assert fetched(hub, files) == []
    hub.answers["own/model"] = (503, {})
    assert fetched(hub, files) == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetched(hub, files) == []


def test_a_damaged_copy_in_the_cache_is_fetched_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched(hub, EVERYTHING)
    copy = locate("own/model", option="--vae", subfolder="vae") / "vae" / f"{STEM}.safetensors"
    copy.resolve().write_bytes(b"cut")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointNotFound, match=r"damaged.* Delete .* and run the same command again with network"):
        locate("own/model", option="--vae", subfolder="vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    locate("own/model", option="--vae", subfolder="vae")
    assert copy.read_bytes() == f"vae/{STEM}.safetensors".encode()


GATED = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model own/model is restricted."})


@pytest.mark.parametrize("answer, words", [
    (GATED, r"Access to model own/model is restricted\..*gives access on request: ask at http://127.*/own/model, log in with `hf auth login`"),
    ((401, {"X-Error-Code": "RepoNotFound"}), r"no file or folder of that name here, and the hub has no such repository, or a private one"),
    ((401, {"X-Error-Message": "Invalid username or password."}), r"Invalid username or password\..*log in with `hf auth login`"),
    ((403, {"X-Error-Message": "This resource has been disabled", "X-Error-Code": "DisabledRepo"}), r"own/model could not be fetched"),
    ((403, {}), r"token that was sent is not valid, or may not read this"),
    ((429, {}), r"429.*takes no more requests from here for a while"),
    ((503, {}), r"503.*fails at the moment: run the same command later"),
    ((200, {}), r"HF_ENDPOINT"),
])  # fmt: skip
def test_the_hubs_own_words_with_advice(answer: tuple[int, dict[str, str]], words: str, hub: Hub) -> None:
    hub.answers["own/model"] = answer
    with pytest.raises(CheckpointNotFound, match=words) as found:
        locate("own/model", option="--vae", subfolder="vae")
    assert "\n" not in str(found.value)


def test_a_repository_a_revision_and_a_file_that_are_not_there(hub: Hub) -> None:
    hub.files["own/model"] = {"pytorch_model.pt": b"", "flax.msgpack": b"", "README.md": b""}
    with pytest.raises(CheckpointNotFound, match=r"Repository Not Found.*hub has no such repository"):
        locate("own/modle", option="--weights")
    with pytest.raises(CheckpointNotFound, match=r"own/model at revision v9 .*Invalid rev id: v9.*Correct --revision"):
        locate("own/model", option="--weights", revision="v9")
    with pytest.raises(CheckpointNotFound, match=r"looked for transformer/config\.json, config\.json .*It has pytorch_model\.pt, flax\.msgpack\. "):
        locate("own/model", option="--weights", subfolder="transformer")


def test_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    use("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(CheckpointNotFound, match=r"Is there a network, and is http://127\.0\.0\.1:9 the right address \(HF_ENDPOINT"):
        locate("own/model", option="--vae")


def test_offline_names_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointNotFound, match=rf"HF_HUB_OFFLINE is set.*{tmp_path}/cache.*has no vae/config\.json, config\.json .*pass --vae PATH"
    ):
        locate("own/model", option="--vae", subfolder="vae")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_disk_is_not_the_hubs_fault(number: int, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number), "/cache/blobs/x.incomplete")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(OutputError, match=rf"/cache/blobs/x\.incomplete: {os.strerror(number)}.*HF_HOME"):
        locate("own/model", option="--vae")


def test_a_path_comes_before_a_hub_id_and_that_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    assert locate("own/model", option="--vae") == Path("own/model")
    assert place_words("own/model") == "own/model on this disk (not from the hub, which has ids of this form)"
    assert place_words("facebook/DiT-XL-2-256") == "facebook/DiT-XL-2-256 on the hub"
    assert place_words(str(tmp_path)) == str(tmp_path)


def test_two_revisions(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="names the revision 'main', --revision 'v1'"):
        locate("own/model@main", option="--vae", revision="v1")


def test_a_misspelt_path_names_its_neighbour(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "DiT-XL-2-256x256.pt").touch()
    with pytest.raises(CheckpointNotFound, match=r"is not a hub id \(owner/name\)\. Is it DiT-XL-2-256x256\.pt\?"):
        locate("DiT-XL-2-256.pt", option="--weights")


@pytest.mark.parametrize("text, place", [
    ("facebook/DiT-XL-2-256", HubPlace("facebook/DiT-XL-2-256")),
    ("facebook/DiT-XL-2-256@refs/pr/3", HubPlace("facebook/DiT-XL-2-256", "", "refs/pr/3")),
    ("a/b/c/", HubPlace("a/b", "c")),
    ("https://huggingface.co/a/b", HubPlace("a/b")),
    ("https://huggingface.co/a/b/resolve/main/x%20y/z.pt?download=true", HubPlace("a/b", "x y/z.pt", "main")),
    ("a/b.pt", None), ("a", None), ("./a/b", None), ("../a", None), ("/a/b", None), ("a/b/../c", None), ("~/a", None), ("a//b", None),
    ("https://example.org/a/b", None), ("s3://a/b", None), ("", None), ("C:/a/b", None),
])  # fmt: skip
def test_what_is_a_hub_id(text: str, place: HubPlace | None) -> None:
    assert parse_hub_id(text) == place


def test_weights_come_through_the_hub_as_from_their_folder(hub: Hub, tmp_path: Path) -> None:
    drawn = random_dit(SMALL_DIT)
    save_dit_diffusers(drawn, tmp_path / "made" / "transformer")
    hub.files["own/model"] = {str(path.relative_to(tmp_path / "made")): path.read_bytes() for path in tmp_path.rglob("transformer/*")}
    assert load_dit("own/model", heads=SMALL_DIT.heads).digest == drawn.digest
