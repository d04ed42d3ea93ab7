"""Tasks on the small made-up dataset of conftest.py, and bundles of one random network."""

import torch

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import config_to_dict, load_config
from diff2to3.training.tasks.flow import FlowRunConfig, FlowTask

#: Image latents an asset.
VIEWS = 3


def arguments(root, stage, out, **changes):
    model = {
        "stage": stage, "resolution": 8 if stage == "latents" else 4, "patch_size": 2, "channels": 4, "width": 24,
        "num_heads": 2, "num_double": 1, "num_single": 1, "image_channels": 3, "io_channels": "[8]",
    }  # fmt: skip
    values = {
        "data.root": root,
        "data.latents": ("latents_x" if stage == "latents" else "structures_x"),
        "data.tokens": "tokens_x",
        "data.loader.max_assets_per_batch": 3,
        "data.loader.num_workers": 0,
        "train.out": out,
        "train.steps": 4,
        "train.lr": 1e-3,
        "train.device": "cpu",
        "train.loggers": "[]",
        **{f"model.{k}": v for k, v in model.items()},
        **changes,
    }
    return [f"{k}={v}" for k, v in values.items()]


def task_for(root, stage, out="unused", **changes):
    return FlowTask(load_config(FlowRunConfig, None, arguments(root, stage, out, **changes)))


def random_bundle(tmp_path_factory, name, network, std):
    """A bundle of one network with random weights, and the network."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    folder = tmp_path_factory.mktemp(name)
    entry = NetworkEntry(type(network).__name__, config_to_dict(network.config), f"{name}.safetensors")
    save_bundle(
        folder,
        BundleInfo("vae", {name: entry}, {}, license="MIT", source="test"),
        {name: network.state_dict()},
    )
    return folder, network
