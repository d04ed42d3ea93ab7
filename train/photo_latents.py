"""Train stage 2 in the photo frame: SMDiT on the latents, with what the photo says of each voxel.

python train/photo_latents.py configs/photo_latents/mini.yaml data.root=data/mini
"""

from diff2to3.training.run import main
from diff2to3.training.tasks.photo_latents import PhotoLatentRunConfig, PhotoLatentTask

if __name__ == "__main__":
    raise SystemExit(main(PhotoLatentTask, PhotoLatentRunConfig))
