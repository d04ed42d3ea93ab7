"""Photos to Gaussians through both backbones: against the path written out, alone and in batches, repeatedly."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_helpers import NAMES, difference

from diff2to3.checkpoint import read_bundle
from diff2to3.errors import InputError
from diff2to3.flow.tokens import ImageTokens
from diff2to3.pipeline import ImageTo3D, StageSettings
from diff2to3.pipeline.load import Options, load_bundle_network
from diff2to3.pipeline.prune import shown
from diff2to3.types import SparseVoxels

pytestmark = pytest.mark.usefixtures("one_thread")


def euler_by_hand(velocity, z, steps, shift, scale, interval):
    """Independent of diff2to3.flow.samplers: v(z, t, conditioned)."""
    times = np.linspace(1, 0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    for t, t_next in itertools.pairwise(times):
        v = velocity(z, torch.tensor([t]), True)
        if interval[0] <= t <= interval[1]:
            v = scale * v + (1 - scale) * velocity(z, torch.tensor([t]), False)
        z = z + (t_next - t) * v
    return z


def framed_by_hand(image):
    """The disc of tiny.photo(0) spans 59 x 59 pixels, solid at (41, 11) to (99, 69): a crop of 74 from (33, 3)."""
    rgba = np.asarray(image, np.float32) / 255
    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    crop = premultiplied[3:77, 33:107]
    layers = [
        np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BILINEAR))
        for x in crop.transpose(2, 0, 1)
    ]
    return torch.from_numpy(np.stack(layers[:3]) + (1 - layers[3]) * 0.5)[None]


def by_hand(tiny, seed):
    """The whole path written out, with the networks as they were before they were saved."""
    networks, settings = tiny.networks("smdit"), tiny.SETTINGS
    latents = networks["image_encoder"](framed_by_hand(tiny.photo()))
    assert latents.shape == (1, 4, 4, 4)
    mean, std = (torch.tensor(settings["image_latents"][k])[:, None, None] for k in ("mean", "std"))
    image = ImageTokens.from_latents((latents - mean) / std, 2)
    nothing = ImageTokens.none(1, 16)
    generator = torch.Generator().manual_seed(seed)

    flow = networks["structure_flow"]
    z = euler_by_hand(
        lambda z, t, yes: flow(z, t, image if yes else nothing),
        torch.randn(1, 4, 4, 4, 4, generator=generator), 3, 2.0, 2.0, (0.3, 1.0),
    )  # fmt: skip
    mean, std = (torch.tensor(settings["structure_latents"][k])[:, None, None, None] for k in ("mean", "std"))
    logits = networks["structure_decoder"](z * std + mean)[0, 0]
    coords = torch.nn.functional.pad(torch.argwhere(logits > 0), (1, 0))

    latent_flow = networks["latent_flow"]
    z = euler_by_hand(
        lambda z, t, yes: latent_flow(SparseVoxels.from_coords(coords, z, 16), t, image if yes else nothing),
        torch.randn(len(coords), 4, generator=generator), 2, 1.0, 1.5, (0.0, 1.0),
    )  # fmt: skip
    mean, std = (torch.tensor(settings["latents"][k]) for k in ("mean", "std"))
    return networks["decoder"](SparseVoxels.from_coords(coords, z * std + mean, 16))[0]


def test_the_whole_path_is_what_it_says(tiny, model):
    with torch.no_grad():
        expected = by_hand(tiny, 7)
    result = model(tiny.photo(), seed=7)
    assert len(result.gaussians) == len(expected) == 4 * len(result.latents) > 0
    for name in NAMES:
        reference = getattr(expected, name)
        error = (getattr(result.gaussians, name) - reference).abs().max() / reference.abs().max()
        assert error < 2e-4, name
    assert result.photos[0].method == "alpha" and result.notes == ()
    assert set(result.seconds) == {"photos", "condition", "structure", "latents", "decode"}


@pytest.mark.parametrize("backbone", ["smdit", "dit"])
def test_a_batch_is_its_items_alone(tiny, bundles, backbone):
    model = ImageTo3D.from_pretrained(str(bundles[backbone]))
    images = [tiny.photo(i) for i in range(4)]
    together = model.batch(images, [3, 4, 5, 3])
    alone = [model(image, seed=seed) for image, seed in zip(images, [3, 4, 5, 3], strict=True)]
    for one, item in zip(alone, together, strict=True):
        assert one.seed == item.seed and difference(one, item) < 1e-5
        assert int(item.latents.coords[:, 0].max()) == 0
    assert difference(alone[0], alone[3]) > 1e-3  # another photo: the condition has an effect
    again = model(images[0], seed=3)
    assert difference(again, alone[0]) == 0  # twice the same: bit by bit
    assert difference(model(images[0], seed=4), alone[0]) > 1e-3


def test_nothing_global_changes(tiny, model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model(tiny.photo(), seed=1)
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()


def test_results_take_part_in_autograd(tiny, model):
    result = model(tiny.photo(), seed=1)
    means = result.gaussians.means.requires_grad_()
    (means * result.gaussians.scales).sum().backward()
    assert means.grad is not None


def test_several_photos_of_one_object(tiny, model):
    """Equal photos are one photo, in both modes; different ones are not; also in batches."""
    images = [tiny.photo(0), tiny.photo(1)]
    one = model(images[0], seed=1)
    for mode in ("stochastic", "multidiffusion"):
        twice = model([images[0]] * 2, seed=1, multi_image=mode)
        assert difference(twice, one) < 1e-5
        both = model(images, seed=1, multi_image=mode)
        assert difference(both, one) > 1e-4
        first, second = model.batch([images, images[::-1]], [1, 1], multi_image=mode)
        assert difference(first, both) < 1e-5
        if mode == "multidiffusion":  # the mean has no order
            assert difference(second, first) < 1e-4
    with pytest.raises(InputError, match=r"same number of photos for each, got \[1, 2\]"):
        model.batch([images, images[:1]], [1, 1])


def test_no_photo_is_left_out_where_there_are_fewer_steps_than_photos(tiny, model):
    """One step cannot take turns: the modes agree then, and the second photo counts."""
    stages = {name: StageSettings(1, 1.5, shift=1.0) for name in ("structure", "latent")}
    pairs = [[tiny.photo(0), tiny.photo(k)] for k in (0, 1)]
    same, other = (model(pair, seed=1, **stages) for pair in pairs)
    mean = model(pairs[1], seed=1, multi_image="multidiffusion", **stages)
    assert difference(other, mean) == 0
    assert difference(other, same) > 1e-4


def test_pruned_objects_are_without_what_no_side_shows(tiny, model):
    """Where nothing shows as much as is asked for, all stay."""
    whole, pruned, kept = (
        model(tiny.photo(), seed=1, latent=replace(model.latent_settings, prune=pixels)).gaussians
        for pixels in (0.0, 2.0, 1e9)
    )
    assert 0 < len(pruned) < len(whole) == len(kept)
    rows = {tuple(row) for row in whole.means.tolist()}
    assert {tuple(row) for row in pruned.means.tolist()} <= rows
    assert len(pruned) == int((shown(whole) >= 2).sum())


def test_the_sampler_that_is_asked_for_runs(tiny, model):
    """In one step, a multistep method is Euler's and Heun's is not; more steps tell all three apart."""

    def run(sampler, steps):
        stage = StageSettings(steps, 1.5, shift=1.0, sampler=sampler)
        return model(tiny.photo(), seed=1, latent=stage)

    assert difference(run("euler", 1), run("adams_bashforth", 1)) == 0
    assert difference(run("euler", 1), run("heun", 1)) > 1e-3
    several = [run(sampler, 3) for sampler in ("euler", "heun", "adams_bashforth")]
    for one, other in itertools.combinations(several, 2):
        assert difference(one, other) > 1e-3


def test_a_lower_threshold_adds_voxels_to_the_same_structure(tiny, model):
    def voxels(threshold):
        settings = replace(model.structure_settings, threshold=threshold)
        made = model(tiny.photo(), seed=3, structure=settings)
        return {tuple(row) for row in made.latents.coords[:, 1:].tolist()}

    least, usual, most = voxels(0.05), voxels(0.0), voxels(-1e6)
    assert least < usual < most and len(most) == 16**3


def test_progress_counts_every_step_of_a_stage_once(tiny, model):
    """Of a batch, too: stage 1 takes an item at a time there."""
    stages = model.structure_settings, model.latent_settings
    reported = {"structure": [], "latents": []}

    def progress(stage, step, steps):
        reported[stage].append((step, steps))

    model.batch([tiny.photo(), tiny.photo(1)], [1, 2], progress=progress)
    for stage, own, items in zip(("structure", "latents"), stages, (2, 1), strict=True):
        steps = items * own.num_steps
        assert reported[stage] == [(k + 1, steps) for k in range(steps)]


def test_with_low_memory_a_batch_takes_each_network_to_the_device_once(tiny, bundles):
    model = ImageTo3D.from_pretrained(str(bundles["smdit"]), low_memory=True)
    visits = []
    for name, network in {**vars(model.networks), "conditioner": model.stages.conditioner}.items():
        network.register_forward_pre_hook(lambda *_, name=name: visits.append(name))
    model.stages.on_device = counted(model.stages.on_device, visits)
    model.batch([tiny.photo(), tiny.photo(1)], [1, 2])
    assert visits.count("moved") == 5 == len(set(visits) - {"moved"})


def counted(on_device, visits):
    def move(network):
        visits.append("moved")
        return on_device(network)

    return move


def test_low_memory_gives_the_same(tiny, bundles, model):
    other = ImageTo3D.from_pretrained(str(bundles["smdit"]), low_memory=True)
    assert difference(other(tiny.photo(), seed=2), model(tiny.photo(), seed=2)) == 0


def test_half_precision_torsos_come_close(tiny, bundles, model):
    half = ImageTo3D.from_pretrained(str(bundles["smdit"]), dtype=torch.bfloat16)
    assert half.networks.latent_flow.torso_dtype == torch.bfloat16
    ours, exact = half(tiny.photo(), seed=2), model(tiny.photo(), seed=2)
    assert abs(len(ours.latents) - len(exact.latents)) < 0.2 * len(exact.latents)


def test_ready_pictures_are_taken_as_they_are(tiny, model):
    photo = model.photo(tiny.photo())
    picture = Image.fromarray((photo.picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    expected = model(photo, seed=1)
    assert difference(expected, model(tiny.photo(), seed=1)) == 0
    again = model(picture, seed=1, prepare=False)
    assert torch.allclose(again.photos[0].picture, photo.picture, atol=1 / 255)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m("a chair"), "takes images, not text"),
        (lambda m, p: m([]), "at least one image"),
        (lambda m, p: m(p, multi_image="mixed"), "multi_image: expected one of"),
        (lambda m, p: m.batch([p], [1, 2]), "seeds: expected 1"),
        (lambda m, p: m.batch([], []), "seeds"),
        (lambda m, p: m(p, background_removal="magic"), "background removal: expected one of"),
        (lambda m, p: m(p, structure=StageSettings(0)), "steps: expected at least 1"),
        (lambda m, p: m(p, structure=StageSettings(guidance_scale=float("nan"))), "guidance scale"),
        (lambda m, p: m(p, structure=StageSettings(threshold=float("nan"))), "threshold: expected a number"),
        (lambda m, p: m(p, latent=StageSettings(prune=-1.0)), "prune: expected a number of pixels"),
        (lambda m, p: m(p, structure=StageSettings(sampler="rk99")), "sampler: expected one of euler"),
    ],
)
def test_what_callers_get_wrong(tiny, model, call, message):
    with pytest.raises(InputError, match=message):
        call(model, tiny.photo())


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cuda", (9, 0), torch.bfloat16),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float32),
        ("cpu", None, torch.float32),
    ],
)
def test_flows_of_our_own_are_sampled_in_bfloat16_where_a_gpu_has_it(
    bundles, device, capability, expected, monkeypatch
):
    """Only flows, and only their torsos; a dtype that is asked for is taken."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    folder = bundles["smdit"]
    info = read_bundle(folder)
    for asked in (None, torch.float16):
        options = Options(torch.device(device), asked, True, None, False)
        for name in ("structure_flow", "latent_flow", "decoder"):
            network = load_bundle_network(folder, info, name, options)
            flow = expected if name != "decoder" else torch.float32
            assert network.torso_dtype == (asked or flow), name
            assert network.input_layer.weight.dtype == torch.float32
    released = replace(info, networks={n: replace(e, half=True) for n, e in info.networks.items()})
    network = load_bundle_network(
        folder, released, "latent_flow", Options(torch.device(device), None, True, None, False)
    )
    assert network.torso_dtype == (torch.float16 if device == "cuda" else torch.float32)
