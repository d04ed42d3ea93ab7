"""A photo in; the asset as files for viewers, the photo's view of it, and a textured mesh out.

python examples/generate.py eval/examples/suv.png out/
"""

import sys
from pathlib import Path

from diff2to3 import ImageTo3D

photo, out = sys.argv[1], Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)

model = ImageTo3D.from_pretrained("mini-photo")
result = model(photo, seed=1)

for name in ("asset.ply", "asset.glb", "asset.spz"):  # the ending chooses the format
    result.save(out / name)
result.render(size=512).save(out / "from_the_photo.png")

print(
    f"{len(result.gaussians):,} Gaussians on {len(result.coords):,} voxels in {sum(result.seconds.values()):.1f} s"
)
print(f"camera: {result.camera.elevation:.1f} degrees above the horizon")
print(*sorted(path.name for path in out.iterdir()))
