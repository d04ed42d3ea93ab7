"""Metrics of images, sets of images and shapes. Every function names its source and what degenerate input
gives.

    image.py         PSNR, PSNR of the foreground, SSIM, CIEDE2000      a number a view
    lpips.py         LPIPS                                              a number a view; differentiable
    pairs.py         the above between two sets of pictures             means over views
    features.py      Inception-v3, DINOv2 and CLIP features             [N, C], weights recorded by hash
    distribution.py  FD and KD between sets of features                 streaming
    geometry.py      voxel IoU, Chamfer distance, F-score               between point sets and voxel grids
    weights.py       where an extractor's weights are, and which they were
"""
