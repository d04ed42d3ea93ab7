"""A synthetic TRELLIS folder (every network at tiny width, random weights) through the command, from photo
to .ply.
"""

import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diff2to3 import cli
from diff2to3.checkpoint import read_bundle
from diff2to3.errors import InputError
from diff2to3.flow.denoise import StageSettings
from diff2to3.formats import read as read_ply
from diff2to3.pipeline.convert import checked_sha256
from diff2to3.pipeline.image_to_3d import ImageTo3D
from diff2to3.pipeline.load import read_pipeline, stage_from_sampler
from diff2to3.pipeline.photos import frame_like_trellis
from diff2to3.pipeline.upstream import build_network
from diff2to3.types import SparseVoxels

pytestmark = pytest.mark.usefixtures("one_thread")

COND = 24  # width of the condition encoders
VAE = {"resolution": 16, "model_channels": 32, "latent_channels": 8, "num_blocks": 2, "num_heads": 2, "mlp_ratio": 4,
       "attn_mode": "swin", "window_size": 8, "use_fp16": True}  # fmt: skip
FLOW = {"in_channels": 8, "out_channels": 8, "model_channels": 32, "cond_channels": COND, "num_blocks": 2,
        "num_heads": 2, "mlp_ratio": 4, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True}  # fmt: skip
GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 4, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip
STRUCTURE = {"latent_channels": 8, "num_res_blocks": 1, "num_res_blocks_middle": 1, "use_fp16": True}
NETWORKS = {
    "ss_enc_conv3d_16l8_fp16": ("SparseStructureEncoder", {**STRUCTURE, "in_channels": 1, "channels": [4, 8, 16]}),
    "ss_dec_conv3d_16l8_fp16": ("SparseStructureDecoder", {**STRUCTURE, "out_channels": 1, "channels": [16, 8, 4]}),
    "ss_flow_img_dit_L_16l8_fp16": ("SparseStructureFlowModel", {**FLOW, "resolution": 4, "patch_size": 1}),
    "slat_enc_swin8_B_64l8_fp16": ("ElasticSLatEncoder", {**VAE, "in_channels": 40}),
    "slat_dec_gs_swin8_B_64l8gs32_fp16": (
        "ElasticSLatGaussianDecoder", {**VAE, "representation_config": GAUSSIANS}),
    "slat_flow_img_dit_L_64l8p2_fp16": (
        "ElasticSLatFlowModel",
        {**FLOW, "resolution": 16, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [16]}),
}  # fmt: skip
MODELS = {
    "sparse_structure_decoder": "ckpts/ss_dec_conv3d_16l8_fp16",
    "sparse_structure_flow_model": "ckpts/ss_flow_img_dit_L_16l8_fp16",
    "slat_decoder_gs": "ckpts/slat_dec_gs_swin8_B_64l8gs32_fp16",
    "slat_decoder_rf": "ckpts/slat_dec_rf_swin8_B_64l8r16_fp16",
    "slat_decoder_mesh": "ckpts/slat_dec_mesh_swin8_B_64l8m256c_fp16",
    "slat_flow_model": "ckpts/slat_flow_img_dit_L_64l8p2_fp16",
}


def sampler(steps, strength, interval, shift):
    return {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": 1e-5},
        "params": {"steps": steps, "cfg_strength": strength, "cfg_interval": interval, "rescale_t": shift},
    }


def pipeline_json(kind="Image"):
    cond = {"Image": {"image_cond_model": "dinov2_vitl14_reg"}, "Text": {"text_cond_model": "tiny-clip"}}
    return {
        "name": f"Trellis{kind}To3DPipeline",
        "args": {
            "models": MODELS,
            "sparse_structure_sampler": sampler(4, 5.0, [0.5, 1.0], 3.0),
            "slat_sampler": sampler(3, 2.0, [0.4, 0.95], 3.0),
            "slat_normalization": {
                "mean": [0.1 * i for i in range(8)],
                "std": [1.0 + 0.1 * i for i in range(8)],
            },
            **cond[kind],
        },
    }


