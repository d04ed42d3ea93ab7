"""How well a model's 2to3-VAE gives assets back, seen from cameras that it was not given.

    python eval/reconstruction.py --assets FOLDER_OR_ZIPS --split val --model mini --out results.json

For every asset: the model's input views are rendered and become Gaussians; these are rendered from other cameras
(the same camera set, drawn for evaluation alone) on white and compared with the asset. Printed and in OUT: means over
assets of

    psnr              over the whole picture, in dB
    psnr_foreground   over the pixels that the asset covers by more than half
    ssim              over the whole picture
    lpips             with --weights lpips=FILE (see eval/README.md)
    ciede2000         colour difference over the foreground's pixels
    structure_iou     of the sparse-structure VAE, where the model has one

with 95 % intervals by bootstrap over assets, the same by pack, and the ten assets with the least PSNR, whose pictures
are in OUT_worst/index.html. A killed run is continued by the same command. A broken asset is listed and counted, and
does not stop the others. Exit code 0; 1 where no asset could be scored; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diff2to3.config import config_to_dict
from diff2to3.evaluation.assets import AssetList, choose_assets
from diff2to3.evaluation.cli import Worker, check_arguments, main_of, parse_weights
from diff2to3.evaluation.parallel import default_workers, resume_folder, run_items
from diff2to3.evaluation.reconstruction import (
    Setup,
    load_lpips,
    load_model,
    model_digest,
    reconstruction_rules,
    save_picture,
    score_asset,
)
from diff2to3.evaluation.results import markdown_table, result_of, text_table, worst, write_gallery
from diff2to3.files import write_atomic


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    bounds = {"views": (1, 1000), "resolution": (16, 4096), "workers": (0, 256), "worst": (0, 1000)}
    check_arguments(args, bounds, ("limit",))
    weights = parse_weights(args.weights).get("lpips")
    device = Worker().device(args.device)
    rules = reconstruction_rules(args.views, args.resolution, args.seed)
    setup = Setup(args.model, rules, None if weights == "none" else weights, str(device), args.offline)
    lighting = load_model(
        setup
    ).settings.views.render  # and bad weights are found before anything is rendered
    rules = reconstruction_rules(args.views, args.resolution, args.seed, lighting)
    setup = Setup(setup.model, rules, setup.weights, setup.device, setup.offline)
    load_lpips(setup.weights, rules.lpips_net, setup.device)
    name, digest = model_digest(args.model, args.offline)
    assets = choose_assets(args.assets, args.split, args.ids, args.limit)
    notes = [
        *assets.notes,
        *([] if setup.weights else ["lpips is left out: no weights; give --weights lpips=FILE"]),
    ]
    settings: dict[str, Any] = {
        "model": {"name": name, "sha256": digest},
        "protocol": config_to_dict(rules),
        "protocol_sha256": rules.digest(),
        "split": args.split,
    }
    folder = resume_folder(args.out, {**settings, "assets": assets.fingerprint(), "weights": setup.weights})
    items = [(record.id, record) for record in assets.records]
    outcomes = run_items(folder, score_asset, setup, items, workers=args.workers, label="reconstruction")
    seconds = time.perf_counter() - start
    result = result_of(
        "reconstruction",
        assets.records,
        outcomes,
        settings=settings,
        notes=notes,
        device=device,
        seconds=seconds,
    )
    result["worst"] = worst(result["assets"], "psnr", args.worst)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    report(args, setup, assets, result)
    shutil.rmtree(folder.path)
    return 0 if result["assets"] else 1


def report(args: argparse.Namespace, setup: Setup, assets: AssetList, result: dict[str, Any]) -> None:
    """Print the tables, and show the worst assets."""
    rows = {
        **result["packs"],
        "mean": {"num_assets": float(result["num_assets"]["scored"]), **result["mean"]},
    }
    table = text_table(rows, "pack")
    lines = [
        f"{k} {low:.4g} to {high:.4g}" for k, (low, high) in result["interval"].items() if k != "num_voxels"
    ]
    counts = result["num_assets"]
    summary = [
        f"{counts['scored']} of {counts['asked']} assets scored, {counts['failed']} failed; model {args.model}, "
        f"{args.views} views of {args.resolution} pixels",
        *(["95 % intervals: " + ", ".join(lines)] if lines else []),
        *result["notes"],
        *(f"failed: {name}: {reason}" for name, reason in result["failed"].items()),
    ]
    print(table)
    print("\n".join(summary))
    if args.table is not None:
        notes = "\n".join(f"- {line}" for line in summary)
        write_atomic(args.table, f"{markdown_table(rows, 'pack')}\n\n{notes}\n")
    if not result["worst"]:
        return
    folder = args.out.with_name(f"{args.out.stem}_worst")
    page = show_worst(folder, args, setup, assets, result, [table, *summary[1:]])
    print(f"\nthe {len(result['worst'])} with the least PSNR (pictures in {page}):")
    print(text_table({name: result["assets"][name] for name in result["worst"]}, "asset"))


def show_worst(
    folder: Path,
    args: argparse.Namespace,
    setup: Setup,
    assets: AssetList,
    result: dict[str, Any],
    tables: Sequence[str],
) -> Path:
    """Pictures of the worst assets, made once more: keeping those of all would take more room than time saved."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("worst-*.png"):
        old.unlink()
    records = {record.id: record for record in assets.records}
    items, shown = [], []
    for number, name in enumerate(result["worst"], 1):
        picture = f"worst-{number:02d}.png"
        items.append((f"picture of {name}", (records[name], str(folder / picture))))
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in result["assets"][name].items() if v is not None)
        shown.append((name, numbers, picture))
    run_items(None, save_picture, setup, items, workers=args.workers, label="pictures of the worst")
    intro = [
        f"Model {result['model']['name']}. Rows: asset, reconstruction, white minus three times their difference."
    ]
    write_gallery(folder / "index.html", "Reconstruction: the worst", intro, tables, shown)
    return folder / "index.html"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="reconstruction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--assets", nargs="+", required=True, help="folders, zips or 3D files; or NAME:FOLDER"
    )
    parser.add_argument("--split", help="only assets of this split, where there is a manifest (default: all)")
    parser.add_argument("--model", default="mini", help="embedded model, folder or hub repository")
    parser.add_argument("--views", type=int, default=8, help="held-out views an asset (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the result, a JSON file")
    parser.add_argument("--table", type=Path, help="also the tables, as Markdown")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out cameras (default: %(default)s)")
    parser.add_argument("--ids", help="a file with one id a line: the assets to score")
    parser.add_argument("--limit", type=int, help="score only so many of the assets")
    parser.add_argument("--worst", type=int, default=10, help="assets to show (default: %(default)s)")
    parser.add_argument("--weights", nargs="*", default=[], metavar="lpips=PATH")
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes; 0: in this one (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--offline", action="store_true", help="never open a connection")
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
