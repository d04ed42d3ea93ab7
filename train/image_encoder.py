"""Train the mini preset's image encoder: python train/image_encoder.py configs/image_encoder/mini.yaml"""

from diff2to3.training.run import main
from diff2to3.training.tasks.image_encoder import ImageEncoderRunConfig, ImageEncoderTask

if __name__ == "__main__":
    raise SystemExit(main(ImageEncoderTask, ImageEncoderRunConfig))
