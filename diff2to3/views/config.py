"""What a rendering is asked to be. Plain values, so that a YAML file can hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

RENDERERS = ("raycast", "kaolin", "blender")
OUTPUTS = ("depths", "normals", "points", "triangle_ids")


@dataclass(frozen=True)
class LightingConfig:
    """Light fixed to the object, so that all views agree. Everything is linear; intensities are what a white
    surface that faces the light reflects, so their sum should stay near 1.

    mode            "studio": dome and key light with shadows; "unlit": the base colour itself
    dome_intensity  of the soft light from everywhere, at a surface that faces up
    dome_ground     radiance from below relative to above, in [0, 1]; in between it changes with the height
    dome_samples    directions in which the dome's shadows are traced
    dome_resolution points a unit of length at which they are traced, once a mesh; interpolated in between
    key_intensity   of the directional light
    key_direction   towards the light, in the object frame
    key_angle       degrees from the middle of the light to its rim: how soft the key's shadows are
    key_samples     directions in which the key's shadows are traced
    shadows         False: nothing blocks any light
    """

    mode: str = "studio"
    dome_intensity: float = 0.75
    dome_ground: float = 0.45
    dome_samples: int = 64
    dome_resolution: int = 64
    key_intensity: float = 0.4
    key_direction: tuple[float, float, float] = (0.5, -0.6, 0.8)
    key_angle: float = 4.0
    key_samples: int = 4
    shadows: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("studio", "unlit"):
            raise ValueError(f"mode: expected studio or unlit, got {self.mode!r}")
        if min(self.dome_samples, self.dome_resolution, self.key_samples) < 1:
            raise ValueError("dome_samples, dome_resolution, key_samples: expected at least 1")
        if not any(self.key_direction):
            raise ValueError("key_direction: expected a direction, got zeros")
        if not 0 <= self.dome_ground <= 1:
            raise ValueError(f"dome_ground: expected a number in [0, 1], got {self.dome_ground}")


@dataclass(frozen=True)
class BlenderConfig:
    """How the Blender renderer is run: in a process of its own, under an interpreter that can ``import bpy``.

    python   that interpreter, or a Blender executable
    look     "published": lights, one bounce and the filmic curve of the published training sets;
             "config": the light of LightingConfig, without bounces or a curve, as the other renderers
    samples  Cycles samples a pixel
    denoise  "none", "fast" or "high"
    device   "CPU", "CUDA", "OPTIX", "HIP", "METAL" or "ONEAPI"
    threads  of the CPU; 0 for all
    seconds  time limit a call
    """

    python: str = "blender"
    look: str = "published"
    samples: int = 128
    denoise: str = "high"
    device: str = "CPU"
    threads: int = 0
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        if self.look not in ("published", "config"):
            raise ValueError(f"look: expected published or config, got {self.look!r}")
        if self.denoise not in ("none", "fast", "high"):
            raise ValueError(f"denoise: expected none, fast or high, got {self.denoise!r}")
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}")


@dataclass(frozen=True)
class RenderConfig:
    """How views are rendered.

    renderer     "raycast" (CPU, Embree), "kaolin" (visibility on the GPU) or "blender" (Cycles)
    lighting     see :class:`LightingConfig`
    supersample  samples a pixel along each side: 2 means 2 x 2
    outputs      which of depths, normals, points, triangle_ids to return beside colour and alpha
    back_faces   "show": seen from both sides, as Cycles does and as Gaussians must be learnt; "cull":
                 single-sided materials vanish from behind, as the file asks
    smooth       use the file's shading normals; False shades flat
    max_layers   transparent surfaces followed along one ray
    """

    renderer: str = "raycast"
    lighting: LightingConfig = field(default_factory=LightingConfig)
    blender: BlenderConfig = field(default_factory=BlenderConfig)
    supersample: int = 2
    outputs: tuple[str, ...] = ("depths",)
    back_faces: str = "show"
    smooth: bool = True
    max_layers: int = 8

    def __post_init__(self) -> None:
        if self.renderer not in RENDERERS:
            raise ValueError(f"renderer: expected one of {', '.join(RENDERERS)}, got {self.renderer!r}")
        if not 1 <= self.supersample <= 8:
            raise ValueError(f"supersample: expected 1 to 8, got {self.supersample}")
        unknown = set(self.outputs) - set(OUTPUTS)
        if unknown:
            raise ValueError(f"outputs: expected some of {', '.join(OUTPUTS)}, got {sorted(unknown)}")
        if self.back_faces not in ("show", "cull"):
            raise ValueError(f"back_faces: expected show or cull, got {self.back_faces!r}")
        if self.max_layers < 1:
            raise ValueError(f"max_layers: expected at least 1, got {self.max_layers}")
