"""Runs under Blender's Python, not under ours: converts the .blend file of FOLDER/job.json to FOLDER/asset.glb.

What would be rendered is exported, with modifiers applied, posed as the file is saved; its cameras, lights,
animations and scripts are not.
"""

from __future__ import annotations

import json
import os
import sys


def main(folder: str) -> None:
    import bpy

    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    bpy.ops.wm.open_mainfile(filepath=os.path.join(folder, job["file"]), load_ui=False, use_scripts=False)
    bpy.ops.export_scene.gltf(
        filepath=os.path.join(folder, "asset.glb"),
        export_format="GLB",
        use_renderable=True,
        export_apply=True,
        export_animations=False,
        export_cameras=False,
        export_lights=False,
    )
    partial = os.path.join(folder, "result.json.part")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"version": bpy.app.version_string, "file": "asset.glb"}, file)
    os.replace(partial, os.path.join(folder, "result.json"))


if __name__ == "__main__":
    main(sys.argv[-1])
