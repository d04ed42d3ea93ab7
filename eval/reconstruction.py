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
are in OUT_worst/index.html. A killed run is continued by the same command; its results so far are in OUT.partial. A
broken asset is listed and counted, and does not stop the others. Exit code 0; 1 where no asset could be scored; 2 for
bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from diff2to3.evaluation.assets import choose_assets
from diff2to3.evaluation.cli import Worker, add_model_arguments, check_arguments, main_of, parse_weights
from diff2to3.evaluation.engine import Plan, run_plan
from diff2to3.evaluation.models import Autoencoder, model_digest
from diff2to3.evaluation.protocol import reconstruction_rules
from diff2to3.evaluation.report import Sheet
from diff2to3.evaluation.results import markdown_table, result_of, text_table, worst, write_sheets
from diff2to3.evaluation.runs import unfinished_run
from diff2to3.evaluation.scores import given_metrics
from diff2to3.evaluation.sources import MeshSource
from diff2to3.evaluation.summary import scores_of
from diff2to3.files import write_atomic

METHOD = "reconstruction"


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    bounds = {"views": (1, 1000), "resolution": (16, 4096), "workers": (0, 256), "worst": (0, 1000)}
    check_arguments(args, bounds, ("limit",))
    weights = {n: path for n, path in parse_weights(args.weights).items() if n == "lpips" and path != "none"}
    device = Worker().device(args.device)
    model = Autoencoder(args.model, str(device), args.offline, structure=True)
    lighting = model.network.settings.views.render  # and bad weights are found before anything is rendered
    rules = reconstruction_rules(args.views, args.resolution, args.seed, lighting)
    metrics = given_metrics(rules, weights, device, args.offline)
    name, digest = model_digest(args.model, args.offline)
    assets = choose_assets(args.assets, args.split, args.ids, args.limit)
    plan = Plan(rules, MeshSource(tuple(args.assets), args.split), ((METHOD, model),), metrics, str(device))
    missing = [] if weights else ["lpips is left out: no weights; give --weights lpips=FILE"]
    settings: dict[str, Any] = {
        "model": {"name": name, "sha256": digest},
        "protocol": rules.to_dict(),
        "protocol_sha256": rules.digest(),
        "split": args.split,
    }
    identity = {**settings, "assets": assets.fingerprint(), "weights": weights}
    with unfinished_run(args.out, identity) as folder:
        ids = [record.id for record in assets.records]
        lines = run_plan(folder, plan, ids, label=METHOD, workers=args.workers)
        result = result_of(
            METHOD,
            assets.records,
            scores_of(lines, METHOD),
            settings=settings,
            notes=[*assets.notes, *missing],
            device=device,
            seconds=time.perf_counter() - start,
        )
        result["worst"] = worst(result["assets"], "psnr", args.worst)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
        report(args, plan, result)
    return 0 if result["assets"] else 1


def report(args: argparse.Namespace, plan: Plan, result: dict[str, Any]) -> None:
    """Print the tables, and show the worst assets."""
    counts = result["num_assets"]
    rows = {**result["packs"], "mean": {"num_assets": float(counts["scored"]), **result["mean"]}}
    table = text_table(rows, "pack")
    intervals = [
        f"{k} {low:.4g} to {high:.4g}" for k, (low, high) in result["interval"].items() if k != "num_voxels"
    ]
    summary = [
        f"{counts['scored']} of {counts['asked']} assets scored, {counts['failed']} failed; model {args.model}, "
        f"{args.views} views of {args.resolution} pixels",
        *(["95 % intervals: " + ", ".join(intervals)] if intervals else []),
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
    intro = f"Model {result['model']['name']}. Rows: asset, reconstruction, white minus three times their difference."
    page = write_sheets(
        args.out.with_name(f"{args.out.stem}_worst"),
        plan,
        result["worst"],
        result,
        [table, *summary[1:]],
        title="Reconstruction: the worst",
        intro=intro,
        sheet=Sheet("", "worst-", (METHOD,), difference=True),
        workers=args.workers,
    )
    print(f"\nthe {len(result['worst'])} with the least PSNR (pictures in {page}):")
    print(text_table({name: result["assets"][name] for name in result["worst"]}, "asset"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="reconstruction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--worst", type=int, default=10, help="assets to show (default: %(default)s)")
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
