"""Train a flow model of either stage.

python train/flow.py configs/flow/structure_mini.yaml
torchrun --nproc-per-node 8 train/flow.py configs/flow/structure_large.yaml data.root=data/large
"""

from diff2to3.training.run import main
from diff2to3.training.tasks.flow import FlowRunConfig, FlowTask

if __name__ == "__main__":
    raise SystemExit(main(FlowTask, FlowRunConfig))
