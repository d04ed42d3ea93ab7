"""``diff2to3 data prepare`` and ``inspect`` as a user runs them, the contact sheet, and the shipped
configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.cli import main
from diff2to3.config import config_from_dict, config_to_dict, load_config, save_config
from diff2to3.data.inspect import choose_assets, contact_sheet, draw_voxels, principal_components
from diff2to3.data.schema import DataConfig
from diff2to3.data.store import AssetStore
from diff2to3.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
#: Of the small dataset.
STAGES = [
    "views_input",
    "views_cond",
    "voxels_16",
    "voxels_32",
    "points_200",
    "features_rgb",
    "features_stats",
]
CONFIGS = sorted((ROOT / "configs/data").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path: Path, tmp_path: Path) -> None:
    config = load_config(DataConfig, path, ["source=somewhere"])
    assert config.features and config.view_sets
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(DataConfig, tmp_path / "saved.yaml") == config


def test_both_presets_are_shipped_with_the_sizes_of_the_design() -> None:
    mini, large = (
        load_config(DataConfig, ROOT / f"configs/data/{n}.yaml", ["source=x"]) for n in ("mini", "large")
    )
    assert mini.features["mini"].resolution == 32 and mini.view_sets["cond"].size == 256
    assert [v.cameras.num_views for v in mini.view_sets.values()] == [12, 16, 24]
    assert large.resolutions == [64] and large.features["flux"].modes == ["mean"]
    assert {n: (v.size, v.cameras.num_views) for n, v in large.view_sets.items()} == {
        "recon": (512, 150),
        "cond": (512, 24),
    }


@pytest.mark.parametrize(
    "values, said",
    [
        ({"features": {"a": {"provider": "taef3"}}}, "provider: expected one of flux, .*'taef3'"),
        ({"features": {"a": {"provider": "rgb"}}}, r"features\.a\.views: no view set 'input'"),
        (
            {"view_sets": {"input": {}}, "features": {"a": {"provider": "rgb"}}},
            r"input\.depths: .*needs true",
        ),
        (
            {
                "view_sets": {"input": {"depths": True}},
                "features": {"a": {"provider": "rgb", "resolution": 32}},
            },
            r"features\.a\.resolution: 32 is not in resolutions",
        ),
        ({"resolutions": [512]}, "1 to 256, got 512"),
        ({"view_sets": {"a-b": {}}}, "'a-b': names of sets"),
        ({"weights": {"taef": "x"}}, "weights: unknown provider 'taef'"),
        ({"view_sets": {"a": {"size": 4}}}, "size: expected 8 to 4096"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config_from_dict(DataConfig, {"source": "a", "out": "b", **values})


def test_prepare_then_inspect(
    tmp_path: Path, settings: Callable[..., DataConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(settings(tmp_path / "set"), tmp_path / "tiny.yaml")
    command = ["data", "prepare", str(tmp_path / "tiny.yaml"), "--set", "filter.limit=4", "--workers", "0"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert [line.split()[:4] for line in out.splitlines() if line[0].isalpha()][1:] == [
        [stage, "4", "4", "0"] for stage in STAGES
    ]
    assert "asset/s" in err or "s/asset" in err
    assert main([*command, "--quiet"]) == 0
    assert "views_input                4       0       0" in capsys.readouterr().out
    saved = load_config(DataConfig, tmp_path / "set/dataset.yaml")
    assert config_to_dict(saved)["filter"]["limit"] == 4

    sheet = tmp_path / "sheet.png"
    assert (
        main(["data", "inspect", str(tmp_path / "set"), "-o", str(sheet), "--num", "3", "--cell", "24"]) == 0
    )
    assert "3 assets" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and picture.height > 3 * 24


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["prepare", "none.yaml"], "none.yaml: no such file"),
        (["prepare", "{tiny}", "--set", "sead=3"], "unknown key 'sead'; did you mean 'seed'?"),
        (["prepare", "{tiny}", "--set", "source=/no/where"], "/no/where"),
        (["prepare", "{tiny}", "--workers", "-1"], "workers: expected a positive number, got -1"),
        (["prepare", "{tiny}", "--set", "filter.ids=/no/ids"], "/no/ids"),
        (["inspect", "nothing"], "nothing: not a prepared dataset"),
        (["inspect", "{set}", "--num", "0"], "--num: expected a positive number"),
        (["inspect", "{set}", "--id", "pack/box-99"], "no asset 'pack/box-99'"),
        (["inspect", "{set}", "-o", "/no/folder/x.png"], "/no/folder/x.png: cannot be written"),
        (["inspect", "{set}", "--split", "test"], "no complete asset"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    prepared: Path,
    settings: Callable[..., DataConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_config(settings(tmp_path / "out"), tmp_path / "tiny.yaml")
    filled = [a.format(tiny=tmp_path / "tiny.yaml", set=prepared) for a in arguments]
    assert main(["data", *filled]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3"])
def test_a_malformed_part_is_a_usage_error(text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "x.yaml", f"--shard={text}"])
    assert caught.value.code == 2


class TestSheet:
    def test_voxels_cover_what_the_view_shows(self, prepared: Path) -> None:
        store = AssetStore(prepared)
        for asset in store.assets():
            view = store.views(asset, "input", [0])
            coords = store.coords(asset, 32)
            drawn = draw_voxels(coords, torch.zeros(len(coords), 3), 32, view.viewmats[0], view.Ks[0], 48)
            covered, shown = drawn[..., 0] == 0, view.alphas[0] > 0.9
            assert (covered & shown).sum() >= 0.99 * shown.sum()
            # A voxel reaches out of the object by at most itself, 1.4 pixels here.
            grown = torch.nn.functional.max_pool2d((view.alphas > 0).float(), 7, 1, 3)[0] > 0
            assert not (covered & ~grown).any()

    def test_near_voxels_hide_far_ones(self) -> None:
        coords = torch.tensor([[4, 4, 1], [4, 4, 6]])
        colors = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
        viewmat = torch.eye(4)  # looks along +z from z = -2
        viewmat[2, 3] = 2.0
        K = torch.tensor([[40.0, 0, 16], [0, 40, 16], [0, 0, 1]])
        assert draw_voxels(coords, colors, 8, viewmat, K, 32)[17, 17].tolist() == [1, 0, 0]
        assert draw_voxels(coords.flip(0), colors.flip(0), 8, viewmat, K, 32)[17, 17].tolist() == [1, 0, 0]

    def test_components_are_those_of_the_singular_values(self) -> None:
        feats = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3
        mean, basis = principal_components(feats)
        centered = (feats - feats.mean(0)).double().numpy()
        _, _, right = np.linalg.svd(centered, full_matrices=False)
        unit = basis / basis.norm(dim=0)
        np.testing.assert_allclose(np.abs(np.diag(right[:3] @ unit.numpy())), 1, atol=1e-6)
        projected = (feats.double() - mean) @ basis
        assert 0.95 < (projected.abs() <= 1).double().mean() < 1
        two = principal_components(feats[:, :2])[1]
        assert two.shape == (2, 3) and (two[:, 2] == 0).all()

    def test_panels_labels_and_columns(self, prepared: Path) -> None:
        store = AssetStore(prepared)
        chosen = choose_assets(store, 4)
        assert [a.id for a in chosen] == ["pack/box-0", "pack/box-2", "pack/box-5", "pack/box-7"]
        assert choose_assets(store, 100) == store.plan
        one = contact_sheet(store, chosen, cell=24, views_per_set=2)
        two = contact_sheet(store, chosen, cell=24, views_per_set=2, columns=2)
        # 2 + 2 views, two grids, and two feature sets, one of them in two modes.
        assert one.width == 9 * 26 + 6 and two.width == 2 * one.width and two.height < one.height
        partial = AssetStore(prepared, ["views_cond"])
        assert contact_sheet(partial, chosen, cell=24, views_per_set=2).width == 2 * 26 + 6
