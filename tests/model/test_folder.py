"""Model folders: what is written is read back bit for bit, and what is damaged is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[OpenMythos, Path]:
    model = tiny_model(tiny_config())
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_round_trip_is_bit_exact(attn_type: str, tie: bool, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(attn_type, tie_embeddings=tie))
    model.save_pretrained(tmp_path)
    found = OpenMythos.from_pretrained(tmp_path)
    assert found.config == model.config
    assert not found.training
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    ids = random_ids(model.config, 2, 6)
    assert torch.equal(found(ids, 4), model(ids, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_the_dtype_is_that_of_the_saved_model(attn_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(attn_type)).to(dtype)
    model.save_pretrained(tmp_path)
    found = OpenMythos.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    state = model.state_dict()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    ids = random_ids(model.config, 2, 6)
    assert torch.equal(found(ids, 4), model(ids, 4))


def test_a_single_layer_in_another_dtype_keeps_it(tmp_path: Path) -> None:
    model = tiny_model(tiny_config()).to(torch.bfloat16)
    model.norm.float()
    model.save_pretrained(tmp_path)
    dtypes = {name: parameter.dtype for name, parameter in OpenMythos.from_pretrained(tmp_path).named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {"norm.weight"}


def test_a_folder_holds_json_and_safetensors_and_nothing_else(saved: tuple[OpenMythos, Path]) -> None:
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "open_mythos"
    assert config["format_version"] == 1
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_the_router_bias_is_saved_and_derived_tables_are_not(saved: tuple[OpenMythos, Path]) -> None:
    """Rotary tables in a checkpoint would make the context length part of the weights."""
    names = load_file(saved[1] / "model.safetensors").keys()
    assert any("router_bias" in name for name in names)
    assert not any("rotary" in name or "rope" in name or "decays" in name for name in names)


def test_a_longer_context_loads_the_same_weights(saved: tuple[OpenMythos, Path]) -> None:
    model, folder = saved
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_seq_len": 4096}))
    ids = random_ids(model.config, 1, 6)
    assert torch.equal(OpenMythos.from_pretrained(folder)(ids, 3), model(ids, 3))


def test_saving_again_replaces_the_folder(saved: tuple[OpenMythos, Path]) -> None:
    model, folder = saved
    with torch.no_grad():
        model.embed.weight.add_(1)
    model.save_pretrained(str(folder))
    assert torch.equal(OpenMythos.from_pretrained(str(folder)).embed.weight, model.embed.weight)


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["embed.weight"]
    save_file(weights, folder / "model.safetensors")


def _with_a_tensor_too_many(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "zebra": torch.zeros(1)}, folder / "model.safetensors")


def _with_whole_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "norm.weight": weights["norm.weight"].long()}, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors"),
    "weights truncated": (_truncate, r"model\.safetensors is damaged"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
    "weights are text": (lambda folder: (folder / "model.safetensors").write_text("hello"), r"is damaged"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{dim:"), r"config\.json is not valid JSON"),
    "config binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), r"not valid JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), r"must be a JSON object"),
    "newer version": (lambda folder: _edit_config(folder, format_version=2), r"format_version is 2.*up to 1"),
    "unknown key": (lambda folder: _edit_config(folder, magic=1), r"unknown config keys \['magic'\]"),
    "another architecture": (lambda folder: _edit_config(folder, model_type="llama"), r"model_type is 'llama'"),
    "wrong field": (lambda folder: _edit_config(folder, n_heads=3), r"n_heads is 3"),
    "wrong shapes": (lambda folder: _edit_config(folder, vocab_size=18), r"'embed.weight'.*\(17, 16\).*\(18, 16\)"),
    "missing tensor": (_without_a_tensor, r"'embed\.weight'.*missing"),
    "whole numbers": (_with_whole_numbers, r"'norm\.weight' as torch\.int64; it must be of a floating-point type"),
    "tensor too many": (_with_a_tensor_too_many, r"'zebra'.*absent"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(case: str, saved: tuple[OpenMythos, Path]) -> None:
    damage, said = DAMAGE[case]
    damage(saved[1])
    with pytest.raises(ValueError, match=said):
        OpenMythos.from_pretrained(saved[1])


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*config\.json"):
        OpenMythos.from_pretrained(tmp_path / "nowhere")


def test_saving_that_fails_keeps_the_old_weights(
    saved: tuple[OpenMythos, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    before = (folder / "model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("open_mythos.model.folder.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    OpenMythos.from_pretrained(folder)
