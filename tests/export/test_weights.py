import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from difffeat.errors import CheckpointMismatch, CheckpointNotFound, UntrustedFile
from difffeat.export import weights as w
from difffeat.export.dit_weights import expected_shapes as dit_shapes
from difffeat.export.plaid_weights import expected_shapes as plaid_shapes
from difffeat.export.vae_weights import expected_shapes as vae_shapes
from tests.export import small

SMALL_DIT = w.DiTConfig(name="dit-small", depth=2, width=32, heads=4, patch=2, input_size=8, num_classes=5)
SMALL_VAE = {
    **w.SD_VAE_CONFIG,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
SMALL_VAE["up_block_types"] = ["UpDecoderBlock2D"] * 2
SMALL_PLAID = w.PlaidConfig(name="plaid-2x128", depth=2, width=128, vocab=50)


def load_small(path: Path, **options: object) -> w.DiTWeights:
    return w.load_dit(path, heads=4, name="dit-small", **options)  # type: ignore[arg-type]


def same(a: w.DiTWeights, b: w.DiTWeights) -> bool:
    return a.digest == b.digest and set(a.tensors) == set(b.tensors) and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_original_bare_nested_and_diffusers_layouts_are_the_same_weights(tmp_path: Path) -> None:
    drawn = w.random_dit(SMALL_DIT, seed=3)
    w.save_dit_original(drawn, tmp_path / "bare.pt")
    w.save_dit_original(drawn, tmp_path / "ema.pt", under_ema=True)
    w.save_dit_diffusers(drawn, tmp_path / "pipeline" / "transformer")
    save_file(dict(drawn.tensors), tmp_path / "x.safetensors")
    for path in ("bare.pt", "ema.pt", "pipeline", "pipeline/transformer", "x.safetensors"):
        loaded = load_small(tmp_path / path)
        assert same(loaded, drawn), path
        assert loaded.config == SMALL_DIT
        assert loaded.origin == "file"


def test_the_diffusers_layout_is_what_diffusers_itself_has(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel
    from safetensors.torch import load_file

    w.save_dit_diffusers(w.random_dit(SMALL_DIT), tmp_path)
    config = {key: value for key, value in json.loads((tmp_path / "config.json").read_text()).items() if not key.startswith("_")}
    model = DiTTransformer2DModel(**config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "pos_embed.pos_embed"}
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items()} == expected


@pytest.mark.parametrize("name", sorted(w.DIT_CONFIGS))
def test_every_published_geometry_is_recognised_from_its_shapes(name: str) -> None:
    from difffeat.export.dit_weights import infer_config

    tensors = {key: torch.empty(shape, device="meta") for key, shape in dit_shapes(w.DIT_CONFIGS[name]).items()}
    assert infer_config(tensors, "file", heads=None, name=None, timestep_embedding="original") == w.DIT_CONFIGS[name]


def test_the_xl_has_the_published_number_of_parameters() -> None:
    total = sum(torch.Size(shape).numel() for shape in dit_shapes(w.DIT_CONFIGS["dit-xl-2-256"]).values())
    assert round(total / 1e6, 2) == 675.13


def test_an_unknown_geometry_asks_for_the_heads(tmp_path: Path) -> None:
    w.save_dit_original(w.random_dit(SMALL_DIT), tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatch, match=r"2 blocks of width 32, no published size.*pass --heads"):
        w.load_dit(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), r"missing: blocks\.1\.mlp\.fc2\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), r"surplus: extra"),
        (lambda s: s.update({"blocks.0.attn.proj.bias": torch.zeros(7)}), r"blocks\.0\.attn\.proj\.bias \(expected \[32\], found \[7\]\)"),
        (lambda s: s.pop("pos_embed"), "is no DiT checkpoint: it lacks pos_embed"),
        (lambda s: s.update({"pos_embed": torch.zeros(3)}), "number of dimensions"),
    ],
)
def test_wrong_keys_and_shapes_are_named(tmp_path: Path, change: object, message: str) -> None:
    state = dict(w.random_dit(SMALL_DIT).tensors)
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatch, match=message):
        load_small(tmp_path / "x.pt")


