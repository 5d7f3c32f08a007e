"""The command line: results on standard output, progress on standard error, errors with their exit code and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from difffeat.runtime.store import Store
from tests.artifacts import copy_of, exported
from tests.cli.conftest import Run
from tests.runtime.fake import encoded

VERBS = (
    "export",
    "build",
    "quantize",
    "verify",
    "doctor",
    "extract",
    "plan",
    "probe",
    "fuse",
    "search",
    "inspect",
    "quickstart",
    "bench throughput",
    "bench grid",
    "bench text",
    "bench extract",
    "bench store",
    "bench precision",
    "store convert",
    "store diff",
    "store info",
    "store repair",
    "store verify",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, run: Run) -> None:
    result = run(*verb.split(), "--help")
    assert result.code == 0
    assert result.out.count("--") > 1


def test_the_version_is_the_packages(run: Run) -> None:
    from difffeat import __version__

    assert run("--version").out.strip() == __version__


def test_a_stop_at_any_moment_is_resumable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("difffeat.workflows.building.run_doctor", stopped)
    result = run("doctor")
    assert result.code == 4
    assert result.err == "difffeat: Interrupted: stopped. What was finished is kept; run the same command again to go on.\n"


def test_exporting_the_published_dit_offline_says_how_to_pass_files(run: Run) -> None:
    result = run("export", "--model", "dit")
    assert result.code == 1
    assert result.out == ""
    assert "CheckpointNotFound" in result.err
    assert "facebook/DiT-XL-2-256" in result.err
    assert "With no network, download the files on another machine and pass" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "--model", "unet"], 2, "model must be dit, plaid, dit-digits, plaid-digits"),
        (["export", "--model", "plaid"], 2, "Plaid's weights are in no hub"),
        (
            ["export", "--model", "dit-digits", "--dtype", "int8"],
            2,
            "int8 is calibrated on real samples: export fp32, then run difffeat quantize ARTIFACT SOURCE",
        ),
        (["export", "--model", "dit-digits", "--noising", "ddim", "--graph", "image"], 2, "export with --graph from-latents or sweep"),
        (["export", "--model", "dit-digits", "--graph", "denoiser"], 2, "pass --noising ddim or, for text, --self-conditioning"),
        (["export", "--model", "dit-digits", "--graph", "text"], 2, "--graph must be one of image, latents, from-latents, sweep for this model"),
        (["export", "--model", "dit-digits", "--blocks", "1,x"], 2, "--blocks takes whole numbers separated by commas, got '1,x'"),
        (["export", "--model", "dit-digits", "--blocks", "9"], 2, "blocks must lie in 0..8"),
        (["export", "--model", "dit-digits", "--timestep", "0,30"], 2, "has one timestep baked in, got 2. For several, pass --graph sweep."),
        (["export", "--model", "dit-digits", "--timestep", "1000"], 2, "999"),
        (["export", "--model", "dit-digits", "--label", "7"], 2, "label must lie in 0..3"),
        (["extract"], 2, "no artifact was given and artifacts/ holds none. Make one first: difffeat export --model dit-digits"),
        (["extract", "nothing", "photos"], 1, "nothing"),
        (["inspect", "."], 2, "neither an artifact (no model.onnx), nor a plan, nor a feature store (no manifest.json)"),
        (["store", "verify", "."], 1, ". is an empty folder, so it is not a feature store. Make one with: difffeat extract"),
        (["probe", "."], 1, "is not a feature store"),
        (["--config", "no.toml", "inspect", "."], 2, "--config no.toml cannot be read"),
    ],
)
def test_what_cannot_be_done_says_why_and_what_to_do(arguments: list[str], code: int, message: str, run: Run) -> None:
    result = run(*arguments)
    assert message in result.err
    assert (result.code, result.out) == (code, "")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "rtx", "--device", "cpu"], "ConfigError: --engine rtx runs on a GPU: --device cuda or cuda:<n>, got 'cpu'."),
        (["--cuda-graphs"], "ConfigError: --cuda-graphs is for --engine torch, trt, rtx; this is ort. Leave it out."),
        (["--engine", "tflite"], "ConfigError: engine must be one of ort, torch, trt, rtx; got 'tflite'"),
        (["--executor", "spark"], "ConfigError: --executor must be one of local, ray; got 'spark'"),
        (["--workers", "2"], "ConfigError: --workers and --address are for --executor ray; --num-workers sets the threads that decode"),
        (["--batch-size", "many"], "ConfigError: --batch-size takes a whole number or auto, got 'many'"),
        (["--append", "--retry-quarantined"], "ConfigError: --append and --retry-quarantined are two runs"),
        (["--device", "cuda"], "ProviderMissing: CUDAExecutionProvider was asked for"),
        (["--preprocess", "stretch"], "ConfigError: preprocessing must be one of center, squash; got 'stretch'"),
        (["--store-dtype", "int8"], "ConfigError: store_dtype must be one of fp16, fp32; got 'int8'"),
        (["--seed", "-1"], "ConfigError: seed must lie in 0..2^63-1, got -1"),
    ],
)
def test_extraction_refuses_what_it_cannot_do(options: list[str], message: str, run: Run, images: Path) -> None:
    result = run("extract", exported("image").path, images, *options)
    assert message in result.err
    assert result.code in (1, 2)
    assert not Path("features").exists()


def test_export_extract_probe_from_two_commands(run: Run, images: Path) -> None:
    made = run("export", "--model", "dit-digits", "--timestep", "30")
    assert made.code == 0
    assert "parity with the unfolded fp32 network: worst of" in made.out
    assert "t30" in made.out
    assert "30 (log-SNR +" in made.out
    done = run("extract", "artifacts/dit-digits-b3-t30", images)
    assert done.code == 0, done.err
    assert "6 rows in 1 shards" in done.out
    assert "6 samples from" in done.err
    assert Store.open("features/images-dit-digits-b3-t30").taps == ("b3/t30",)


def test_the_newest_artifact_is_taken_and_named(run: Run, images: Path) -> None:
    artifacts = Path("artifacts")
    artifacts.mkdir()
    for age, name in ((50, "image"), (10, "image-constant"), (0, "unfinished.partial")):
        shutil.copytree(exported("image").path, artifacts / name)
        moment = (artifacts / name / "recipe.json").stat().st_mtime - age
        os.utime(artifacts / name / "recipe.json", (moment, moment))
    result = run("extract", "--engine", "ort")
    assert "taking the newest artifact: artifacts/image-constant" in result.err
    assert "no source was given. For example: difffeat extract artifacts/image-constant photos/ -o features/photos" in result.err
    assert result.code == 2


def test_json_is_one_object_and_nothing_else(run: Run, images: Path) -> None:
    result = run("extract", exported("image").path, images, "-o", "out", "--json")
    assert result.err == ""
    assert result.json["rows"] == 6
    assert "text" not in result.json
    assert run("inspect", "out", "--json").json["manifest"]["rows"] == 6
    assert run("inspect", exported("image").path, "--json").json["fingerprint"] == exported("image").recipe.fingerprint


def test_environment_and_file_set_options_and_the_command_line_wins(run: Run, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("options.toml").write_text('[extract]\nbatch-size = 5\nseed = 3\nstore-dtype = "fp32"\n')
    monkeypatch.setenv("DIFFFEAT_SEED", "4")
    monkeypatch.setenv("DIFFFEAT_SHARD_SIZE", "2")
    assert run("--config", "options.toml", "extract", exported("image").path, images, "-o", "out", "--batch-size", "3").code == 0
    manifest = Store.open("out").manifest
    assert (manifest["batch_size"], manifest["recipe"]["run"]["seed"], manifest["recipe"]["run"]["store_dtype"]) == (3, 4, "fp32")
    assert manifest["shards"] == [2, 2, 2]


def test_a_broken_configuration_file_is_named(run: Run) -> None:
    Path("options.toml").write_text("[extract\n")
    result = run("--config", "options.toml", "inspect", ".")
    assert result.code == 2
    assert "ConfigError: --config options.toml cannot be read" in result.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[extract]\nbatch-sise = 5\n", "options.toml, [extract]: 'batch-sise' is not an option that extract knows. Is it batch-size?"),
        ("[extrakt]\nseed = 5\n", "options.toml: 'extrakt' is not a verb's table that difffeat knows. Is it extract?"),
        ("seed = 5\n", "options.toml: 'seed' is not a verb's table that difffeat knows."),
        ("extract = 5\n", "options.toml: 'extract' is not a verb's table that difffeat knows."),
        ("[store.convert]\ntoo = 5\n", "options.toml, [store], [convert]: 'too' is not an option that convert knows. Is it to?"),
    ],
)
def test_names_in_a_configuration_file_that_mean_nothing_are_told(text: str, message: str, run: Run) -> None:
    Path("options.toml").write_text(text)
    result = run("--config", "options.toml", "inspect", ".")
    assert result.code == 2
    assert f"ConfigError: --config {message}" in result.err


def test_quarantine_ends_with_exit_code_3_and_says_where(run: Run, images: Path) -> None:
    (images / "02.png").write_bytes(b"not a picture")
    result = run("extract", exported("image").path, images, "-o", "out")
    assert result.code == 3
    assert "1 samples are in quarantine; the reasons stand in out/quarantine.jsonl" in result.out
    assert "1 × DecodeError at decode; the first is 02: " in run("store", "info", "out").out


def test_a_resume_with_another_option_names_the_difference(run: Run, images: Path) -> None:
    run("extract", exported("image").path, images, "-o", "out")
    result = run("extract", exported("image").path, images, "-o", "out", "--seed", "9")
    assert result.code == 1
    assert "recipe.run.seed: 0 -> 9" in result.err
    again = run("extract", exported("image").path, images, "-o", "out", "--seed", "9", "--overwrite")
    assert again.code == 0


def test_verify_tells_a_whole_store_from_a_spoiled_one(run: Run, images: Path) -> None:
    run("extract", exported("image").path, images, "-o", "out")
    assert run("store", "verify", "out").out == "out: every file is what its receipt says\n"
    shard = Path("out/shards/00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = run("store", "verify", "out")
    assert result.code == 5
    assert "1 problems in out:" in result.out
    assert "00000.safetensors is corrupt: its SHA-256 is not the receipt's. Next: difffeat store repair out" in result.out
    (problem,) = run("store", "verify", "out", "--json").json["problems"]
    assert (problem["file"], problem["kind"], problem["fix"]) == ("shards/00000.safetensors", "wrong-bytes", "difffeat store repair out")


def test_convert_and_diff_print_what_they_did(run: Run, images: Path) -> None:
    run("extract", exported("image").path, images, "-o", "a")
    run("extract", exported("image").path, images, "-o", "b", "--seed", "1")
    assert run("store", "convert", "a", "--to", "npy", "-o", "npy", "--json").json["rows"] == 6
    compared = run("store", "diff", "a", "b", "--json").json
    assert compared["samples"]["compared"] == 6
    assert compared["recipe"] == ["recipe.run.seed: 0 -> 1"]


def test_a_graph_of_someone_else_is_refused(run: Run, images: Path, tmp_path: Path) -> None:
    import onnx

    folder = copy_of("image", tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, folder / "model.onnx")
    result = run("extract", folder, images, "-o", "out")
    assert result.code == 1
    assert "ForeignGraph: " in result.err
    (folder / "recipe.json").unlink()
    assert "Traceback" not in run("extract", folder, images, "-o", "out").err


def test_an_empty_folder_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.pdf").write_bytes(b"x")
    result = run("extract", exported("image").path, tmp_path / "empty", "-o", "out")
    assert result.code == 1
    assert "EmptySource: " in result.err
    assert "holds no samples (passed over: 1 × .pdf). Accepted images: .jpg" in result.err


@pytest.fixture
def stores(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """Image and text stores with labels that colour and caption tell, each with several taps."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(60):
        (tmp_path / f"{index}.png").write_bytes(encoded(index))
        labels = [name for name in ("a", "b") if rng.random() < 0.5]
        captions = " ".join("two" if "a" in labels else "three" for _ in range(3))
        rows.append({"id": str(index), "image": f"{index}.png", "caption": captions, "labels": labels})
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    image = run("extract", exported("sweep").path, manifest, "-o", "image")
    text = run("extract", exported("text-sweep").path, manifest, "-o", "text")
    assert (image.code, text.code) == (0, 0)
    return Path("image"), Path("text")


