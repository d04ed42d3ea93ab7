"""diff2to3 as ComfyUI nodes: put this folder into ComfyUI's custom_nodes."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