def half_as_released(network):
    """TRELLIS casts the linear and convolution layers of the torso, and saves them so."""
    network.cast_torso(torch.float16)
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pipeline.json and ckpts/ as upstream writes them, and a tiny DINOv2 beside them."""
    transformers = pytest.importorskip("transformers", reason="the condition encoders need transformers")
    root = tmp_path_factory.mktemp("trellis")
    (root / "ckpts").mkdir()
    (root / "pipeline.json").write_text(json.dumps(pipeline_json()))
    generator = torch.Generator().manual_seed(0)
    for name, (cls, args) in NETWORKS.items():
        network = build_network(cls, args)
        for parameter in network.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        if cls == "SparseStructureDecoder":  # about a tenth of the cells, to keep the tests fast
            with torch.no_grad():
                logits = network(torch.randn(1, 8, 4, 4, 4, generator=generator))
            network.out_layer[2].bias.data -= logits.quantile(0.9)
        (root / "ckpts" / f"{name}.json").write_text(json.dumps({"name": cls, "args": args}))
        save_file(half_as_released(network), root / "ckpts" / f"{name}.safetensors")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=COND, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Dinov2WithRegistersModel(config).save_pretrained(root / "dinov2_vitl14_reg")
    return root


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A coloured disc on transparency, off centre."""
    y, x = np.mgrid[:90, :120]
    inside = (x - 70) ** 2 + (y - 40) ** 2 < 30**2
    pixels = np.stack([x * 2, y * 2, 255 - x, inside * 255], -1).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def generate(*args):
    return cli.main(["generate", "--device", "cpu", "--offline", *map(str, args)])


