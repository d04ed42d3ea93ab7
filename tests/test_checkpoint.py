"""Bundles and strict loading."""

import json

import pytest
import torch
from torch import nn

from diff2to3.checkpoint import (
    BundleInfo,
    NetworkEntry,
    check_hashes,
    load_strictly,
    read_bundle,
    save_bundle,
)
from diff2to3.errors import InputError
from diff2to3.tensors import read_tensors, save_tensors


def small_bundle(folder):
    tensors = {"weight": torch.randn(3, 2), "bias": torch.randn(3).half()}
    info = BundleInfo(
        "image-to-3d",
        {"a": NetworkEntry("Linear", {"n": 3}, "a.safetensors", half=True)},
        {"steps": 5},
        "MIT",
        "here",
    )
    return tensors, save_bundle(folder, info, {"a": tensors})


def test_a_bundle_comes_back_as_it_was(tmp_path):
    tensors, info = small_bundle(tmp_path / "bundle")
    assert read_bundle(tmp_path / "bundle") == info
    check_hashes(tmp_path / "bundle", info)
    back = read_tensors(tmp_path / "bundle" / "a.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    assert {p.name for p in (tmp_path / "bundle").iterdir()} == {"model.json", "a.safetensors"}


def test_damage_is_found(tmp_path):
    _, info = small_bundle(tmp_path)
    path = tmp_path / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.safetensors: damaged"):
        check_hashes(tmp_path, info)
    path.write_bytes(data[:-3])
    with pytest.raises(InputError, match=r"a\.safetensors: not a complete safetensors file"):
        read_tensors(path)
    path.unlink()
    for find in (lambda: check_hashes(tmp_path, info), lambda: read_tensors(path)):
        with pytest.raises(InputError, match=r"a\.safetensors: no such file"):
            find()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, 'expected "format"'),
        ({"version": 2}, "version 2 is not 1"),
        ({"networks": {"a": {"type": "Linear"}}}, "damaged"),
        ({"networks": {"a": {"type": "L", "config": {}, "file": "../a.safetensors"}}}, "not in the folder"),
    ],
)
def test_bad_model_json(tmp_path, change, message):
    small_bundle(tmp_path)
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        read_bundle(tmp_path)


def test_unreadable_model_json(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_bundle(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_bundle(tmp_path)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        read_bundle(tmp_path)


def test_loading_is_strict(tmp_path):
    network = nn.Linear(2, 3)
    good = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    load_strictly(network, good, "w")
    assert torch.equal(network.weight, good["weight"])
    for bad, message in (
        ({"weight": good["weight"]}, "w: does not fit the network: no tensor 'bias'$"),
        ({**good, "extra": good["bias"]}, "unexpected tensor 'extra'"),
        ({**good, "bias": torch.zeros(4)}, r"'bias' is \[4\], not \[3\]"),
        ({}, r"no tensor 'weight' \(and 1 more\)"),
    ):
        with pytest.raises(InputError, match=message):
            load_strictly(network, bad, "w")


def test_networks_on_the_meta_device_are_filled_in_their_dtype(tmp_path):
    with torch.device("meta"):
        network = nn.Linear(2, 3, dtype=torch.bfloat16)
    load_strictly(network, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "w")
    assert network.weight.dtype == torch.bfloat16 and not network.weight.is_meta
    assert isinstance(network.weight, nn.Parameter) and network.weight.requires_grad


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    with pytest.raises(OSError):
        save_tensors(tmp_path / "none" / "a.safetensors", {"x": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
