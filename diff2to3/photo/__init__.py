"""Stage 1 in the photo frame: where the object is, from one photo whose camera is predicted with it.

photo ──▶ maps ──▶ PhotoEncoder ──▶ PhotoFeatures: plane, frustum, depth, tokens, camera
          (frozen                        │
           EfficientNet)                 ▼ lifted onto voxels at the camera
noise [B, 1, 32, 32, 32] ─────────▶ OccupancyFlow, several steps ──▶ voxels

layers.py     residual blocks and attention shared by both networks
maps.py       what the frozen image network says of a photo
encoder.py    PhotoEncoder, and the camera that it predicts
frustum.py    voxels of the photo frame <-> positions in the photo
occupancy.py  OccupancyFlow, and how it is sampled
"""
