"""train.conv_backend and train.attention_backend: that they reach the layers of the models that are trained."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from flow_runs import arguments, task_for

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.flow.networks import FlowConfig, build_network
from diff2to3.kernels.sparse_conv import submanifold_conv
from diff2to3.nn.backends import use_backends
from diff2to3.training.run import main
from diff2to3.training.task import Randomness
from diff2to3.training.tasks.flow import FlowRunConfig, FlowTask
from diff2to3.vae.config import EncoderConfig
from diff2to3.vae.encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def spconv_calls(monkeypatch):
    """spconv replaced by the project's own convolution; the list grows by one a call."""
    calls = []

    def stand_in(feats, weight, bias, plan):
        calls.append(len(feats))
        return submanifold_conv(feats, weight, bias, plan)

    monkeypatch.setattr("diff2to3.nn.sparse_conv.require_spconv", lambda: None)
    monkeypatch.setattr("diff2to3.nn.sparse_conv.submanifold_conv_spconv", stand_in)
    return calls


@pytest.fixture
def xformers_calls(monkeypatch):
    """xformers replaced by attention sequence by sequence; the list grows by one a call."""
    calls = []

    def attend(q, k, v, attn_bias, scale):
        calls.append(attn_bias)
        parts = [
            t[0].transpose(0, 1).split(n, 1)
            for t, n in zip((q, k, v), (*attn_bias, attn_bias[1]), strict=True)
        ]
        outs = [F.scaled_dot_product_attention(*qkv, scale=scale) for qkv in zip(*parts, strict=True)]
        return torch.cat(outs, 1).transpose(0, 1)[None]

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.__spec__ = ModuleSpec("xformers", None)
    package.ops = ops
    ops.fmha = SimpleNamespace(BlockDiagonalMask=SimpleNamespace(from_seqlens=lambda q, k: (q, k)))
    ops.memory_efficient_attention = attend
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def test_the_objective_runs_on_what_was_chosen_and_gives_the_same(dataset, spconv_calls, xformers_calls):
    task = task_for(dataset, "latents")
    torch.manual_seed(0)
    objective = task.objective()
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    batch = next(iter(task.loader(0, 0, 1)))
    before, keys = objective(batch, Randomness(3, 5))["loss"], list(objective.state_dict())
    assert not spconv_calls and not xformers_calls
    use_backends(objective, convolution="spconv", attention="xformers")
    after = objective(batch, Randomness(3, 5))["loss"]
    assert len(spconv_calls) == 2 * (2 + 2)  # two convolutions a block, two blocks on each side
    assert len(xformers_calls) == 1 + 1  # one double block, one single block
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert list(objective.state_dict()) == keys


def test_the_command_hands_them_on(dataset, tmp_path, spconv_calls, xformers_calls):
    chosen = {"train.conv_backend": "spconv", "train.attention_backend": "xformers", "train.steps": 1}
    out, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text("{}")
    assert main(FlowTask, FlowRunConfig, [str(config), *arguments(dataset, "latents", out, **chosen)]) == 0
    assert spconv_calls and xformers_calls
    text = (out / "config.yaml").read_text()
    assert "conv_backend: spconv" in text
    bundles = list(out.rglob("model.json"))
    assert bundles and not any("spconv" in path.read_text() for path in bundles)  # not the model's business


def test_the_vae_takes_both(spconv_calls):
    config = EncoderConfig(resolution=8, width=24, num_blocks=2, num_heads=2, block="alternating")
    encoder = Encoder(config)
    use_backends(encoder, convolution="spconv", attention="sdpa")
    assert encoder.blocks[0].attn.backend == "sdpa"
    assert encoder.blocks[1].conv1.conv.backend == "spconv"


def test_what_cannot_be_chosen_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    small = {"width": 24, "num_heads": 2, "num_double": 1, "num_single": 1, "io_channels": [8]}
    latents = build_network(FlowConfig(stage="latents", **small))
    with pytest.raises(MissingDependencyError, match=r"diff2to3\[xformers\]"):
        use_backends(latents, attention="xformers")
    with pytest.raises(MissingDependencyError, match=r"diff2to3\[spconv\]"):
        use_backends(latents, convolution="spconv")
    with pytest.raises(InputError, match=r"conv_backend: .*expected one of"):
        use_backends(latents, convolution="torchsparse")
    with pytest.raises(InputError, match="attention_backend: expected one of"):
        use_backends(latents, attention="triton")
    cross = build_network(FlowConfig(stage="latents", io_kernel="cross", **small))
    with pytest.raises(InputError, match=r"conv_backend: .*no kernel 'cross'"):
        use_backends(cross, convolution="spconv")
    with pytest.raises(InputError, match="conv_backend: the network has no sparse convolution"):
        use_backends(build_network(FlowConfig(stage="structure", **small)), convolution="spconv")
    assert {m.backend for m in latents.modules() if hasattr(m, "backend")} == {"auto"}
