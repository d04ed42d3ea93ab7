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
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diff2to3.errors import InputError
from diff2to3.evaluation.assets import AssetList, choose_assets
from diff2to3.evaluation.cli import (
    WEIGHTS,
    Worker,
    add_model_arguments,
    check_arguments,
    main_of,
    parse_weights,
)
from diff2to3.evaluation.engine import Plan, run_plan
from diff2to3.evaluation.models import Generator, model_digest, model_lighting
from diff2to3.evaluation.protocol import PhotoProtocol, draw_ids, generation_rules
from diff2to3.evaluation.report import Sheet
from diff2to3.evaluation.results import (
    intervals_of,
    markdown_table,
    mean_of,
    paired,
    result_of,
    text_table,
    write_sheets,
)
from diff2to3.evaluation.retrieval import (
    NUM_VIEWS,
    IndexSetup,
    Library,
    RandomAssets,
    Retrieval,
    build_index,
    write_library,
)
from diff2to3.evaluation.runs import RunFolder, unfinished_run
from diff2to3.evaluation.scores import SET_EXTRACTORS, given_metrics
from diff2to3.evaluation.sources import MeshSource
from diff2to3.evaluation.subjects import Source
from diff2to3.evaluation.summary import scores_of, set_estimates
from diff2to3.files import write_atomic

#: Training assets that random draws choose from: showing all of them would take longer than everything else.
POOL = 64
#: The model's own results; the baselines' are under the names of their sources.
OURS = "ours"


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    bounds = {"views": (1, 1000), "resolution": (32, 4096), "workers": (0, 256), "pictures": (0, 1000)}
    check_arguments(args, bounds, ("limit", "steps"))
    weights = {name: path for name, path in parse_weights(args.weights).items() if path != "none"}
    device = Worker().device(args.device)
    model = Generator(args.model, str(device), args.offline, args.steps, nothing=True)
    model.load()  # bad weights are found before anything is rendered
    name, digest = model_digest(args.model, args.offline)
    lighting = model_lighting(args.model, args.offline)
    rules = generation_rules(args.views, args.resolution, args.seed, lighting, model.grid)
    metrics = given_metrics(rules, weights, device, args.offline)
    assets = choose_assets(args.assets, args.split, args.ids, args.limit)
    train, notes = training_assets(args, assets)
    notes = [*assets.notes, *notes]
    absent = [w for w in WEIGHTS if w not in weights]
    if absent:
        notes.append(f"left out: {', '.join(absent)}: no weights; give --weights NAME=PATH")
    settings: dict[str, Any] = {
        "model": {"name": name, "sha256": digest, "steps": args.steps},
        "protocol": rules.to_dict(),
        "protocol_sha256": rules.digest(),
        "split": args.split,
        "train": {"num_assets": len(train.records), "sha256": train.fingerprint()},
    }
    identity = {**settings, "assets": assets.fingerprint(), "weights": weights, "baselines": args.baselines}
    others, more = baselines(args, rules, train)
    methods = ((OURS, model), *((source.name, source) for source in others))
    plan = Plan(rules, MeshSource(tuple(args.assets), args.split), methods, metrics, str(device))
    with unfinished_run(args.out, identity) as folder:
        plan = replace(plan, features=str(folder.path) if set(weights) & set(SET_EXTRACTORS) else "")
        ids = [record.id for record in assets.records]
        lines = run_plan(folder, plan, ids, label="generation", workers=args.workers)
        result = result_of(
            "generation",
            assets.records,
            scores_of(lines, OURS),
            settings=settings,
            notes=[*notes, *more],
            device=device,
            seconds=time.perf_counter() - start,
        )
        add_baselines(result, folder, plan, lines, [n for n in SET_EXTRACTORS if n in weights])
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
        report(args, plan, result)
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


def baselines(
    args: argparse.Namespace, rules: PhotoProtocol, train: AssetList
) -> tuple[list[Source], list[str]]:
    """(sources, notes): retrieval, with an index of the training views that is made once, and random assets."""
    if not train.records:
        return [], []
    cache = args.cache or Path.home() / ".cache" / "diff2to3" / "evaluation"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        index, failed = build_index(cache, IndexSetup(rules, NUM_VIEWS), train.records, args.workers)
        library = Library(str(write_library(cache, train)), rules)
    except OSError as error:
        raise InputError(f"--cache {cache}: cannot be written: {error.strerror or error}") from error
    broken = {line.split(":")[0] for line in failed}
    known = [record.id for record in train.records if record.id not in broken]
    others = RandomAssets(library, tuple(draw_ids(known, POOL, rules.seed)))
    count, of = min(others.count, len(others.pool)), len(others.pool)
    drawn = f"{count} of {of} of them an asset, drawn with seed {rules.seed}"
    notes = [f"retrieval: {NUM_VIEWS} views of each of {len(known)} training assets; random: {drawn}"]
    notes += [f"training asset left out: {line}" for line in failed]
    return [Retrieval(library, str(index)), others], notes


def add_baselines(
    result: dict[str, Any],
    folder: RunFolder,
    plan: Plan,
    lines: Mapping[str, Mapping[str, Any]],
    extractors: Sequence[str],
) -> None:
    """FD and KD into the result's ``mean``, and beside it ``baselines``, ``differences`` and ``baseline_assets``."""
    scores = {key: scores_of(lines, key) for key, _ in plan.methods}
    sets = {}
    for key, held in scores.items():
        estimates = set_estimates(folder, key, held.values, extractors, plan.rules, resamples=0)
        sets[key] = {name: e.value for name, e in estimates.items()}
    result["mean"] |= sets[OURS]
    others = {key: held for key, held in scores.items() if key != OURS and held.values}
    result["baselines"] = {
        key: {"mean": mean_of(held.values) | sets[key], "interval": intervals_of(held.values)}
        for key, held in others.items()
    }
    result["differences"] = {
        key: paired(scores[OURS].values, held.values, result["mean"], result["baselines"][key]["mean"])
        for key, held in others.items()
    }
    nothing = [i for i, remarks in scores[OURS].remarks.items() if "nothing" in remarks]
    if nothing:
        result["notes"].append(
            f"{len(nothing)} assets of which the model made nothing are scored as empty space: {', '.join(nothing)}"
        )
    result["baseline_assets"] = {
        i: {
            k: v for key, held in others.items() for k, v in (*held.remarks[i].items(), (key, held.values[i]))
        }
        for i in result["assets"]
    }


def report(args: argparse.Namespace, plan: Plan, result: dict[str, Any]) -> None:
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
    intro = (
        f"Model {result['model']['name']}. Assets drawn at random. First column: the photo; then a row each of the "
        "asset, what was generated, and the training asset that looks most like the photo."
    )
    shown = tuple(key for key, _ in plan.methods if key in (OURS, "retrieval"))
    page = write_sheets(
        args.out.with_name(f"{args.out.stem}_pictures"),
        plan,
        names,
        result,
        [*tables, *lines],
        title="Generation",
        intro=intro,
        sheet=Sheet("", "", shown),
        workers=args.workers,
    )
    print(f"pictures: {page}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, help="of both samplers (default: the model's)")
    parser.add_argument("--train-assets", nargs="+", help="for the baselines (default: those of --assets)")
    parser.add_argument("--train-split", default="train", help="of them (default: %(default)s)")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument(
        "--cache", type=Path, help="folder for what the baselines need (default: ~/.cache/diff2to3)"
    )
    parser.add_argument("--pictures", type=int, default=16, help="assets to show (default: %(default)s)")
    return main_of(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
