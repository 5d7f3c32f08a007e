"""What people save is read without code, and which of several copies is taken is said."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difffeat.errors import CheckpointMismatch, UntrustedFile
from tests.export.checkpoints import load, saved, state

RAW, AVERAGED = state(1), state(0)


def named(prefix: str, tensors: dict[str, Any] = AVERAGED) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_averaged(path: Path) -> tuple[str, ...]:
    loaded = load(path)
    assert all(torch.equal(loaded.tensors[name], AVERAGED[name]) for name in AVERAGED)
    return loaded.notes


@dataclass
class Settings:
    """Pickled by its class's name."""

    lr: float = 1e-4
    prediction: str = "epsilon"


BESIDE: dict[str, Any] = {
    "args": argparse.Namespace(lr=np.float32(1e-4), results=pathlib.PosixPath("/results"), num_classes=5, sizes=np.arange(3)),
    "rng": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
    "generator": np.random.default_rng(0),
    "steps": np.int64(7),
    "loss": np.float64(0.5),
    "history": collections.defaultdict(list, {"loss": [np.float64(1.0)]}),
    "when": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
}


def test_settings_of_the_training_scripts_own_class_are_read_as_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Settings", Settings, raising=False)
    path = saved(tmp_path, {"ema": AVERAGED, "config": Settings(lr=0.5, prediction="velocity")})
    monkeypatch.delattr(sys.modules["__main__"], "Settings")
    with pytest.raises(CheckpointMismatch, match=r"config\.prediction = 'velocity', where DiT has 'epsilon'"):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_with_all_that_scripts_put_beside_the_weights_is_read(tmp_path: Path, zipped: bool) -> None:
    notes = assert_averaged(saved(tmp_path, {"model": RAW, "ema": AVERAGED, **BESIDE}, _use_new_zipfile_serialization=zipped))
    assert notes == ("the file holds averaged and raw weights: the averaged ones ('ema') are taken, not 'model'",)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "ema_model.", "net.", "diffusion_model.", "module._orig_mod.model.", "a.b.c.d."],
)
def test_prefixes_of_wrappers_are_taken_off_in_any_order(tmp_path: Path, prefix: str) -> None:
    assert_averaged(saved(tmp_path, named(prefix)))


def test_wrappers_inside_a_network_are_taken_out(tmp_path: Path) -> None:
    inside = {
        name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module.").replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): tensor
        for name, tensor in AVERAGED.items()
    }
    assert_averaged(saved(tmp_path, {"state_dict": inside}))


LAYOUTS: dict[str, dict[str, Any]] = {
    "lightning": {"state_dict": {**named("model.", RAW), **named("ema_model."), "vae.x": torch.zeros(1)}, "hyper_parameters": {"lr": 1e-4}},
    "basicsr": {"params": RAW, "params_ema": AVERAGED},
    "timm": {"state_dict": RAW, "state_dict_ema": AVERAGED},
    "ema-pytorch": {"ema": {**named("online_model.", RAW), **named("ema_model."), "initted": torch.tensor(True)}},
    "deepspeed": {"module": AVERAGED, "dp_world_size": 8, "optimizer": None},
    "swa": {"n_averaged": torch.tensor(3), **named("module.")},
    "ema is a number": {"ema": 0.999, "model": AVERAGED},
    "one dict twice": {"model": AVERAGED, "ema": AVERAGED},
    "numpy": {name: tensor.numpy() for name, tensor in AVERAGED.items()},
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in AVERAGED.items()},
    "litema": {"state_dict": {**named("model.", RAW), **{f"model_ema.{k.replace('.', '')}": v for k, v in AVERAGED.items()}}},
    "latent diffusion": {
        "state_dict": {
            **named("model.diffusion_model.", RAW),
            **{f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in AVERAGED.items()},
            "model_ema.decay": torch.tensor(0.9),
        }
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_trainers_are_read_and_averages_win(tmp_path: Path, layout: str) -> None:
    assert_averaged(saved(tmp_path, LAYOUTS[layout]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"ema_0.999": RAW, "ema_0.9999": AVERAGED}, r"holds 2 copies of the network.*ema_0\.999, ema_0\.9999\. Save the one"),
        ({"student": RAW, "teacher": AVERAGED}, "student, teacher"),
        ({"shadow_params": list(RAW.values()), "decay": 0.9}, "holds no flat dict of tensors"),
        ([1, 2], "a list: names are lost"),
        ({}, "an empty dict"),
        ({"down_blocks.0.x": torch.zeros(1)}, "Its names are those of a UNet"),
        ({"blocks.0.attn.qkv.lora_A.weight": torch.zeros(1)}, "It is a LoRA"),
        ({"joint_blocks.0.x": torch.zeros(1)}, "SD3 or FLUX"),
        ({name: tensor.to("meta") for name, tensor in RAW.items()}, r"has a shape and no data: it was saved from the meta device"),
        ({**RAW, "pos_embed": RAW["pos_embed"].to_sparse()}, "pos_embed is not a plain tensor"),
        ({**RAW, "y_embedder.embedding_table.weight": torch.zeros(1, 32).expand(10**9, 32)}, "its storage holds fewer"),
    ],
)
def test_what_cannot_be_read_says_what_it_is(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(CheckpointMismatch, match=words):
        load(saved(tmp_path, content))


def test_shared_and_strided_tensors_are_read(tmp_path: Path) -> None:
    """A view of a large tensor, and one with its axes swapped."""
    strided = {**AVERAGED, "blocks.0.attn.proj.weight": AVERAGED["blocks.0.attn.proj.weight"].t().contiguous().t()}
    strided["t_embedder.mlp.0.bias"] = torch.cat([AVERAGED["t_embedder.mlp.0.bias"], torch.zeros(10_000)])[:32]
    assert_averaged(saved(tmp_path, strided))


class Call:
    """Calls what it is given when it is unpickled without care."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("call", [Call(eval, "1 + 1"), Call(getattr, "x", "upper"), Call(np.fromfile, "/dev/null"), Call(torch.load, "x")])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_beside_the_weights_is_refused_by_name_without_advice_to_trust_it(tmp_path: Path, call: Call, zipped: bool) -> None:
    path = saved(tmp_path, {"ema": AVERAGED, "x": call}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UntrustedFile) as caught:
        load(path)
    message = str(caught.value)
    assert call.function.__name__ in message
    for word in ("\x1b", "weights_only", "add_safe_globals", "safe_globals", "allowlist", "if you trust"):
        assert word not in message


def test_a_whole_module_is_named_for_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UntrustedFile, match=r"it is a whole module .*from model\.state_dict\(\)"):
        load(saved(tmp_path, torch.nn.Sequential(torch.nn.Linear(2, 2))))


def test_containers_that_hold_one_another_many_times_are_walked_once(tmp_path: Path) -> None:
    nested: dict[str, Any] = {"k": 1}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    circle: list[Any] = []
    circle.append(circle)
    assert_averaged(saved(tmp_path, {"ema": AVERAGED, "x": nested, "y": circle}))
