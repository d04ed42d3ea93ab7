"""The parity program over the committed-beside fixtures, and on damaged copies of them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAM = Path(__file__).resolve().parents[1] / "parity" / "trellis.py"


def program():
    spec = importlib.util.spec_from_file_location("parity_trellis", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_fixtures_pass(shared, capsys):
    folder = shared / "parity"
    if not folder.is_dir():
        pytest.skip("no ../shared/parity")
    assert program().main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= {
        "slat_encoder", "slat_decoder_gs", "slat_flow", "ss_encoder", "ss_decoder", "ss_flow"
    }  # fmt: skip
    assert all(line.endswith("ok") for line in lines)


def test_a_wrong_output_and_an_empty_folder_fail(shared, tmp_path, capsys):
    source = shared / "parity" / "ss_decoder.safetensors"
    if not source.is_file():
        pytest.skip("no ../shared/parity/ss_decoder.safetensors")
    assert program().main([str(tmp_path)]) == 1
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    tensors["logits"] = tensors["logits"] * 1.001
    save_file(tensors, tmp_path / "ss_decoder_copy.safetensors", metadata)
    assert program().main([str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_parameters_are_loaded_strictly(shared, tmp_path):
    source = shared / "parity" / "ss_decoder.safetensors"
    if not source.is_file():
        pytest.skip("no ../shared/parity/ss_decoder.safetensors")
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    tensors["param.extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "ss_decoder.safetensors", metadata)
    with pytest.raises(RuntimeError, match="extra"):
        program().main([str(tmp_path)])
    assert json.loads(metadata["config"])["latent_channels"] == 8
