"""Train the 2to3-VAE in the photo frame.

python train/photo_vae.py configs/photo_vae/mini.yaml data.root=data/mini train.init_from=runs/vae-mini
"""

from diff2to3.training.run import main
from diff2to3.training.tasks.photo_vae import PhotoVaeRunConfig, PhotoVaeTask

if __name__ == "__main__":
    raise SystemExit(main(PhotoVaeTask, PhotoVaeRunConfig))
