"""Feature providers: parity of the tiny autoencoder, random models saved locally, and what is said when files
lack."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diff2to3.errors import InputError
from diff2to3.voxels.providers import PROVIDERS, build_provider
from diff2to3.voxels.taesd import load_taesd, taesd_decoder, taesd_encoder

SHARED = Path(__file__).resolve().parents[2] / "../shared"
needs_weights = pytest.mark.skipif(
    not (SHARED / "weights").is_dir() or not (SHARED / "parity").is_dir(), reason="../shared is absent"
)


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


def randomise(module: Any, seed: int = 0) -> Any:
    """Give every parameter and buffer of a model a plain random value, so that none is a neutral one."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.01)
    return module.eval()


@needs_weights
class TestTaef2:
    def test_latent_and_reconstruction_match_the_reference(self) -> None:
        reference = load_file(SHARED / "parity/taef2.safetensors")
        encoder = load_taesd(SHARED / "weights/taef2_encoder.safetensors")
        decoder = load_taesd(SHARED / "weights/taef2_decoder.safetensors", "decoder")
        assert (encoder(reference["image"]) - reference["latent"]).abs().max() <= 1e-3
        assert (decoder(reference["latent"]) - reference["reconstruction"]).abs().max() <= 1e-3

    def test_provider_matches_it_too_and_bf16_stays_near(self) -> None:
        reference = load_file(SHARED / "parity/taef2.safetensors")
        images = reference["image"].permute(0, 2, 3, 1)
        for dtype, atol in ((torch.float32, 1e-3), (torch.bfloat16, 0.15)):
            provider = build_provider(
                "taef2", str(SHARED / "weights/taef2_encoder.safetensors"), dtype=dtype, offline=True
            )
            assert (provider.channels, provider.stride) == (32, 8)
            assert (provider.encode(images).float() - reference["latent"]).abs().max() <= atol

    def test_folder_with_the_published_file_name_works(self, tmp_path: Path) -> None:
        state = load_file(SHARED / "weights/taef2_encoder.safetensors")
        renamed = {f"encoder.layers.{name}": tensor for name, tensor in state.items()}
        save_file(renamed, tmp_path / "taef2.safetensors")
        provider = build_provider("taef2", str(tmp_path), dtype=torch.float32)
        reference = load_file(SHARED / "parity/taef2.safetensors")
        got = provider.encode(reference["image"].permute(0, 2, 3, 1))
        assert (got - reference["latent"]).abs().max() <= 1e-3


class TestTaef1:
    def test_reads_the_diffusers_layout_and_equals_diffusers(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers")
        tiny = randomise(diffusers.AutoencoderTiny(latent_channels=16))
        tiny.save_pretrained(tmp_path)
        images = random_images(2, 32, 48)
        x = images.permute(0, 3, 1, 2)
        provider = build_provider("taef1", str(tmp_path), dtype=torch.float32)
        assert provider.channels == 16
        want = tiny.encode(2 * x - 1).latents
        torch.testing.assert_close(provider.encode(images), want, rtol=1e-4, atol=1e-5)
        decoder = load_taesd(tmp_path / "diffusion_pytorch_model.safetensors", "decoder")
        latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            2 * decoder(latents) - 1, tiny.decode(latents).sample, rtol=1e-4, atol=1e-4
        )

    def test_wrong_weights_are_refused_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file(taesd_encoder(32, pool=False).state_dict(), path)
        with pytest.raises(InputError, match=r"expected 16 latent channels, found 32"):
            build_provider("taef1", str(path))
        save_file(taesd_decoder(16, pool=False).state_dict(), path)
        with pytest.raises(InputError, match=r"x\.safetensors: holds no TAESD encoder"):
            build_provider("taef1", str(path))
        state = taesd_encoder(16, pool=False).state_dict()
        del state["3.conv.0.bias"]
        save_file(state, path)
        with pytest.raises(InputError, match=r"3\.conv\.0\.bias"):
            build_provider("taef1", str(path))
        path.write_bytes(b"not safetensors")
        with pytest.raises(InputError, match=r"x\.safetensors: not a complete"):
            build_provider("taef1", str(path))