def trained_with_diffusers(folder: Path) -> Path:
    """A folder whose blocks have embedders that differ."""
    from safetensors.torch import load_file

    w.save_dit_diffusers(w.random_dit(SMALL_DIT), folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name in state:
        if ".norm1.emb." in name and ".1." in name:
            state[name] = state[name] * 1.5
    save_file(state, file)
    return folder


def test_embedders_that_differ_between_blocks_ask_for_the_formula_they_were_trained_with(tmp_path: Path) -> None:
    place = trained_with_diffusers(tmp_path / "w")
    with pytest.raises(CheckpointMismatch, match=r"embedders of its own.*pass --timestep-embedding diffusers"):
        load_small(place)
    loaded = load_small(place, timestep_embedding="diffusers")
    assert loaded.config.block_embedders
    assert {"y_embedder.embedding_table.weight", "blocks.1.y_embedder.embedding_table.weight"} <= set(loaded.tensors)
    assert loaded.config.architecture()["block_embedders"] is True
    assert "block_embedders" not in SMALL_DIT.architecture()


def test_a_network_with_embedders_of_each_block_is_diffusers_own(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    from difffeat.export.reference import unfolded_dit

    theirs = DiTTransformer2DModel.from_pretrained(trained_with_diffusers(tmp_path / "w"))
    ours = unfolded_dit(load_small(tmp_path / "w", timestep_embedding="diffusers"))
    z, t, label = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 500]), torch.tensor([1, 5])
    with torch.no_grad():
        expected = theirs(z, timestep=t, class_labels=label).sample
        torch.testing.assert_close(ours(z, t, label), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float_type_of_every_family_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    def cast(tensors: object) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in dict(tensors).items()}  # type: ignore[call-overload]

    torch.save(cast(w.random_dit(SMALL_DIT).tensors), tmp_path / "x.pt")
    w.save_plaid(w.random_plaid(SMALL_PLAID), tmp_path / "p")
    torch.save(cast(torch.load(tmp_path / "p" / "model.pt")), tmp_path / "p" / "model.pt")
    w.save_vae(w.random_vae(SMALL_VAE), tmp_path / "v")
    save_file(cast(w.random_vae(SMALL_VAE).tensors), tmp_path / "v" / "diffusion_pytorch_model.safetensors")
    for loaded in (load_small(tmp_path / "x.pt"), w.load_plaid(tmp_path / "p"), w.load_vae(tmp_path / "v")):
        assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "word"), [(torch.int8, "torch.int8"), (torch.complex64, "torch.complex64"), (torch.bool, "torch.bool")])
def test_types_that_hold_no_weights_are_named_with_their_tensor(tmp_path: Path, dtype: torch.dtype, word: str) -> None:
    state = dict(w.random_dit(SMALL_DIT).tensors)
    torch.save({**state, "blocks.1.mlp.fc1.weight": state["blocks.1.mlp.fc1.weight"].to(dtype)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatch, match=rf"blocks\.1\.mlp\.fc1\.weight is {word}, expected floating point"):
        load_small(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named_by_tensor_at_load(tmp_path: Path, value: float) -> None:
    for kind, drawn, name in (
        ("dit", w.random_dit(SMALL_DIT), "blocks.1.attn.proj.bias"),
        ("plaid", w.random_plaid(SMALL_PLAID), "model.blocks.1.attn_out.weight"),
        ("vae", w.random_vae(SMALL_VAE), "encoder.conv_in.bias"),
    ):
        spoiled = {key: tensor.clone() for key, tensor in drawn.tensors.items()}
        spoiled[name].view(-1)[1] = value
        place = tmp_path / kind
        place.mkdir()
        save_file(spoiled, place / "x.safetensors")
        if isinstance(drawn, w.VAEWeights):
            w.save_vae(replace(drawn, tensors=spoiled), place)
        load = {"dit": load_small, "plaid": w.load_plaid, "vae": w.load_vae}[kind]
        with pytest.raises(CheckpointMismatch, match=rf"holds NaN or infinity in 1 of \d+ tensors: {re.escape(name)}\."):
            load(place if kind == "vae" else place / "x.safetensors")


def test_half_precision_files_are_widened(tmp_path: Path) -> None:
    drawn = w.random_dit(SMALL_DIT)
    save_file({name: tensor.half() for name, tensor in drawn.tensors.items()}, tmp_path / "x.safetensors")
    loaded = load_small(tmp_path / "x.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in loaded.tensors.values())


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("torch_format", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, torch_format: bool) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "touched"
    if torch_format:
        torch.save({"pos_embed": Exploit(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Exploit(target)))
    with pytest.raises(UntrustedFile, match=r"evil\.pt wants to run code or holds more than tensors.*Convert it to safetensors"):
        w.load_dit(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content"), [("x.pt", b"PK\x03\x04 not a zip"), ("x.pt", b""), ("x.safetensors", b"\xff" * 64), ("x.bin", b"hello")]
)
def test_garbage_gives_a_typed_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointMismatch, UntrustedFile), match=name.replace(".", r"\.")):
        w.load_dit(tmp_path / name)


def test_a_pinned_digest_is_checked_before_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"anything")
    with pytest.raises(UntrustedFile, match=r"has SHA-256 ee0874.* but 00 was pinned"):
        w.load_dit(path, sha256="00")


def test_what_does_not_exist_is_said_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"none\.pt does not exist, and is not a hub id.*--weights PATH"):
        w.load_dit(tmp_path / "none.pt")
    with pytest.raises(CheckpointNotFound, match="--vae PATH"):
        w.load_vae(str(tmp_path / "no" / "vae"))
    with pytest.raises(CheckpointNotFound, match="Plaid's four files"):
        w.load_plaid(tmp_path / "none")
    with pytest.raises(CheckpointNotFound, match=r"owt2_tokenizer.json"):
        w.load_tokenizer_file(tmp_path / "none.json")


