"""Train the sparse-structure VAE: python train/structure_vae.py configs/structure_vae/mini.yaml"""

from diff2to3.training.run import main
from diff2to3.training.tasks.structure_vae import StructureVaeRunConfig, StructureVaeTask

if __name__ == "__main__":
    raise SystemExit(main(StructureVaeTask, StructureVaeRunConfig))
