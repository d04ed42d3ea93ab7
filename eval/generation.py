"""How much of an asset a generator gives back from one photo of it, beside two baselines that it must beat.

    python eval/generation.py --assets FOLDER_OR_ZIPS --split val --model mini --out results.json

For every asset, one conditioning view goes in (from the camera set of training's conditioning views, seeded, from the
horizon up to 60 degrees above it), and the object that comes out is compared with the asset:

    voxel_iou         of the generated voxels and those that the asset's surface crosses, on the model's grid
    chamfer, f_score  between Gaussians that are at least half opaque and the asset's surface, in object units
    psnr, ssim, psnr_foreground, ciede2000   of 8 renderings and the asset's, on white, from fixed cameras
    lpips, clip, fd_*, kd_*   with --weights NAME=PATH (lpips, clip, inception, dinov2; see eval/README.md)

Baselines, with the same numbers: "retrieval" is the training asset whose views look most like the photo (see
diff2to3/evaluation/retrieval.py), shown as it is; "random" is the mean over ten random training assets (two views of
each). What the baselines need of the training assets is kept under --cache. --train-assets are those of split train of
--assets, unless given.

Printed and in OUT: means with 95 % intervals by bootstrap over assets, paired differences to the baselines, the means
by pack; pictures in OUT_pictures/index.html. A killed run is continued by the same command. Exit code 0; 1 where no
asset could be scored; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diff2to3.assets import AssetRecord
from diff2to3.config import config_to_dict
from diff2to3.errors import InputError
from diff2to3.evaluation.assets import AssetList, choose_assets
from diff2to3.evaluation.cli import WEIGHTS, Worker, check_arguments, main_of, parse_weights
from diff2to3.evaluation.generation import (
    METHODS,
    Setup,
    generation_rules,
    load_extractors,
    load_model,
    method_rows,
    paired,
    save_picture,
    score_asset,
    set_scores,
    write_records,
)
from diff2to3.evaluation.parallel import default_workers, resume_folder, run_items
from diff2to3.evaluation.protocol import draw_ids
from diff2to3.evaluation.reconstruction import load_lpips, model_digest, model_lighting
from diff2to3.evaluation.results import (
    intervals_of,
    markdown_table,
    mean_of,
    result_of,
    text_table,
    write_gallery,
)
from diff2to3.evaluation.retrieval import NUM_VIEWS, IndexSetup, build_index
from diff2to3.files import write_atomic

#: Training assets that random draws choose from: showing all of them would take longer than everything else.
POOL = 64


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    bounds = {"views": (1, 1000), "resolution": (32, 4096), "workers": (0, 256), "pictures": (0, 1000)}
    check_arguments(args, bounds, ("limit", "steps"))
    weights = {name: path for name, path in parse_weights(args.weights).items() if path != "none"}
    device = Worker().device(args.device)
    rules = generation_rules(args.views, args.resolution, args.seed)
    setup = Setup(args.model, rules, device=str(device), offline=args.offline, steps=args.steps)
    model = load_model(setup)  # bad weights are found before anything is rendered
    name, digest = model_digest(args.model, args.offline)
    rules = generation_rules(args.views, args.resolution, args.seed, model_lighting(args.model, args.offline))
    setup = replace(setup, rules=rules, resolution=int(model.networks.latent_flow.config.resolution))
    setup = replace(setup, weights=tuple(sorted(weights.items())))
    load_extractors(setup)
    load_lpips(weights.get("lpips"), rules.lpips_net, setup.device)
    assets = choose_assets(args.assets, args.split, args.ids, args.limit)
    train, notes = training_assets(args, assets)
    notes = [*assets.notes, *notes]
    absent = [w for w in WEIGHTS if w not in weights]
    if absent:
        notes.append(f"left out: {', '.join(absent)}: no weights; give --weights NAME=PATH")
    settings: dict[str, Any] = {
        "model": {"name": name, "sha256": digest, "steps": args.steps},
        "protocol": config_to_dict(rules),
        "protocol_sha256": rules.digest(),
        "split": args.split,
        "train": {"num_assets": len(train.records), "sha256": train.fingerprint()},
    }
    identity = {**settings, "assets": assets.fingerprint(), "weights": weights, "baselines": args.baselines}
    setup, more = with_baselines(args, setup, train)
    folder = resume_folder(args.out, identity)
    setup = replace(setup, features=str(folder.path) if set(weights) & {"inception", "dinov2"} else "")
    items = [(record.id, record) for record in assets.records]
    outcomes = run_items(folder, score_asset, setup, items, workers=args.workers, label="generation")
    result = collect(assets.records, outcomes, setup, settings, [*notes, *more], device, start)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    report(args, setup, assets, result)
    shutil.rmtree(folder.path)
    return 0 if result["assets"] else 1


def training_assets(args: argparse.Namespace, assets: AssetList) -> tuple[AssetList, list[str]]:
    """What the baselines know, without any asset that is scored; and what should be said."""
    if not args.baselines:
        return AssetList([], []), ["no baselines (--no-baselines)"]
    try:
        found = choose_assets(args.train_assets or args.assets, args.train_split)
    except InputError as error:
        if args.train_assets:
            raise
        return AssetList([], []), [f"no baselines: {error}; give --train-assets"]
    scored = {record.id for record in assets.records}
    kept = [record for record in found.records if record.id not in scored]
    if len(kept) < 2:
        return AssetList([], []), ["no baselines: no training asset that is not scored; give --train-assets"]
    overlap = len(found.records) - len(kept)
    notes = [f"{overlap} training assets are scored, and left out of the baselines"] if overlap else []
    return AssetList(kept, []), notes


def with_baselines(args: argparse.Namespace, setup: Setup, train: AssetList) -> tuple[Setup, list[str]]:
    """The setup with an index of the training views, made once."""
    if not train.records:
        return setup, []
    cache = args.cache or Path.home() / ".cache" / "diff2to3" / "evaluation"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        index, failed = build_index(cache, IndexSetup(setup.rules, NUM_VIEWS), train.records, args.workers)
        records = write_records(cache, train)
    except OSError as error:
        raise InputError(f"--cache {cache}: cannot be written: {error.strerror or error}") from error
    broken = {line.split(":")[0] for line in failed}
    known = [record.id for record in train.records if record.id not in broken]
    pool = tuple(draw_ids(known, POOL, setup.rules.seed))
    drawn = f"{min(setup.num_random, len(pool))} of {len(pool)} of them an asset, drawn with seed {setup.rules.seed}"
    notes = [f"retrieval: {NUM_VIEWS} views of each of {len(known)} training assets; random: {drawn}"]
    notes += [f"training asset left out: {line}" for line in failed]
    return replace(setup, index=str(index), train=str(records), pool=pool), notes


def collect(
    records: Sequence[AssetRecord],
    outcomes: Mapping[str, Mapping[str, Any]],
    setup: Setup,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    device: Any,
    start: float,
) -> dict[str, Any]:
    """The result: ``mean`` and ``assets`` are the model's own; ``baselines`` and ``differences`` beside them."""
    rows = {method: method_rows(outcomes, method) for method in METHODS}
    own = {
        name: {"values": rows["ours"][name]} if name in rows["ours"] else row
        for name, row in outcomes.items()
    }
    result = result_of(
        "generation",
        records,
        own,
        settings=settings,
        notes=notes,
        device=device,
        seconds=time.perf_counter() - start,
    )
    sets = set_scores(setup, list(rows["ours"]), [m for m in METHODS if rows[m]])
    result["mean"] |= sets.get("ours", {})
    result["baselines"] = {
        method: {"mean": mean_of(rows[method]) | sets.get(method, {}), "interval": intervals_of(rows[method])}
        for method in METHODS[1:]
        if rows[method]
    }
    result["differences"] = {
        method: paired(rows["ours"], rows[method], result["mean"], held["mean"])
        for method, held in result["baselines"].items()
    }
    nothing = [name for name, row in outcomes.items() if "nothing" in row.get("values", {})]
    if nothing:
        result["notes"].append(
            f"{len(nothing)} assets of which the model made nothing are scored as empty space: {', '.join(nothing)}"
        )
    result["baseline_assets"] = {
        name: {
            k: row["values"][k] for k in ("retrieved", "retrieval", "drawn", "random") if k in row["values"]
        }
        for name, row in sorted(outcomes.items())
        if "values" in row
    }
    return result


