"""Train stage 1 in the photo frame: the photo encoder with its camera, and the occupancy flow.

python train/occupancy.py configs/occupancy/mini.yaml data.root=data/mini
"""

from diff2to3.training.run import main
from diff2to3.training.tasks.occupancy import OccupancyRunConfig, OccupancyTask

if __name__ == "__main__":
    raise SystemExit(main(OccupancyTask, OccupancyRunConfig))