class TestFlux:
    def tiny_config(self, latent_channels: int) -> dict[str, Any]:
        return {
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "norm_num_groups": 4,
            "latent_channels": latent_channels,
            "layers_per_block": 1,
        }

    @pytest.mark.parametrize("subfolder", ["", "vae"])
    def test_latents_are_shifted_and_scaled(self, tmp_path: Path, subfolder: str) -> None:
        diffusers = pytest.importorskip("diffusers")
        vae = diffusers.AutoencoderKL(**self.tiny_config(16), shift_factor=0.1159, scaling_factor=0.3611)
        vae = vae.eval()
        vae.save_pretrained(tmp_path / subfolder)
        provider = build_provider("flux", str(tmp_path), dtype=torch.float32, offline=True)
        assert (provider.channels, provider.stride) == (16, 8)
        images = random_images(2, 32, 64)
        got = provider.encode(images)
        assert got.shape == (2, 16, 4, 8)
        with torch.no_grad():
            moments = vae.encoder(2 * images.permute(0, 3, 1, 2) - 1)
            if vae.quant_conv is not None:
                moments = vae.quant_conv(moments)
        torch.testing.assert_close(got, (moments[:, :16] - 0.1159) * 0.3611, rtol=1e-4, atol=1e-5)

    def test_bf16_is_the_default_and_close(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers")
        diffusers.AutoencoderKL(**self.tiny_config(16)).save_pretrained(tmp_path)
        images = random_images(1, 32, 32)
        half, full = (
            build_provider("flux", str(tmp_path), dtype=d).encode(images)
            for d in (torch.bfloat16, torch.float32)
        )
        assert half.dtype == torch.bfloat16
        assert (half.float() - full).abs().max() <= 0.05 * full.abs().max()

    def test_flux2_normalises_by_the_packed_statistics(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers")
        if not hasattr(diffusers, "AutoencoderKLFlux2"):
            pytest.skip("this diffusers has no AutoencoderKLFlux2")
        vae = diffusers.AutoencoderKLFlux2(**self.tiny_config(4)).eval()
        generator = torch.Generator().manual_seed(0)
        vae.bn.running_mean.copy_(torch.randn(16, generator=generator))
        vae.bn.running_var.copy_(torch.rand(16, generator=generator) + 0.5)
        vae.save_pretrained(tmp_path)
        provider = build_provider("flux2", str(tmp_path), dtype=torch.float32)
        images = random_images(1, 32, 64)
        latents = vae.encode(2 * images.permute(0, 3, 1, 2) - 1).latent_dist.mode()
        packed = F.pixel_unshuffle(latents, 2)
        want = F.pixel_shuffle(
            F.batch_norm(packed, vae.bn.running_mean, vae.bn.running_var, eps=vae.bn.eps), 2
        )
        torch.testing.assert_close(provider.encode(images), want, rtol=1e-4, atol=1e-4)


class TestDinov2:
    def test_patch_tokens_before_the_last_norm(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2WithRegistersConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_register_tokens=3,
            patch_size=14, image_size=28,
        )  # fmt: skip
        model = transformers.Dinov2WithRegistersModel(config).eval()
        model.save_pretrained(tmp_path)
        provider = build_provider("dinov2_vitl14_reg", str(tmp_path), dtype=torch.float32)
        assert (provider.channels, provider.stride) == (16, 14)
        images = random_images(2, 28, 42)
        got = provider.encode(images)
        assert got.shape == (2, 16, 2, 3)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        out = model(((images - mean) / std).permute(0, 3, 1, 2)).last_hidden_state[:, 4:]
        normed = F.layer_norm(got.flatten(2).transpose(1, 2), (16,), eps=config.layer_norm_eps)
        torch.testing.assert_close(normed, out, rtol=1e-4, atol=1e-4)
        assert provider.encode(random_images(1, 32, 32)).shape == (1, 16, 2, 2)


class TestRgb:
    def test_means_and_deviations_of_cells(self) -> None:
        images = random_images(2, 16, 24)
        cells = images.reshape(2, 2, 8, 3, 8, 3)
        got = build_provider("rgb_stats").encode(images)
        want_std = cells.std((2, 4), unbiased=False).permute(0, 3, 1, 2)
        torch.testing.assert_close(got[:, :3], cells.mean((2, 4)).permute(0, 3, 1, 2))
        torch.testing.assert_close(got[:, 3:], want_std)
        assert torch.equal(build_provider("rgb").encode(images), images.permute(0, 3, 1, 2))

    def test_sizes_that_do_not_divide_are_refused(self) -> None:
        with pytest.raises(ValueError, match="multiples of 8"):
            build_provider("rgb_stats").encode(random_images(1, 12, 16))
        with pytest.raises(ValueError, match=r"\[V, H, W, 3\]"):
            build_provider("rgb").encode(torch.zeros(2, 3, 4, 4))


class TestMissing:
    def test_unknown_names_and_options(self) -> None:
        with pytest.raises(InputError, match=r"unknown name 'flux3'.*taef2"):
            build_provider("flux3")
        with pytest.raises(InputError, match="stride"):
            build_provider("taef2", stride=4)
        assert {"flux", "taef1", "flux2", "taef2", "dinov2_vitl14_reg", "rgb"} <= set(PROVIDERS)

    @pytest.mark.parametrize("name", ["flux", "flux2", "dinov2_vitl14_reg"])
    def test_local_folder_without_files_names_the_file(self, tmp_path: Path, name: str) -> None:
        pytest.importorskip("diffusers")
        pytest.importorskip("transformers")
        with pytest.raises(InputError, match=r"config\.json: no such file"):
            build_provider(name, str(tmp_path))
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InputError, match=r"no \.safetensors file"):
            build_provider(name, str(tmp_path))

    def test_missing_local_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"taef2\.safetensors: no such file"):
            build_provider("taef2", str(tmp_path))
        with pytest.raises(InputError, match=r"gone\.safetensors: no such file"):
            build_provider("taef2", str(tmp_path / "gone.safetensors"))

    @pytest.mark.parametrize(
        "name, missing",
        [("taef2", r"taef2\.safetensors"), ("flux", "safetensors"), ("dinov2_vitl14_reg", "safe")],
    )
    def test_offline_never_connects_and_says_what_to_fetch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str
    ) -> None:
        import socket

        pytest.importorskip("diffusers")
        pytest.importorskip("transformers")
        constants = pytest.importorskip("huggingface_hub").constants

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("opened a connection although offline")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            InputError, match=rf"nobody/nothing: .*{missing}.* offline.*hf download nobody/nothing"
        ):
            build_provider(name, "nobody/nothing", offline=True)