def test_an_unreachable_hub_says_how_to_pass_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointNotFound, match=r"facebook/DiT-XL-2-256 could not be fetched.*pass --weights PATH"):
        w.load_dit("facebook/DiT-XL-2-256")


def test_random_weights_depend_on_the_seed_and_say_so() -> None:
    first, again, other = w.random_dit(SMALL_DIT, 1), w.random_dit(SMALL_DIT, 1), w.random_dit(SMALL_DIT, 2)
    assert same(first, again)
    assert first.digest != other.digest
    assert first.origin == "random:1"
    assert all(tensor.any() for tensor in first.tensors.values()), "gates and biases are drawn too"


def test_vae_round_trip_keeps_the_encoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    drawn = w.random_vae(SMALL_VAE)
    w.save_vae(drawn, tmp_path / "vae")
    loaded = w.load_vae(tmp_path)
    assert loaded.digest == drawn.digest
    assert loaded.scaling_factor == 0.18215
    missing, surplus = AutoencoderKL(**loaded.config).load_state_dict(dict(loaded.tensors), strict=False)
    assert not surplus
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in missing)


def test_vae_attention_under_its_old_names_is_read(tmp_path: Path) -> None:
    drawn = w.random_vae(SMALL_VAE)
    w.save_vae(drawn, tmp_path)
    old = {}
    for name, tensor in drawn.tensors.items():
        for modern, ancient in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{modern}." in name:
                name = name.replace(modern, ancient)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        old[name] = tensor.contiguous()
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    assert w.load_vae(tmp_path).digest == drawn.digest


def test_a_vae_without_its_tensors_is_named(tmp_path: Path) -> None:
    drawn = w.random_vae(SMALL_VAE)
    w.save_vae(replace(drawn, tensors={k: v for k, v in drawn.tensors.items() if k != "encoder.conv_in.bias"}), tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"missing: encoder\.conv_in\.bias"):
        w.load_vae(tmp_path)


def test_the_sd_vae_has_the_published_size() -> None:
    assert round(sum(torch.Size(shape).numel() for shape in vae_shapes(w.SD_VAE_CONFIG).values()) / 1e6, 1) == 34.2


def test_plaid_round_trip_through_its_four_files(tmp_path: Path) -> None:
    drawn = w.random_plaid(SMALL_PLAID)
    w.save_plaid(drawn, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["embedding_matrix.pt", "gamma_bounds.pt", "model.pt", "noise_schedule.pt"]
    assert "rotary_emb.inv_freq" in torch.load(tmp_path / "model.pt", weights_only=True)
    loaded = w.load_plaid(tmp_path)
    assert loaded.digest == drawn.digest
    assert loaded.config == SMALL_PLAID
    save_file(dict(drawn.tensors), tmp_path / "one.safetensors")
    assert w.load_plaid(tmp_path / "one.safetensors").digest == drawn.digest


def test_plaid_problems_are_named(tmp_path: Path) -> None:
    drawn = w.random_plaid(SMALL_PLAID)
    w.save_plaid(drawn, tmp_path)
    (tmp_path / "gamma_bounds.pt").rename(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointMismatch, match=r"lacks gamma_bounds\.pt"):
        w.load_plaid(tmp_path)
    (tmp_path / "elsewhere.pt").rename(tmp_path / "gamma_bounds.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save({**state, "rotary_emb.inv_freq": state["rotary_emb.inv_freq"] * 2}, tmp_path / "model.pt")
    with pytest.raises(CheckpointMismatch, match="no published Plaid"):
        w.load_plaid(tmp_path)


def test_plaid_shapes_are_those_of_the_network() -> None:
    _, tensors, config = small.plaid()
    assert {k: tuple(v.shape) for k, v in tensors.items()} == plaid_shapes(w.PlaidConfig(name="x", depth=config.depth, width=128, vocab=40))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    from difffeat.workflows.scenes import tokenizer_json

    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert w.load_tokenizer_file(tmp_path / "tokenizer.json", vocab=54) == (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointMismatch, match="has 54 tokens, the model only 50"):
        w.load_tokenizer_file(tmp_path / "tokenizer.json", vocab=50)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(CheckpointMismatch, match="no tokenizer"):
        w.load_tokenizer_file(tmp_path / "bad.json")