def euler_by_hand(velocity, z, steps, shift, strength, interval):
    """Independent of diff2to3.flow.samplers: v(z, t, conditioned)."""
    times = np.linspace(1, 0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    for t, t_next in itertools.pairwise(times):
        v = velocity(z, t, True)
        if interval[0] <= t <= interval[1]:
            v = (1 + strength) * v - strength * velocity(z, t, False)
        z = z - (t - t_next) * v
    return z


def by_hand(folder, photo, seed):
    """The whole path written out: networks from their files, sampling by the formulas."""
    import transformers

    networks = {}
    for key in (
        "sparse_structure_flow_model",
        "sparse_structure_decoder",
        "slat_flow_model",
        "slat_decoder_gs",
    ):
        config = json.loads((folder / f"{MODELS[key]}.json").read_text())
        networks[key] = build_network(config["name"], config["args"])
        networks[key].load_state_dict(load_file(folder / f"{MODELS[key]}.safetensors"))
    dino = transformers.Dinov2WithRegistersModel.from_pretrained(folder / "dinov2_vitl14_reg").eval()
    before_norm = []
    dino.layernorm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    image = frame_like_trellis(Image.open(photo), 518)[None]
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    dino((image - mean) / std)
    cond = torch.nn.functional.layer_norm(before_norm[0], (COND,))
    assert cond.shape == (1, 1 + 4 + 37 * 37, COND)
    generator = torch.Generator().manual_seed(seed)

    def time(t):
        return torch.tensor([t], dtype=torch.float64)

    flow = networks["sparse_structure_flow_model"]
    z = euler_by_hand(
        lambda z, t, yes: flow(z, time(t), cond if yes else 0 * cond),
        torch.randn(1, 8, 4, 4, 4, generator=generator), 4, 3.0, 5.0, (0.5, 1.0),
    )  # fmt: skip
    logits = networks["sparse_structure_decoder"](z)[0, 0]
    coords = torch.nn.functional.pad(torch.argwhere(logits > 0), (1, 0))
    latent_flow = networks["slat_flow_model"]

    def velocity(z, t, yes):
        voxels = SparseVoxels.from_coords(coords, z, 16)
        return latent_flow(voxels, time(t), cond if yes else 0 * cond)

    noise = torch.randn(len(coords), 8, generator=generator)
    z = euler_by_hand(velocity, noise, 3, 3.0, 2.0, (0.4, 0.95))
    z = z * (1 + 0.1 * torch.arange(8)) + 0.1 * torch.arange(8)
    return networks["slat_decoder_gs"](SparseVoxels.from_coords(coords, z, 16))[0]


def test_photo_to_ply_by_the_command(folder, photo, tmp_path, capsys):
    assert generate(photo, "--model", folder, "-o", tmp_path / "out", "--seed", 3) == 0
    printed = capsys.readouterr()
    assert "Gaussians in" in printed.out
    assert "slat_decoder_mesh is skipped" in printed.err and "slat_decoder_rf is skipped" in printed.err
    assert {p.name for p in (tmp_path / "out" / "photo").iterdir()} == {
        "photo.ply", "photo_turntable.png", "photo_cutout.png", "metadata.json"
    }  # fmt: skip
    metadata = json.loads((tmp_path / "out" / "photo" / "metadata.json").read_text())
    assert metadata["seed"] == 3 and metadata["structure"]["guidance_scale"] == 6.0
    ours, comment = read_ply(tmp_path / "out" / "photo" / "photo.ply")
    assert comment["seed"] == 3
    assert len(ours) == metadata["num_gaussians"] == 4 * metadata["num_voxels"] > 0

    with torch.no_grad():
        expected = by_hand(folder, photo, 3)
    assert len(expected) == len(ours)
    for name in ("means", "scales", "sh", "quats"):
        reference = getattr(expected, name)
        error = (getattr(ours, name) - reference).abs().max() / reference.abs().max()
        assert error < 1e-4, name
    assert (ours.opacities - expected.opacities).abs().max() < 1e-4


def test_bundle_gives_the_same_bytes(folder, photo, tmp_path, capsys):
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "bundle")]) == 0
    info = read_bundle(tmp_path / "bundle")
    assert set(info.networks) == {
        "structure_flow", "structure_decoder", "latent_flow", "decoder", "encoder", "structure_encoder"
    }  # fmt: skip
    assert info.license == "MIT" and len(info.settings["source_sha256"]) == 6
    assert cli.main(["models", "--check", str(tmp_path / "bundle")]) == 0
    encoder = str(folder / "dinov2_vitl14_reg")
    for model, out in ((folder, "a"), (tmp_path / "bundle", "b")):
        args = (photo, "--model", model, "--image-encoder", encoder, "-o", tmp_path / out)
        assert generate(*args) == 0
    a, b = (tmp_path / name / "photo" / "photo.ply" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    capsys.readouterr()
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "bundle")]) == 2
    assert "already exists" in capsys.readouterr().err
    path = tmp_path / "bundle" / "decoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert cli.main(["models", "--check", str(tmp_path / "bundle")]) == 2
    assert "decoder.safetensors: damaged" in capsys.readouterr().err


def test_seeds_samples_and_settings(folder, photo, tmp_path):
    common = ("--model", folder, "--steps", 2, "--guidance-scale", 1)
    assert generate(photo, *common, "-o", tmp_path / "a", "--seed", 5, "--num-samples", 2) == 0
    assert generate(photo, *common, "-o", tmp_path / "b", "--seed", 6, "--low-vram") == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*/*.ply")}
    assert set(files) == {"photo_0.ply", "photo_1.ply"}
    assert files["photo_0.ply"] != files["photo_1.ply"]
    assert (tmp_path / "b" / "photo" / "photo.ply").read_bytes() == files["photo_1.ply"]  # seed 6, alone
    metadata = json.loads((tmp_path / "a" / "photo_1" / "metadata.json").read_text())
    assert metadata["seed"] == 6 and metadata["latent"]["num_steps"] == 2


def test_several_photos_of_one_object(folder, photo, tmp_path):
    """Two equal photos are one photo, in both modes; two different ones are not."""
    other = tmp_path / "other.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    model = ImageTo3D.from_pretrained(str(folder), offline=True)
    images = [Image.open(photo), Image.open(other)]
    settings = {name: StageSettings(3, 2.0, (0.0, 1.0), 1.0) for name in ("structure", "latent")}
    one = model(images[0], **settings).gaussians
    for mode in ("stochastic", "multidiffusion"):
        twice = model([images[0], images[0]], multi_image=mode, **settings).gaussians
        torch.testing.assert_close(twice.means, one.means, rtol=0, atol=1e-5)
        both = model(images, multi_image=mode, **settings).gaussians
        assert len(both) != len(one) or not torch.allclose(both.means, one.means, atol=1e-4)
    seen = []
    model(images[0], progress=lambda *state: seen.append(state), **settings)
    assert seen == [(stage, i, 3) for stage in ("structure", "latents") for i in (1, 2, 3)]


def test_batches_of_photos(folder, photo, tmp_path):
    many = tmp_path / "photos"
    many.mkdir()
    shutil.copy(photo, many / "a.png")
    Image.open(photo).convert("RGBA").save(many / "a.webp", lossless=True)
    (many / "notes.txt").write_text("not an image")
    args = (many, "--model", folder, "-o", tmp_path / "out", "--steps", 1, "--turntable", "none")
    assert generate(*args) == 0
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").glob("*/*")}
    assert names == {
        f"{n}/{f}" for n in ("a_png", "a_webp") for f in (f"{n}.ply", f"{n}_cutout.png", "metadata.json")
    }
    first, second = (
        next((tmp_path / "out").glob(f"*/a_{kind}.ply")).read_bytes() for kind in ("png", "webp")
    )
    assert first == second


