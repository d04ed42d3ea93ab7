"""Runs under Blender's Python, not under ours: `python blender_script.py FOLDER` renders FOLDER/job.json.

It imports bpy, numpy and the standard library only. The scene is built from arrays, so no file format,
animation or pose of Blender's importers comes into it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

import numpy as np

#: Lights of the published training sets (TRELLIS's data set toolkit): type, position, watts, size.
PUBLISHED_LIGHTS = (
    ("POINT", (4, 1, 6), 1000, None),
    ("AREA", (0, 0, 10), 10000, 100),
    ("AREA", (0, 0, -10), 1000, 1),
)

#: Not "color": Cycles has an attribute of its own by that name, which is black.
EMISSIVE_LAYER = "emissive_uvs"
COLOR_LAYER = "vertex_color"


def main(folder: str) -> None:
    import bpy

    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    scene_arrays = dict(np.load(os.path.join(folder, "scene.npz")))
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    set_up_cycles(bpy, scene, job)
    materials = [make_material(bpy, spec, folder, job) for spec in job["materials"]]
    make_object(bpy, scene, scene_arrays, materials)
    if job["blender"]["look"] == "published" and job["lights"]["mode"] != "unlit":
        add_published_lights(bpy, scene)
    else:
        add_studio(bpy, scene, job["lights"])
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(camera)
    scene.camera = camera
    files = []
    for index, viewmat in enumerate(scene_arrays["viewmats"]):
        place_camera(camera, viewmat, scene_arrays["Ks"][index], job["width"], job["height"])
        files.append(f"{index:04d}.png")
        scene.render.filepath = os.path.join(folder, files[-1])
        bpy.ops.render.render(write_still=True)
    partial = os.path.join(folder, "result.json.part")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"version": bpy.app.version_string, "files": files}, file)
    os.replace(partial, os.path.join(folder, "result.json"))


def set_up_cycles(bpy: Any, scene: Any, job: Any) -> None:
    options = job["blender"]
    published = options["look"] == "published" and job["lights"]["mode"] != "unlit"
    scene.render.engine = "CYCLES"
    scene.render.resolution_x, scene.render.resolution_y = job["width"], job["height"]
    scene.render.resolution_percentage = 100
    scene.render.film_transparent = True
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    scene.render.image_settings.compression = 15
    scene.render.dither_intensity = 0
    scene.view_settings.view_transform = "Filmic" if published else "Standard"
    if options["threads"]:
        scene.render.threads_mode, scene.render.threads = "FIXED", options["threads"]
    scene.render.use_persistent_data = True
    cycles = scene.cycles
    cycles.samples = options["samples"]
    cycles.use_adaptive_sampling = False
    cycles.pixel_filter_type, cycles.filter_width = "BOX", 1
    cycles.max_bounces = 4
    cycles.diffuse_bounces = cycles.glossy_bounces = 1 if published else 0
    cycles.transmission_bounces = 3
    cycles.transparent_max_bounces = job["max_layers"]
    cycles.use_denoising = options["denoise"] != "none"
    if cycles.use_denoising:
        cycles.denoiser = "OPENIMAGEDENOISE"
        cycles.denoising_prefilter = "FAST" if options["denoise"] == "fast" else "ACCURATE"
        if hasattr(cycles, "denoising_quality"):
            cycles.denoising_quality = "FAST" if options["denoise"] == "fast" else "HIGH"
    if options["device"] != "CPU":
        preferences = bpy.context.preferences.addons["cycles"].preferences
        preferences.compute_device_type = options["device"]
        preferences.get_devices()
        for device in preferences.devices:
            device.use = True
        cycles.device = "GPU"


def make_object(bpy: Any, scene: Any, arrays: dict[str, np.ndarray], materials: list[Any]) -> None:
    vertices, faces = arrays["vertices"], arrays["faces"].astype(np.int32)
    mesh = bpy.data.meshes.new("asset")
    mesh.vertices.add(len(vertices))
    mesh.vertices.foreach_set("co", vertices.reshape(-1))
    mesh.loops.add(faces.size)
    mesh.loops.foreach_set("vertex_index", faces.reshape(-1))
    mesh.polygons.add(len(faces))
    mesh.polygons.foreach_set("loop_start", np.arange(0, faces.size, 3, dtype=np.int32))
    for material in materials:
        mesh.materials.append(material)
    mesh.polygons.foreach_set("material_index", arrays["material_ids"].astype(np.int32))
    corners = faces.reshape(-1)
    for layer in ("uvs", EMISSIVE_LAYER):  # textures read the first layer unless they name another
        if layer in arrays:
            uvs = arrays[layer][corners].astype(np.float32)
            uvs[:, 1] = 1 - uvs[:, 1]  # Blender's v points up
            mesh.uv_layers.new(name=layer).data.foreach_set("uv", uvs.reshape(-1))
    if "colors" in arrays:
        layer = mesh.color_attributes.new(COLOR_LAYER, "FLOAT_COLOR", "POINT")
        layer.data.foreach_set("color", arrays["colors"].astype(np.float32).reshape(-1))
    mesh.update(calc_edges=True)
    if "normals" in arrays:
        mesh.polygons.foreach_set("use_smooth", np.ones(len(faces), bool))
        mesh.normals_split_custom_set_from_vertices(arrays["normals"].tolist())
    else:
        mesh.polygons.foreach_set("use_smooth", np.zeros(len(faces), bool))
    mesh.validate()
    scene.collection.objects.link(bpy.data.objects.new("asset", mesh))


def make_material(bpy: Any, spec: Any, folder: str, job: Any) -> Any:
    material = bpy.data.materials.new(spec["name"] or "material")
    material.use_nodes = True
    tree = material.node_tree
    tree.nodes.clear()
    output = tree.nodes.new("ShaderNodeOutputMaterial")
    color, alpha = base_color(bpy, tree, spec, folder, job["has_colors"])
    shadeless = job["lights"]["mode"] == "unlit" or spec["unlit"]
    if shadeless:
        shader = tree.nodes.new("ShaderNodeEmission")
        tree.links.new(color, shader.inputs["Color"])
        emission = emissive_color(bpy, tree, spec, folder)
        if emission is not None:
            tree.links.new(add_colors(tree, color, emission), shader.inputs["Color"])
        surface = shader.outputs["Emission"]
    else:
        shader = tree.nodes.new("ShaderNodeBsdfPrincipled")
        tree.links.new(color, shader.inputs["Base Color"])
        shader.inputs["Metallic"].default_value = spec["metallic_factor"]
        shader.inputs["Roughness"].default_value = spec["roughness_factor"]
        emission = emissive_color(bpy, tree, spec, folder)
        if emission is not None:
            tree.links.new(emission, shader.inputs["Emission Color"])
            shader.inputs["Emission Strength"].default_value = 1
        surface = shader.outputs["BSDF"]
    if spec["alpha_mode"] != "OPAQUE":
        if spec["alpha_mode"] == "MASK":
            alpha = math_node(tree, "GREATER_THAN", alpha, spec["alpha_cutoff"] - 1e-4)
        mix = tree.nodes.new("ShaderNodeMixShader")
        tree.links.new(alpha, mix.inputs[0])
        tree.links.new(tree.nodes.new("ShaderNodeBsdfTransparent").outputs[0], mix.inputs[1])
        tree.links.new(surface, mix.inputs[2])
        surface = mix.outputs[0]
    tree.links.new(surface, output.inputs["Surface"])
    return material


def base_color(bpy: Any, tree: Any, spec: Any, folder: str, has_colors: bool) -> tuple[Any, Any]:
    """(colour socket, alpha socket) of factor x vertex colour x texture."""
    factor = tree.nodes.new("ShaderNodeRGB")
    factor.outputs[0].default_value = spec["base_color_factor"]
    color = factor.outputs[0]
    alpha = tree.nodes.new("ShaderNodeValue").outputs[0]
    alpha.default_value = spec["base_color_factor"][3]
    if has_colors:
        attribute = tree.nodes.new("ShaderNodeAttribute")
        attribute.attribute_name = COLOR_LAYER
        color = multiply_colors(tree, color, attribute.outputs["Color"])
        alpha = math_node(tree, "MULTIPLY", alpha, attribute.outputs["Alpha"])
    if spec["base_color_texture"] is not None:
        image = image_node(bpy, tree, spec["base_color_texture"], folder)
        color = multiply_colors(tree, color, image.outputs["Color"])
        alpha = math_node(tree, "MULTIPLY", alpha, image.outputs["Alpha"])
    return color, alpha


def emissive_color(bpy: Any, tree: Any, spec: Any, folder: str) -> Any:
    if not any(spec["emissive_factor"]):
        return None
    factor = tree.nodes.new("ShaderNodeRGB")
    factor.outputs[0].default_value = (*spec["emissive_factor"], 1)
    if spec["emissive_texture"] is None:
        return factor.outputs[0]
    image = image_node(bpy, tree, spec["emissive_texture"], folder)
    if spec["has_emissive_uvs"]:
        coordinates = tree.nodes.new("ShaderNodeUVMap")
        coordinates.uv_map = EMISSIVE_LAYER
        tree.links.new(coordinates.outputs["UV"], image.inputs["Vector"])
    return multiply_colors(tree, factor.outputs[0], image.outputs["Color"])


def image_node(bpy: Any, tree: Any, spec: Any, folder: str) -> Any:
    node = tree.nodes.new("ShaderNodeTexImage")
    node.image = bpy.data.images.load(os.path.join(folder, spec["file"]))
    node.image.alpha_mode = "CHANNEL_PACKED"
    node.extension = {"repeat": "REPEAT", "clamp": "EXTEND", "mirror": "MIRROR"}[spec["wrap"]]
    node.interpolation = "Closest" if spec["filter"] == "nearest" else "Linear"
    return node


def multiply_colors(tree: Any, a: Any, b: Any) -> Any:
    return _vector_node(tree, "MULTIPLY", a, b)


def add_colors(tree: Any, a: Any, b: Any) -> Any:
    return _vector_node(tree, "ADD", a, b)


def _vector_node(tree: Any, operation: str, a: Any, b: Any) -> Any:
    node = tree.nodes.new("ShaderNodeVectorMath")
    node.operation = operation
    tree.links.new(a, node.inputs[0])
    tree.links.new(b, node.inputs[1])
    return node.outputs["Vector"]


def math_node(tree: Any, operation: str, a: Any, b: Any) -> Any:
    node = tree.nodes.new("ShaderNodeMath")
    node.operation = operation
    tree.links.new(a, node.inputs[0])
    if isinstance(b, (int, float)):
        node.inputs[1].default_value = b
    else:
        tree.links.new(b, node.inputs[1])
    return node.outputs[0]


def add_published_lights(bpy: Any, scene: Any) -> None:
    for kind, position, watts, size in PUBLISHED_LIGHTS:
        light = bpy.data.lights.new(kind.lower(), kind)
        light.energy = watts
        holder = bpy.data.objects.new(kind.lower(), light)
        holder.location = position
        if size is not None:
            holder.scale = (size, size, size)
        scene.collection.objects.link(holder)


def add_studio(bpy: Any, scene: Any, lights: Any) -> None:
    world = bpy.data.worlds.new("world")
    scene.world = world
    world.use_nodes = True
    tree = world.node_tree
    tree.nodes.clear()
    background = tree.nodes.new("ShaderNodeBackground")
    output = tree.nodes.new("ShaderNodeOutputWorld")
    tree.links.new(background.outputs[0], output.inputs["Surface"])
    if lights["mode"] == "unlit":
        background.inputs["Strength"].default_value = 0
        return
    direction = tree.nodes.new("ShaderNodeTexCoord").outputs["Generated"]
    split = tree.nodes.new("ShaderNodeSeparateXYZ")
    tree.links.new(direction, split.inputs[0])
    height = math_node(tree, "MULTIPLY", split.outputs["Z"], lights["dome_slope"])
    tree.links.new(math_node(tree, "ADD", height, lights["dome_level"]), background.inputs["Strength"])
    sun = bpy.data.lights.new("key", "SUN")
    sun.energy, sun.angle = lights["key_strength"], lights["key_angle"]
    sun.use_shadow = lights["shadows"]
    holder = bpy.data.objects.new("key", sun)
    x, y, z = lights["key_direction"]
    holder.rotation_mode = "XYZ"
    holder.rotation_euler = (0, math.atan2(math.hypot(x, y), z), math.atan2(y, x))
    scene.collection.objects.link(holder)


def place_camera(camera: Any, viewmat: np.ndarray, K: np.ndarray, width: int, height: int) -> None:
    from mathutils import Matrix

    to_world = np.linalg.inv(viewmat) @ np.diag([1.0, -1, -1, 1])  # Blender looks along -z with y up
    camera.matrix_world = Matrix(to_world.tolist())
    data = camera.data
    data.sensor_fit, data.sensor_width = "HORIZONTAL", 32
    data.lens = float(K[0, 0]) * 32 / width
    data.shift_x = float(width / 2 - K[0, 2]) / width
    data.shift_y = float(K[1, 2] - height / 2) / width
    data.clip_start, data.clip_end = 1e-3, 1e3


if __name__ == "__main__":
    main(sys.argv[-1])
