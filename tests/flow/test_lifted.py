"""What the condition image says about each voxel, in both stages: added at the input, and absent without an image."""

import pytest
import torch

from diff2to3.flow.config import LatentSMDiTConfig, SMDiTConfig
from diff2to3.flow.smdit import LatentSMDiT, StructureSMDiT
from diff2to3.flow.tokens import ImageTokens
from diff2to3.types import SparseVoxels

SIZES = {
    "width": 16,
    "image_channels": 3,
    "image_patch_size": 1,
    "num_double": 1,
    "num_single": 1,
    "num_heads": 2,
}


def image(batch_size: int) -> ImageTokens:
    return ImageTokens.from_latents(torch.randn(batch_size, 3, 4, 4), 1)


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Weights of the output layer start at zero: every output would be too."""
    torch.nn.init.normal_(network.out_layer.weight)
    return network.eval()


@torch.no_grad()
def test_latents_are_moved_by_what_is_lifted_as_by_the_sum_at_the_input_layer() -> None:
    torch.manual_seed(0)
    config = LatentSMDiTConfig(
        resolution=8, in_channels=2, out_channels=2, lifted_channels=5, patch_size=2, io_channels=[8], **SIZES
    )
    network = awake(LatentSMDiT(config))
    coords = torch.cat([torch.zeros(20, 1), torch.randint(0, 8, (20, 3))], 1).unique(dim=0).to(torch.int32)
    voxels = SparseVoxels.from_coords(coords, torch.randn(len(coords), 2), 8, 1)
    lifted, t, tokens = torch.randn(len(coords), 5), torch.tensor([0.7]), image(1)
    got = network(voxels, t, tokens, lifted=lifted)
    without = network(voxels, t, tokens)
    assert torch.equal(without, network(voxels, t, tokens, lifted=torch.zeros_like(lifted)))
    assert not torch.allclose(got, without, atol=1e-3)
    # the same network with one wide input layer over both
    wide = awake(LatentSMDiT(LatentSMDiTConfig(**{**vars(config), "in_channels": 7, "lifted_channels": 0})))
    state = network.state_dict()
    state["input_layer.weight"] = torch.cat(
        [state["input_layer.weight"], state.pop("lifted_layer.weight")], 1
    )
    wide.load_state_dict(state)
    both = voxels.with_feats(torch.cat([voxels.feats, lifted], 1))
    torch.testing.assert_close(got, wide(both, t, tokens))


@torch.no_grad()
def test_so_are_grids() -> None:
    torch.manual_seed(1)
    config = SMDiTConfig(
        resolution=4, in_channels=2, out_channels=2, lifted_channels=5, patch_size=2, **SIZES
    )
    network = awake(StructureSMDiT(config))
    latents, lifted = torch.randn(2, 2, 4, 4, 4), torch.randn(2, 5, 4, 4, 4)
    lifted[1] = 0
    t, tokens = torch.tensor([0.3, 0.9]), image(2)
    got, without = network(latents, t, tokens, lifted=lifted), network(latents, t, tokens)
    torch.testing.assert_close(got[1], without[1])
    assert not torch.allclose(got[0], without[0], atol=1e-3)


def test_wrong_shapes_and_networks_that_take_none_say_so() -> None:
    config = SMDiTConfig(resolution=4, in_channels=2, out_channels=2, lifted_channels=5, **SIZES)
    latents, t = torch.randn(1, 2, 4, 4, 4), torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"lifted: expected \[1, 5, 4, 4, 4\], got \[1, 4, 4, 4, 4\]"):
        StructureSMDiT(config)(latents, t, image(1), lifted=torch.randn(1, 4, 4, 4, 4))
    plain = StructureSMDiT(SMDiTConfig(resolution=4, in_channels=2, out_channels=2, **SIZES))
    with pytest.raises(ValueError, match="takes no lifted features"):
        plain(latents, t, image(1), lifted=torch.randn(1, 5, 4, 4, 4))
    with pytest.raises(ValueError, match="lifted_channels: expected no negative number"):
        SMDiTConfig(lifted_channels=-1)
