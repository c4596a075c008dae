"""What fine-tuning is worth: the probe, the defaults, the former defaults and a tutorial, on real images.

    python benchmarks/finetune_quality.py --scratch FOLDER --seeds 0,1,2 --recipes default,former
    python benchmarks/finetune_quality.py --scratch FOLDER --table

Writes a line of JSON a run into FOLDER/quality.jsonl as it goes, and goes on where it was stopped. The table has
accuracy and log loss of probe and tuned classifier, means over the seeds, with each seed's paired tests on the same
images (exact McNemar; a t test of the log losses), and seconds. Of sets without a split of their own a seed is one of
five folds: with the seeds 0 to 4 each image is reported once, and the tests are of all of them together. Images and
weights are looked for in $PIPELINE_SHARED (default ../shared); `--device cuda` runs it on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.data.demo import write_demo_data
from pipeline.data.images import open_images
from pipeline.evaluate import mcnemar_exact
from pipeline.params import DataParams, Params, load_params
from pipeline.stages.extract import extract
from pipeline.stages.finetune import finetune
from pipeline.stages.train_head import train_head

SHARED = Path(os.environ.get("PIPELINE_SHARED", "../shared")).resolve()
FOLDS = 5
# Sets without a split of their own.
WHOLE = {"steel": "neu_defects/train", "textures": "dtd10_256", "flowers": "flowers5_128"}
FLOOR = 1e-300

RECIPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "former": (
        *("finetune.backbone_lr=1e-5", "finetune.head_lr=1e-3", "finetune.select=accuracy", "finetune.refit=false"),
        *("finetune.interpolate=false", "finetune.calibrate=none"),
        *("finetune.augment.crop_scale=[0.35, 1.0]", "finetune.augment.horizontal_flip=0.5"),
    ),
    "tutorial_sgd": (
        *("finetune.start=random", "finetune.batchnorm=train", "finetune.optimizer=sgd", "finetune.weight_decay=0"),
        *("finetune.backbone_lr=1e-3", "finetune.head_lr=1e-3", "finetune.schedule=step", "finetune.epochs=25"),
        *("finetune.select=accuracy", "finetune.refit=false", "finetune.calibrate=none", "finetune.batch_size=4"),
        *("finetune.clip_norm=0", "finetune.augment.crop_scale=[0.08, 1.0]", "finetune.augment.horizontal_flip=0.5"),
    ),
}


@dataclass(frozen=True)
class Case:
    """A set of images under a backbone: ``crop`` in pixels; of sets that are cut, at most so many images of a part."""

    name: str
    backbone: str
    crop: int
    train: int = 100_000
    reported: int = 100_000


CASES = (
    Case("digits", "starter", 64),
    Case("ants_bees", "mobilenet_v2", 96),
    Case("steel", "squeezenet1_0", 64),
    Case("tiny20", "mobilenet_v2", 64),
    Case("flowers", "starter", 64, 600, 600),
    Case("textures", "mobilenet_v2", 96, 600),
    Case("ants_bees", "squeezenet1_0", 96),
    Case("tiny20", "squeezenet1_0", 64),
    Case("steel", "starter", 64),
    Case("textures", "starter", 64),
    Case("flowers", "mobilenet_v2", 128, 1200),
)


def main() -> None:
    arguments = _arguments()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    lines = arguments.scratch / "quality.jsonl"
    if not arguments.table:
        for case, seed, recipe in _wanted(arguments, _read(lines)):
            line = _measure(case, seed, recipe, arguments)
            with open(lines, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(_row([line]), flush=True)
    print(_table(_read(lines)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="for images, cache, runs and the results")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--recipes", default="default,former")
    parser.add_argument("--cases", default=f"0-{len(CASES) - 1}", help="numbers of CASES: 0-5 or 1,3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    return parser.parse_args()


def _wanted(arguments: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[tuple[Case, int, str]]:
    known = {(line["set"], line["backbone"], line["seed"], line["recipe"]) for line in done}
    first, _, last = arguments.cases.partition("-")
    numbers = range(int(first), int(last) + 1) if last else map(int, arguments.cases.split(","))
    cases = [CASES[number] for number in numbers]
    for seed in map(int, arguments.seeds.split(",")):
        for recipe in arguments.recipes.split(","):
            for case in cases:
                if (case.name, case.backbone, seed, recipe) not in known:
                    yield case, seed, recipe


def _read(lines: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


# -- a run -----------------------------------------------------------------------------------------------------------


def _measure(case: Case, seed: int, recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    params = _params(case, seed, recipe, arguments)
    extract(params, _silent, quiet=True)
    started = time.perf_counter()
    probe = train_head(params, _silent)
    middle = time.perf_counter()
    tuned = finetune(params, _silent, from_run=probe["run"], quiet=True)
    seconds = time.perf_counter() - middle
    rows: dict[str, Any] = {}
    for name, summary in (("probe", probe), ("tuned", tuned)):
        right, losses = _scored(Path(summary["run"]), summary["split"])
        rows |= {f"{name}_right": right, f"{name}_losses": losses}
    history = json.loads((Path(tuned["run"]) / "metrics.json").read_text())["history"]
    return {
        "set": case.name,
        "backbone": case.backbone,
        "crop": case.crop,
        "seed": seed,
        "recipe": recipe,
        "selected": tuned["selected"],
        "probe_seconds": middle - started,
        "seconds": seconds,
        "epoch_seconds": [row["seconds"] for row in history[1:]],
        "train_loss": [row["train_loss"] for row in history[1:]],
        **rows,
    }


def _params(case: Case, seed: int, recipe: str, arguments: argparse.Namespace) -> Params:
    scratch = arguments.scratch.resolve()
    overrides = [
        f"data.root={_folder(case, seed, scratch)}",
        f"cache.dir={scratch / 'cache'}",
        f"runs.dir={scratch / 'runs'}",
        f"backbone.name={case.backbone}",
        f"extract.device={arguments.device}",
        f"finetune.device={arguments.device}",
        f"finetune.seed={seed}",
        f"head.seed={seed}",
        *RECIPES[recipe],
    ]
    if case.backbone != "starter":
        weights = SHARED / "weights" / f"{case.backbone}-imagenet.safetensors"
        size = (f"transform.resize={round(1.14 * case.crop)}", f"transform.crop={case.crop}")
        overrides += [f"backbone.weights={weights}", *size]
    empty = scratch / "params.yaml"
    empty.touch()
    return load_params(empty, overrides)


def _silent(_line: str) -> None:
    """Say nothing."""


def _scored(run: Path, split: str) -> tuple[list[int], list[float]]:
    """Which reported images are right, and their log losses, in one order."""
    with open(run / "predictions.csv", newline="") as file:
        rows = sorted((row for row in csv.DictReader(file) if row["split"] == split), key=lambda row: row["path"])
    right = [int(row["label"] == row["predicted"]) for row in rows]
    losses = [-float(np.log(max(float(row[f"p_{row['label']}"]), FLOOR))) for row in rows]
    return right, losses


# -- images ----------------------------------------------------------------------------------------------------------


def _folder(case: Case, seed: int, scratch: Path) -> Path:
    """The images of a case with train/ and val/ (or test/), at most as many as it asks for."""
    match case.name:
        case "digits":
            folder = scratch / "digits"
            write_demo_data(folder)
            return folder
        case "ants_bees":
            return SHARED / "data" / "hymenoptera_data"
        case "tiny20":
            return _tiny(scratch)
        case _:
            fold = seed % FOLDS
            return _cut(SHARED / "data" / WHOLE[case.name], scratch / f"{case.name}-{case.train}-{fold}", case, fold)


def _tiny(scratch: Path, classes: int = 20, a_class: int = 40) -> Path:
    """The first classes of the subset of Tiny ImageNet, so many training images of each; val as it is."""
    folder = scratch / "tiny20"
    if folder.exists():
        return folder
    archive = SHARED / "data" / "tiny_imagenet_40k.tar"
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        names = sorted({Path(member.name).parts[-2] for member in members})[:classes]
        taken: dict[tuple[str, str], int] = {}
        for member in sorted(members, key=lambda member: member.name):
            split, label = Path(member.name).parts[-3:-1]
            count = taken.get((split, label), 0)
            if label not in names or (split == "train" and count >= a_class):
                continue
            taken[split, label] = count + 1
            target = folder / split / label / Path(member.name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            target.write_bytes(content.read())
    return folder


def _cut(source: Path, folder: Path, case: Case, fold: int) -> Path:
    """Links to the images of a folder without splits: a fold as val, the rest as train; copies stay on one side."""
    if folder.exists():
        return folder
    images = open_images(DataParams(root=source, layout="flat"), folder.parent / "cache")
    images.read_unknown()
    _, content = np.unique(images.digests, axis=0, return_inverse=True)
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(content, images.targets, content)
    parts, random = list(folds)[fold], np.random.default_rng(0)
    for name, rows, most in zip(("train", "val"), parts, (case.train, case.reported), strict=True):
        for row in random.permutation(rows)[:most]:
            path = Path(images.paths[row])
            link = folder / name / path.parent / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source / path)
    return folder


# -- the table -------------------------------------------------------------------------------------------------------


def _table(lines: list[dict[str, Any]]) -> str:
    names = ("set", "backbone", "recipe", "seeds or folds", "n", "probe %", "tuned %", "p (McNemar)")
    names += ("log loss, probe", "log loss, tuned", "p (t)", "seconds")
    rows = [f"| {' | '.join(names)} |", "|" + " :-- |" * 3 + " --: |" * 9]
    keys = sorted({(line["set"], line["backbone"], line["recipe"]) for line in lines})
    for key in keys:
        rows.append(_row([line for line in lines if (line["set"], line["backbone"], line["recipe"]) == key]))
    return "\n".join(rows)


def _row(lines: list[dict[str, Any]]) -> str:
    """Means over the seeds with the tests of each; of folds the whole, with one test."""
    first, rows = lines[0], _rows_of(lines)
    accuracies = [(100 * each["probe_right"].mean(), 100 * each["tuned_right"].mean()) for each in rows]
    losses = [(each["probe_losses"].mean(), each["tuned_losses"].mean()) for each in rows]
    accuracy, loss = np.mean(accuracies, axis=0), np.mean(losses, axis=0)
    cells = (
        *(first["set"], f"{first['backbone']} at {first['crop']}", first["recipe"], str(len(lines))),
        *(str(len(rows[0]["probe_right"])), f"{accuracy[0]:.1f}", f"{accuracy[1]:.1f}"),
        *(" ".join(map(_mcnemar, rows)), f"{loss[0]:.3f}", f"{loss[1]:.3f}", " ".join(map(_t_test, rows))),
        f"{np.mean([line['seconds'] for line in lines]):.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reported images' scores, of each seed; of folds all together."""
    names = [name for name in lines[0] if name.endswith(("_right", "_losses"))]
    if lines[0]["set"] in WHOLE:
        return [{name: np.concatenate([line[name] for line in lines]) for name in names}]
    return [{name: np.array(line[name], float) for name in names} for line in lines]


def _mcnemar(row: dict[str, Any]) -> str:
    return f"{mcnemar_exact(row['probe_right'].astype(bool), row['tuned_right'].astype(bool)):.2g}"


def _t_test(row: dict[str, Any]) -> str:
    probe, tuned = row["probe_losses"], row["tuned_losses"]
    return f"{ttest_rel(probe, tuned).pvalue:.2g}" if (probe != tuned).any() else "1"


if __name__ == "__main__":
    main()
