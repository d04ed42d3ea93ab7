"""Train the 2to3-VAE.

python train/vae.py configs/vae/mini.yaml data.root=data/mini train.out=runs/vae-mini
torchrun --nproc-per-node 8 train/vae.py configs/vae/large.yaml data.root=data/large train.out=runs/vae-large
"""

from diff2to3.training.run import main
from diff2to3.training.tasks.vae import VaeRunConfig, VaeTask

if __name__ == "__main__":
    raise SystemExit(main(VaeTask, VaeRunConfig))
