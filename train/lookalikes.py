"""What training views tell of their objects by the assets that look alike: targets of stage 1, and its prototypes.

python train/lookalikes.py configs/flow/structure_mini.yaml data.root=data/mini train.out=runs/lookalikes
python train/flow.py configs/flow/structure_mini.yaml data.root=data/mini train.init_from=runs/lookalikes …

Writes the stage that data.expected names into the data set, and into train.out a bundle to begin with: stage 1 with
prototypes (model.coarse_prototypes); the rest of its weights are new, or train.init_from's. Takes minutes and, for the
33,000 views of the mini data set, 6 GiB.
"""

from diff2to3.training.tasks.lookalikes import main

if __name__ == "__main__":
    raise SystemExit(main())
