"""From an asset to its Gaussians, through the 2to3-VAE.

mesh ─renderer─▶ views with depth ─providers─▶ features on the active voxels ─encoder─▶ latents ─decoder─▶ Gaussians
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diff2to3.checkpoint import IMAGE_ENCODER, MODEL_FILE, BundleInfo, read_bundle
from diff2to3.config import MISSING, config_from_dict
from diff2to3.errors import InputError
from diff2to3.hub import Source
from diff2to3.pipeline.image_to_3d import Clock, clone
from diff2to3.pipeline.load import DTYPES, Options, load_bundle_network
from diff2to3.pipeline.share import Shareable
from diff2to3.types import Gaussians, Mesh, SparseVoxels, Views
from diff2to3.vae.decoder import Decoder
from diff2to3.vae.encoder import Encoder
from diff2to3.vae.sparse_structure import StructureDecoder, StructureEncoder, active_voxels
from diff2to3.views import (
    CameraConfig,
    MeshRenderer,
    RenderConfig,
    generator_for,
    make_renderer,
    sample_cameras,
)
from diff2to3.voxels.lift import lift_features
from diff2to3.voxels.providers import SURFACE, FeatureProvider, build_provider
from diff2to3.voxels.surface import CHANNELS as SURFACE_CHANNELS
from diff2to3.voxels.voxelise import voxelise

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ViewSettings:
    """The views that features are lifted from: those of a training set's view set ``name`` with the same ``seed``.

    size        pixels a side
    cameras     drawn from (seed, asset's name, name)
    depths      whether the training set stored depth (here there always is)
    render      how assets are lit
    """

    size: int = 256
    cameras: CameraConfig = field(default_factory=lambda: CameraConfig("sphere", num_views=12))
    depths: bool = True
    render: RenderConfig = field(default_factory=RenderConfig)
    seed: int = 0
    name: str = "input"

    def cameras_of(self, asset: str) -> tuple[Tensor, Tensor]:
        """viewmats [V, 4, 4] and Ks [V, 3, 3] of the asset called ``asset``."""
        return sample_cameras(self.cameras, self.size, self.size, generator_for(self.seed, asset, self.name))


@dataclass(frozen=True)
class FeatureSettings:
    """One feature set that the encoder reads; sets lie side by side in the order of the list.

    provider         see diff2to3.voxels.providers, or "surface"
    mode             "visible" or "mean"
    resolution       of the grid they were lifted onto in training; the encoder's
    weights          "published", or the hash of the file that was used in training: a record, not looked up
    stride           of the providers rgb and rgb_stats
    dtype            of the provider's arithmetic
    depth_tolerance, background   see diff2to3.voxels.aggregate
    """

    provider: str = MISSING
    mode: str = "visible"
    resolution: int | None = None
    weights: str | None = None
    stride: int | None = None
    dtype: str = "float32"
    depth_tolerance: float = 1.0
    background: float = 0.5

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class ReconstructionSettings:
    """What ``settings`` of a bundle says about its encoder's input (other keys are not looked at)."""

    views: ViewSettings = field(default_factory=ViewSettings)
    features: list[FeatureSettings] = field(default_factory=lambda: [FeatureSettings("rgb")])

    @staticmethod
    def from_settings(settings: Mapping[str, Any], origin: str) -> ReconstructionSettings:
        """Read from a bundle's settings. InputError where ``features`` is missing or a value is wrong."""
        if not settings.get("features"):
            raise InputError(f"{origin}: settings say no features; this bundle has no encoder for assets")
        chosen = {key: settings[key] for key in ("views", "features") if settings.get(key) is not None}
        return config_from_dict(ReconstructionSettings, chosen, f"{origin}: settings")


@dataclass(frozen=True)
class Reconstruction:
    """One asset. ``latents`` are the posterior's means, as the decoder takes them; ``seconds`` by step."""

    gaussians: Gaussians
    latents: SparseVoxels
    views: Views
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StructureNetworks:
    """The sparse-structure VAE."""

    encoder: StructureEncoder
    decoder: StructureDecoder


class Reconstructor(Shareable):
    """A loaded 2to3-VAE. ``Reconstructor.from_pretrained("mini")(mesh)`` gives a :class:`Reconstruction`.

    providers  one a feature set; None stands for surface statistics
    structure  None where the bundle has no sparse-structure VAE
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        providers: Sequence[FeatureProvider | None],
        settings: ReconstructionSettings,
        *,
        structure: StructureNetworks | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        channels = sum(SURFACE_CHANNELS if p is None else p.channels for p in providers)
        if channels != encoder.config.in_channels:
            names = ", ".join(f.provider for f in settings.features)
            raise InputError(
                f"features: {names} have {channels} channels; the encoder takes {encoder.config.in_channels}"
            )
        if encoder.config.latent_channels != decoder.config.latent_channels:
            raise InputError(
                f"the encoder has {encoder.config.latent_channels} latent channels, the decoder "
                f"{decoder.config.latent_channels}"
            )
        self.encoder, self.decoder, self.providers = encoder, decoder, list(providers)
        self.settings, self.structure, self.device = settings, structure, torch.device(device)
        self.resolution = encoder.config.resolution
        for feature in settings.features:
            if feature.resolution not in (None, self.resolution):
                raise InputError(
                    f"features: {feature.provider} is on {feature.resolution}³ voxels, the encoder on {self.resolution}"
                )
        parts: list[nn.Module] = [encoder, decoder]
        if structure is not None:
            parts += [structure.encoder, structure.decoder]
        for network in parts:
            network.eval().requires_grad_(False).to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        source: str = "mini",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        offline: bool = False,
        weights: Mapping[str, str] | None = None,
    ) -> Self:
        """Load the VAE of a bundle: an embedded model's name, a folder, or a hub repository.

        ``weights`` are of feature providers, by name: a local file or folder, or a hub name, instead of the
        published ones. ``mini`` takes the bundle's own image encoder.

        Raises:
            InputError: no such model, or one without encoder, decoder and features; damaged or missing weights.
        """
        place = Source(source, offline)
        path = place.file(MODEL_FILE)
        info = read_bundle(path.parent)
        options = Options(torch.device(device), dtype, offline, None, False)
        settings = ReconstructionSettings.from_settings(info.settings, str(path))
        networks = {}
        for name in ("encoder", "decoder", "structure_encoder", "structure_decoder"):
            if name in info.networks:
                networks[name] = load_network(place, path.parent, info, name, options)
            elif not name.startswith("structure"):
                raise InputError(f"{path}: no network {name!r}; this model cannot reconstruct")
        providers = [
            build(f, (weights or {}).get(f.provider), place, info, options) for f in settings.features
        ]
        structure = None
        if "structure_encoder" in networks and "structure_decoder" in networks:
            structure = StructureNetworks(networks["structure_encoder"], networks["structure_decoder"])
        model = cls(
            networks["encoder"],
            networks["decoder"],
            providers,
            settings,
            structure=structure,
            device=device,
        )
        model.source = place
        return model

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the model to a device, and the torsos of its networks to a dtype; returns the model."""
        for network in self.all_networks():
            if dtype is not None and hasattr(network, "cast_torso"):
                network.cast_torso(dtype)
            if device is not None:
                network.to(device)
        if device is not None:
            self.device = torch.device(device)
        return self

    def all_networks(self) -> list[Any]:
        """The 2to3-VAE's networks, the sparse-structure VAE's, and those that compute features."""
        structure = [] if self.structure is None else [self.structure.encoder, self.structure.decoder]
        features = [p for p in self.providers if isinstance(p, nn.Module)]
        return [self.encoder, self.decoder, *structure, *features]

    @torch.no_grad()
    def __call__(self, mesh: Mesh, *, name: str = "", renderer: MeshRenderer | None = None) -> Reconstruction:
        """Reconstruct one asset.

        Args:
            mesh: in the object frame.
            name: of the asset; with it, cameras are those of a training set in which it has that name.
            renderer: of ``mesh``, with depth, where there is one already.
        """
        clock = Clock()
        views = self.views(mesh, name=name, renderer=renderer)
        clock.lap("views")
        coords = torch.from_numpy(voxelise(mesh.triangles, self.resolution))
        clock.lap("voxels")
        voxels = self.features(views, coords)
        clock.lap("features")
        latents = self.encode(voxels)
        clock.lap("encode")
        (gaussians,) = self.decoder(latents)
        clock.lap("decode")
        return Reconstruction(clone(gaussians), clone(latents), views, clock.seconds)

    def views(self, mesh: Mesh, *, name: str = "", renderer: MeshRenderer | None = None) -> Views:
        """The views that features are lifted from, with depth."""
        viewmats, Ks = self.settings.views.cameras_of(name)
        renderer = make_renderer(mesh, self.settings.views.render) if renderer is None else renderer
        return renderer.render(viewmats, Ks, self.settings.views.size, self.settings.views.size)

    def features(self, views: Views, coords: Tensor) -> SparseVoxels:
        """What the encoder reads, on cells int [N, 3] of its grid."""
        # Views lose what renderers add to them (normals, points), which the device has no use for.
        seen = Views(views.images, views.alphas, views.viewmats, views.Ks, views.depths).to(self.device)
        coords = coords.to(self.device)
        feats = []
        for chosen, provider in zip(self.settings.features, self.providers, strict=True):
            (found,) = lift_features(
                seen,
                coords,
                self.resolution,
                provider,
                [chosen.mode],
                depth_tolerance=chosen.depth_tolerance,
                background=chosen.background,
            )
            feats.append(found.feats)
        batch = torch.zeros_like(coords[:, :1])
        packed = torch.cat([batch, coords], 1).to(torch.int32)
        return SparseVoxels.from_coords(packed, torch.cat(feats, 1), self.resolution, 1)

    def encode(self, voxels: SparseVoxels) -> SparseVoxels:
        """The means of the latents' posterior."""
        with torch.no_grad():
            return voxels.with_feats(self.encoder(voxels).mean)

    def structure_of(self, coords: Tensor) -> Tensor | None:
        """Cells int [N, 3] through the sparse-structure VAE and back: int32 [M, 3]; None where there is none."""
        if self.structure is None:
            return None
        grid = torch.zeros(1, 1, *(self.resolution,) * 3, device=self.device)
        x, y, z = coords.to(self.device).long().unbind(1)
        grid[0, 0, x, y, z] = 1
        with torch.no_grad():
            logits = self.structure.decoder(self.structure.encoder(grid).mean)
        return active_voxels(logits)[:, 1:]


def load_network(place: Source, folder: Path, info: BundleInfo, name: str, options: Options) -> Any:
    """A network of a bundle; its file is fetched first where the bundle is on the hub."""
    place.file(info.networks[name].file)
    expected = {"encoder": Encoder, "decoder": Decoder}.get(name)
    network = load_bundle_network(folder, info, name, options)
    if expected is not None and not isinstance(network, expected):
        raise InputError(
            f"{folder / MODEL_FILE}: {name} is a {type(network).__name__}, not a {expected.__name__}"
        )
    return network


def build(
    feature: FeatureSettings, weights: str | None, place: Source, info: BundleInfo, options: Options
) -> FeatureProvider | None:
    """The provider of a feature set."""
    if feature.provider == SURFACE:
        return None
    if weights is None and feature.provider == "mini" and IMAGE_ENCODER in info.networks:
        weights = str(place.file(info.networks[IMAGE_ENCODER].file))
    return build_provider(
        feature.provider,
        weights,
        device=options.device,
        dtype=DTYPES[feature.dtype],
        offline=options.offline,
        stride=feature.stride,
    )