def test_probe_chooses_a_tap_and_reports_it_once(run: Run, stores: tuple[Path, Path]) -> None:
    result = run("probe", stores[1], "--method", "ridge", "-o", "probed")
    assert result.code == 0, result.err
    assert "<- best" in result.out
    assert "on test (" in result.out
    stored = json.loads(Path("probed/metrics.json").read_text())
    assert stored["interval"]["low"] <= stored["interval"]["value"] <= stored["interval"]["high"] <= 1
    assert Path("probed/probe.safetensors").is_file()
    assert "no tap" in run("probe", stores[1], "--taps", "nonsense").err


def test_fuse_compares_with_each_modality(run: Run, stores: tuple[Path, Path]) -> None:
    result = run("fuse", *stores, "--image-tap", "b2/t30", "--text-tap", "b2/t0", "--width", "16", "--json")
    assert result.code == 0, result.err
    adam = {f"{inputs} (Adam)" for inputs in ("image", "text", "fusion by add", "fusion by concat")}
    assert set(result.json["mAP"]) == adam | {f"{inputs} (ridge)" for inputs in ("image", "text", "fusion by concat")}
    assert {(one["method"], one["of"], one["less"]) for one in result.json["differences"]} >= {
        ("adam", "fusion by add", "text"),
        ("ridge", "fusion by concat", "image"),
    }
    missing = run("fuse", *stores)
    assert missing.code == 2
    assert "has 9 taps; say which with --image-tap, one of: b0/t0" in missing.err


@pytest.mark.parametrize("strategy", ["local", "grid", "halving"])
def test_search_ends_with_a_pair(strategy: str, run: Run, stores: tuple[Path, Path]) -> None:
    result = run("search", *stores, "--strategy", strategy)
    assert result.code == 0, result.err
    assert result.out.startswith("best pair: b")
    assert f"strategy {strategy}; probes: " in result.out


def test_a_latent_cache_is_no_features(run: Run, images: Path) -> None:
    assert run("extract", exported("latents").path, images, "-o", "cache").code == 0
    result = run("probe", "cache")
    assert result.code == 2
    assert "cache is a latent cache, not features. Make features of it first: difffeat extract ARTIFACT SOURCE --latents cache" in result.err


def test_search_refuses_an_unknown_strategy(run: Run, stores: tuple[Path, Path]) -> None:
    assert "strategy must be local, grid or halving, got 'luck'" in run("search", *stores, "--strategy", "luck").err