def report(args: argparse.Namespace, setup: Setup, assets: AssetList, result: dict[str, Any]) -> None:
    """Print the tables, and show some assets."""
    counts = result["num_assets"]
    methods = {f"{args.model}": result["mean"]} | {n: h["mean"] for n, h in result["baselines"].items()}
    tables = [text_table(methods, "method"), text_table(result["packs"], "pack")]
    lines = [
        f"{counts['scored']} of {counts['asked']} assets scored, {counts['failed']} failed; "
        f"{args.views} views of {args.resolution} pixels"
    ]
    for method, metrics in result["differences"].items():
        worse = [f"{k} ({d['mean']:+.4g})" for k, d in metrics.items() if not d["better"]]
        lines.append(
            f"beats {method} on every metric" if not worse else f"worse than {method}: {', '.join(worse)}"
        )
    lines += [*result["notes"], *(f"failed: {name}: {reason}" for name, reason in result["failed"].items())]
    for table in tables:
        print(table, end="\n\n")
    print("\n".join(lines))
    if args.table is not None:
        parts = [markdown_table(methods, "method"), markdown_table(result["packs"], "pack")]
        notes = "\n".join(f"- {line}" for line in lines)
        write_atomic(args.table, "\n\n".join([*parts, notes]) + "\n")
    names = draw_ids(result["assets"], args.pictures, 1) if args.pictures else []
    if not names:
        return
    folder = args.out.with_name(f"{args.out.stem}_pictures")
    folder.mkdir(exist_ok=True)
    records = {record.id: record for record in assets.records}
    items, shown = [], []
    for number, name in enumerate(names, 1):
        picture = f"{number:02d}.png"
        items.append((f"picture of {name}", (records[name], str(folder / picture))))
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in result["assets"][name].items() if v is not None)
        shown.append((name, numbers, picture))
    run_items(None, save_picture, setup, items, workers=args.workers, label="pictures")
    intro = [
        f"Model {result['model']['name']}. Assets drawn at random. First column: the photo; then a row each of the "
        "asset, what was generated, and the training asset that looks most like the photo."
    ]
    write_gallery(folder / "index.html", "Generation", intro, [*tables, *lines], shown)
    print(f"pictures: {folder / 'index.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--assets", nargs="+", required=True, help="folders, zips or 3D files; or NAME:FOLDER"
    )
    parser.add_argument("--split", help="only assets of this split, where there is a manifest (default: all)")
    parser.add_argument("--train-assets", nargs="+", help="for the baselines (default: those of --assets)")
    parser.add_argument("--train-split", default="train", help="of them (default: %(default)s)")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--model", default="mini", help="embedded model, folder or hub repository")
    parser.add_argument("--steps", type=int, help="of both samplers (default: the model's)")
    parser.add_argument("--views", type=int, default=8, help="compared, an asset (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the result, a JSON file")
    parser.add_argument("--table", type=Path, help="also the tables, as Markdown")
    parser.add_argument("--seed", type=int, default=0, help="of cameras and noise (default: %(default)s)")
    parser.add_argument("--ids", help="a file with one id a line: the assets to score")
    parser.add_argument("--limit", type=int, help="score only so many of the assets")
    parser.add_argument("--pictures", type=int, default=16, help="assets to show (default: %(default)s)")
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="NAME=PATH", help=f"of {', '.join(WEIGHTS)}"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for what the baselines need (default: ~/.cache/diff2to3)"
    )
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