@pytest.fixture(scope="module")
def text_folder(folder, tmp_path_factory):
    """The same networks as a text model whose decoders lie in another repository, as TRELLIS-text's do."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("text")
    shutil.copytree(folder / "ckpts", root / "ckpts")
    values = pipeline_json("Text")
    elsewhere = "microsoft/TRELLIS-image-large/ckpts"
    (root / elsewhere).mkdir(parents=True)
    for key in ("sparse_structure_decoder", "slat_decoder_gs"):
        name = values["args"]["models"][key].removeprefix("ckpts/")
        values["args"]["models"] = {**values["args"]["models"], key: f"{elsewhere}/{name}"}
        for suffix in ("json", "safetensors"):
            (root / "ckpts" / f"{name}.{suffix}").rename(root / elsewhere / f"{name}.{suffix}")
    (root / "pipeline.json").write_text(json.dumps(values))
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "tiny-clip").mkdir()
    (root / "tiny-clip" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (root / "tiny-clip" / "merges.txt").write_text("#version: 0.2\n")
    (root / "tiny-clip" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer"})
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=COND, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, eos_token_id=53, bos_token_id=52, pad_token_id=53,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.CLIPTextModel(config).save_pretrained(root / "tiny-clip")
    return root


def test_text_to_ply_by_the_command(text_folder, photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate("--prompt", "a red chair!", "--model", text_folder, "-o", out, "--steps", 2) == 0
    assert {p.name for p in out.glob("*/*.ply")} == {"a_red_chair.ply"}
    assert len(read_ply(out / "a_red_chair" / "a_red_chair.ply")[0]) > 0
    capsys.readouterr()
    assert generate(photo, "--model", text_folder, "-o", out) == 2
    assert capsys.readouterr().err.endswith("this model takes text, not images\n")


def test_text_tokens_are_the_encoders_last_states(text_folder):
    import transformers

    model = ImageTo3D.from_pretrained(str(text_folder), offline=True)
    conditions = model.stages.see(["red chair"], [()]).conditions
    clip = transformers.CLIPTextModel.from_pretrained(text_folder / "tiny-clip").eval()
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = [[letters[c] for c in w[:-1]] + [26 + letters[w[-1]]] for w in ("red", "chair")]
    ids = [52, *words[0], *words[1], 53]
    with torch.no_grad():
        expected = clip(input_ids=torch.tensor([ids + [53] * (77 - len(ids))])).last_hidden_state
        nothing = clip(input_ids=torch.tensor([[52] + [53] * 76])).last_hidden_state
    torch.testing.assert_close(conditions.present[0], expected)
    torch.testing.assert_close(conditions.absent, nothing)


# ---------------------------------------------------------------- what can be wrong


def broken(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


SLAT_FLOW = f"{MODELS['slat_flow_model']}"
BROKEN = {
    "slat_flow_img_dit_L_64l8p2_fp16.safetensors: no such file": lambda f: (
        f / f"{SLAT_FLOW}.safetensors"
    ).unlink(),
    "not a complete safetensors file": lambda f: (f / f"{SLAT_FLOW}.safetensors").write_bytes(b"\x10" * 50),
    "pipeline.json: no such file": lambda f: (f / "pipeline.json").unlink(),
    "pipeline.json: not valid JSON": lambda f: (f / "pipeline.json").write_text("{"),
    "no model 'slat_decoder_gs'": lambda f: edit_json(
        f / "pipeline.json", lambda v: v["args"]["models"].pop("slat_decoder_gs")
    ),
    "no value for 'slat_normalization'": lambda f: edit_json(
        f / "pipeline.json", lambda v: v["args"].pop("slat_normalization")
    ),
    "unknown sampler 'DDIM'": lambda f: edit_json(
        f / "pipeline.json", lambda v: v["args"]["slat_sampler"].update(name="DDIM")
    ),
    "normalization: expected 8 means": lambda f: edit_json(
        f / "pipeline.json", lambda v: v["args"]["slat_normalization"]["mean"].pop()
    ),
    "unknown pipeline 'Other'": lambda f: edit_json(f / "pipeline.json", lambda v: v.update(name="Other")),
    "unknown configuration key 'frobnicate'": lambda f: edit_json(
        f / f"{SLAT_FLOW}.json", lambda v: v["args"].update(frobnicate=1)
    ),
    "no value for 'model_channels'": lambda f: edit_json(
        f / f"{SLAT_FLOW}.json", lambda v: v["args"].pop("model_channels")
    ),
    "pe_mode 'rope' is not supported": lambda f: edit_json(
        f / f"{SLAT_FLOW}.json", lambda v: v["args"].update(pe_mode="rope")
    ),
    "does not fit the network: 'input_layer.weight' is [16, 8], not [8, 8]": lambda f: edit_json(
        f / f"{SLAT_FLOW}.json", lambda v: v["args"].update(io_block_channels=[8])
    ),
    "Wrong: unknown network": lambda f: edit_json(f / f"{SLAT_FLOW}.json", lambda v: v.update(name="Wrong")),
    "the mesh decoder is not part": lambda f: edit_json(
        f / f"{MODELS['slat_decoder_gs']}.json", lambda v: v.update(name="SLatMeshDecoder")
    ),
    "facebook/dinov2-with-registers-large: cannot load this encoder": lambda f: shutil.rmtree(
        f / "dinov2_vitl14_reg"
    ),
    "has 24 channels, but the flow models were trained for 20": lambda f: [
        edit_json(f / f"{MODELS[k]}.json", lambda v: v["args"].update(cond_channels=20)) or shrink_cond(f, k)
        for k in ("slat_flow_model", "sparse_structure_flow_model")
    ],
}


def shrink_cond(folder, key):
    path = folder / f"{MODELS[key]}.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("cross_attn.to_kv.weight"):
            tensors[name] = tensors[name][:, :20].contiguous()
    save_file(tensors, path)


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_folder_is_one_line_and_exit_code_2(folder, photo, tmp_path, capsys, message):
    model = broken(folder, tmp_path, BROKEN[message])
    assert generate(photo, "--model", model, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{photo}", "--model", "nowhere/at/all"], "nowhere/at/all: no such folder"),
        (
            ["{photo}", "--model", "nobody/nothing-here"],
            "nobody/nothing-here: pipeline.json is not in the local",
        ),
        (["missing.png", "--model", "{folder}"], "missing.png: no such file"),
        (["{text}", "--model", "{folder}"], "fake.png: not an image that can be read"),
        (["{empty}", "--model", "{folder}"], "empty.png: no object"),
        (["--model", "{folder}"], "no input"),
        (["{photo}", "--prompt", "x", "--model", "{folder}"], "a text or photos, not both"),
        (["{photo}", "--image", "{photo}", "--model", "{folder}"], "not both"),
        (["--prompt", " ", "--model", "{folder}"], "the text is empty"),
        (["--prompt", "a chair", "--model", "{folder}"], "this model takes images, not text"),
        (["{photo}", "--model", "{folder}", "--steps", "0"], "steps: expected at least 1"),
        (["{photo}", "--model", "{folder}", "--num-samples", "0"], "--num-samples"),
        (["{photo}", "--model", "{folder}", "--device", "warp:3"], "--device: 'warp:3' cannot be used"),
        (["{photo}", "--model", "{folder}", "-o", "{text}"], "cannot be written to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, photo, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.png").write_text("this is text")
    Image.new("RGBA", (20, 20)).save(tmp_path / "empty.png")
    names = {"photo": photo, "folder": folder, "text": tmp_path / "fake.png", "empty": tmp_path / "empty.png"}
    full = [a.format(**names) for a in args]
    assert generate(*full, *([] if "-o" in full else ["-o", tmp_path / "out"])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.rglob("*.ply"))


def test_a_structure_without_voxels_is_an_error(folder, photo, tmp_path, capsys):
    def never(f):
        path = f / f"{MODELS['sparse_structure_decoder']}.safetensors"
        tensors = load_file(path)
        tensors["out_layer.2.bias"] -= 1e4
        save_file(tensors, path)

    model = broken(folder, tmp_path, never)
    assert generate(photo, "--model", model, "-o", tmp_path / "out", "--steps", 1) == 2
    assert "no voxel" in capsys.readouterr().err


def test_precision_of_the_torsos(folder, photo):
    def torso(model):
        return model.networks.latent_flow.blocks[0].mlp.mlp[0].weight.dtype

    exact = ImageTo3D.from_pretrained(str(folder), offline=True)
    half = ImageTo3D.from_pretrained(str(folder), offline=True, dtype=torch.bfloat16)
    assert torso(exact) == torch.float32 and torso(half) == torch.bfloat16
    assert half.networks.latent_flow.out_layer.weight.dtype == torch.float32
    settings = StageSettings(1, 1.0, (0.0, 1.0), 1.0)
    image = Image.open(photo)
    a, b = (m(image, structure=settings, latent=settings).latents for m in (exact, half))
    common = min(len(a), len(b))
    assert 0.5 < len(a) / len(b) < 2 and common > 0


def test_samplers_of_other_kinds():
    params = {"steps": 7, "cfg_strength": 4.0, "rescale_t": 2.0}
    cfg = stage_from_sampler({"name": "FlowEulerCfgSampler", "params": params})
    assert cfg == StageSettings(7, 5.0, (0.0, 1.0), 2.0)
    plain = stage_from_sampler({"name": "FlowEulerSampler", "params": {"steps": 7}})
    assert plain == StageSettings(7, 1.0, (0.0, 1.0), 1.0)
    with pytest.raises(ValueError, match="unknown parameter 'eta'"):
        stage_from_sampler({"name": "FlowEulerSampler", "params": {"eta": 1}})


def test_published_pipeline_files_are_understood(tmp_path):
    """The values of TRELLIS-image-large's pipeline.json."""
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps(pipeline_json()))
    pipeline = read_pipeline(path)
    assert pipeline.kind == "image" and pipeline.conditioner == "dinov2_vitl14_reg"
    assert pipeline.structure == StageSettings(4, 6.0, (0.5, 1.0), 3.0)


def test_files_of_the_hub_cache_are_checked(tmp_path):
    """The cache holds a file named by its hash, and links to it."""
    digest = hashlib.sha256(b"weights").hexdigest()
    for stored in (digest, "0" * 64):
        (tmp_path / stored).write_bytes(b"weights")
        (tmp_path / f"link_{stored[0]}").symlink_to(tmp_path / stored)
    assert checked_sha256(tmp_path / f"link_{digest[0]}") == digest
    with pytest.raises(InputError, match="not the published one"):
        checked_sha256(tmp_path / "link_0")


def test_what_was_left_out_is_said(folder):
    model = ImageTo3D.from_pretrained(str(folder), offline=True)
    assert model.kind == "image" and len(model.notes) == 2
