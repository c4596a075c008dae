"""What `pipeline inspect` finds of what was planted, on real images, and what the neighbour pass costs.

    python benchmarks/insight.py labels --shared ../shared      5 % of the labels swapped: ranking, beside cleanlab
    python benchmarks/insight.py copies --shared ../shared      copies planted across splits: share found, false pairs
    python benchmarks/insight.py foreign --shared ../shared     digits, and ants and bees, among flowers: ranking
    python benchmarks/insight.py rounds --shared ../shared      rounds of 20 labels on the flowers, five seeds
    python benchmarks/insight.py pass                           100,000 x 1,280 rows: the pass against its products

Each prints Markdown. Features are those of mobilenet_v2 with the ImageNet weights under ``shared``, and of the starter;
they are cached under ``--cache``. cleanlab is used where it is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from pipeline.data.decode import Decoder
from pipeline.data.demo import write_demo_data
from pipeline.features.cache import FeatureTable
from pipeline.heads import make_head
from pipeline.insight.duplicates import copies_of
from pipeline.insight.labelling import label_next
from pipeline.insight.labels import find_doubts, with_neighbours
from pipeline.insight.neighbours import BLOCK, find_neighbours
from pipeline.insight.outliers import outlier_scores
from pipeline.params import HeadParams, Params, load_params
from pipeline.stages.extract import extract
from pipeline.stages.inspect import View, survey_of
from pipeline.stages.open import open_cache

BACKBONES = ("mobilenet_v2", "starter")
SEEDS = 5
Ints = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=PARTS, default="pass")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "insight-cache")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    PARTS[arguments.what](arguments)


# -- data -----------------------------------------------------------------------------------------------------------


def params_for(arguments: argparse.Namespace, backbone: str, root: Path) -> Params:
    settings = [f"data.root={root}", f"cache.dir={arguments.cache}", f"runs.dir={arguments.cache / 'runs'}"]
    if backbone != "starter":
        weights = arguments.shared / "weights" / f"{backbone}-imagenet.safetensors"
        settings += [f"backbone.name={backbone}", f"backbone.weights={weights.resolve()}"]
    arguments.cache.mkdir(parents=True, exist_ok=True)
    (arguments.cache / "params.yaml").touch()
    return load_params(arguments.cache / "params.yaml", settings)


def table_of(arguments: argparse.Namespace, backbone: str, root: Path) -> FeatureTable:
    params = params_for(arguments, backbone, root)
    extract(params, lambda _line: None, quiet=True)
    return open_cache(params).table()


def roots(arguments: argparse.Namespace) -> dict[str, Path]:
    """Ants and bees, the flowers, and the first twenty classes of Tiny ImageNet."""
    data, tiny = arguments.shared / "data", arguments.cache / "tiny20"
    if not tiny.exists():
        with tarfile.open(data / "tiny_imagenet_40k.tar") as archive:
            names = sorted({member.name.split("/")[2] for member in archive if member.name.count("/") == 3})[:20]
            archive.extractall(
                arguments.cache,
                [m for m in archive if m.name.split("/")[2:3] and m.name.split("/")[2] in names],
                filter="data",
            )
        (arguments.cache / "tiny_imagenet_40k").rename(tiny)
    return {"ants, bees": data / "hymenoptera_data", "flowers": data / "flowers5_128", "Tiny ImageNet, 20": tiny}


# -- labels ---------------------------------------------------------------------------------------------------------


def labels(arguments: argparse.Namespace) -> None:
    print("| data | backbone | seed | n | swapped | AUC ours | AUC cleanlab | precision at N ours | cleanlab |", end="")
    print(" expected at N | wrong, estimated | doubted | of them swapped |")
    print("| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |")
    for name, root in roots(arguments).items():
        for backbone in BACKBONES:
            table = table_of(arguments, backbone, root)
            for seed in range(2):
                _swap_and_rank(name, backbone, table, seed)


def _swap_and_rank(name: str, backbone: str, table: FeatureTable, seed: int) -> None:
    generator, y = np.random.default_rng(seed), table.targets
    swapped = np.zeros(len(y), bool)
    swapped[generator.choice(len(y), round(0.05 * len(y)), replace=False)] = True
    other = (y + generator.integers(1, len(table.class_names), len(y))) % len(table.class_names)
    given = np.where(swapped, other, y)
    seen = make_head("logistic", HeadParams(), class_names=table.class_names).cross_validate(
        table.features, given, table.groups
    )
    assert seen.logits is not None
    digests = np.arange(2 * len(y), dtype=np.uint64).view(np.uint8).reshape(len(y), 16)
    near = find_neighbours(digests, table.features).index
    doubts, n = find_doubts(with_neighbours(seen.logits, near, given), given), int(swapped.sum())
    theirs = _cleanlab(given, seen.probabilities())
    cells: list[Any] = [name, backbone, seed, len(y), n, f"{roc_auc_score(swapped, _rank(doubts.order)):.4f}"]
    cells += [f"{roc_auc_score(swapped, -theirs):.4f}" if theirs is not None else "–"]
    cells += [f"{swapped[doubts.order[:n]].mean():.3f}"]
    cells += [f"{swapped[np.argsort(theirs, kind='stable')[:n]].mean():.3f}" if theirs is not None else "–"]
    cells += [f"{doubts.expected_among_first(n) / n:.3f}", f"{doubts.wrong.sum():.0f}"]
    cells += [len(doubts.doubted), int(swapped[doubts.doubted].sum())]
    row(cells)


def _rank(order: Ints) -> NDArray[np.float64]:
    """A score (n,) that is larger for what stands earlier in ``order``."""
    score = np.empty(len(order))
    score[order] = -np.arange(len(order))
    return score


def _cleanlab(given: Ints, probabilities: Any) -> NDArray[np.float64] | None:
    try:
        from cleanlab.rank import get_label_quality_scores  # type: ignore[import-not-found]
    except ImportError:
        return None
    scores: NDArray[np.float64] = get_label_quality_scores(given, probabilities)
    return scores


# -- copies ---------------------------------------------------------------------------------------------------------


def copies(arguments: argparse.Namespace) -> None:
    print(
        "| data | backbone | re-encoded | resized | cropped | flipped | rotated | predicted misses | other pairs |",
        end="",
    )
    print(" false alarms, at most | seconds |\n| :-- | :-- |" + " --: |" * 9)
    for name, root in list(roots(arguments).items())[:2]:
        with tempfile.TemporaryDirectory() as folder:
            planted = _plant(root, Path(folder) / "images")
            for backbone in BACKBONES:
                _search(arguments, name, backbone, Path(folder) / "images", planted)


def _plant(root: Path, target: Path) -> dict[tuple[str, str], str]:
    """The images as train, and five copies of one in 30 of them, 40 at most, as val; (original, copy) -> kind."""
    decoder, generator = Decoder((255, 255, 255), True, 1 << 28), np.random.default_rng(7)
    source = root / "train" if (root / "train").is_dir() else root
    shutil.copytree(source, target / "train")
    images = sorted(path for path in (target / "train").rglob("*.jp*g"))
    planted = {}
    for number in generator.choice(len(images), min(40, len(images) // 30), replace=False).tolist():
        original = images[number]
        for kind, copy in copies_of(decoder(original.read_bytes()), generator).items():
            file = target / "val" / original.parent.name / f"{kind}-{original.stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            copy.save(file)
            planted[str(original.relative_to(target)), str(file.relative_to(target))] = kind
    return planted


def _search(
    arguments: argparse.Namespace, name: str, backbone: str, root: Path, planted: dict[tuple[str, str], str]
) -> None:
    params = params_for(arguments, backbone, root)
    extract(params, lambda _line: None, quiet=True)
    started = time.perf_counter()
    view = View(open_cache(params, quiet=True), quiet=True)
    survey = survey_of(view, params)
    seconds = time.perf_counter() - started
    paths, family = view.table.paths, {copy: original for original, copy in planted}
    found = {kind: [0, 0] for kind in dict.fromkeys(planted.values())}
    group_of = {paths[row]: number for number, group in enumerate(survey.groups) for row in group.rows}
    for (original, copy), kind in planted.items():
        found[kind][0] += group_of.get(original, -1) == group_of.get(copy, -2)
        found[kind][1] += 1
    foreign = [
        sorted({family.get(paths[row], paths[row]) for row in group.rows})
        for group in survey.groups
        if len({family.get(paths[row], paths[row]) for row in group.rows}) > 1
    ]
    shares = [f"{hits}/{count}" for hits, count in found.values()]
    alarms = f"{100 * survey.bar.false_alarms:.2f} %"
    row([name, backbone, *shares, f"{100 * survey.bar.miss_rate:.1f} %", len(foreign), alarms, f"{seconds:.0f}"])
    _sheet(root, foreign, arguments.cache / f"pairs-{backbone}-{name.replace(', ', '-')}.png")


def _sheet(root: Path, groups: list[list[str]], file: Path) -> None:
    """The groups that join images which nobody copied, to look at."""
    sheet = Image.new("RGB", (8 * 210, max(-(-len(groups) // 8), 1) * 105), "white")
    for place, group in enumerate(groups):
        for side, name in enumerate(group[:2]):
            with Image.open(root / name) as image:
                part = image.convert("RGB").resize((100, 100))
            sheet.paste(part, (place % 8 * 210 + side * 102, place // 8 * 105))
    sheet.save(file)
    print(f"  looked at: {file}", file=sys.stderr)


# -- foreign images -------------------------------------------------------------------------------------------------


def foreign(arguments: argparse.Namespace) -> None:
    print("| planted among the flowers | backbone | n | AUC |\n| :-- | :-- | --: | --: |")
    digits = arguments.cache / "digits"
    if not digits.exists():
        write_demo_data(digits)
    strangers = {"digits": digits, "ants and bees": arguments.shared / "data" / "hymenoptera_data"}
    for name, folder in strangers.items():
        other = _as_large_as_flowers(folder, arguments.cache / f"small {name}")
        for backbone in BACKBONES:
            for n in (10, 40):
                scores = list(_foreign_scores(arguments, backbone, other, n))
                row([name, backbone, n, f"{np.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"])


def _as_large_as_flowers(source: Path, target: Path) -> Path:
    """The images at the one size that all flowers have, which would give the others away."""
    for path in sorted(source.rglob("*.*g")) if not target.exists() else ():
        file = (target / path.relative_to(source)).with_suffix(".jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC).save(file, quality=90)
    return target


def _foreign_scores(arguments: argparse.Namespace, backbone: str, other: Path, n: int) -> Iterator[float]:
    views = [_view(arguments, backbone, root) for root in (arguments.shared / "data" / "flowers5_128", other)]
    looks = [view.looks() for view in views]
    for seed in range(3):
        generator = np.random.default_rng(seed)
        picked = generator.choice(len(views[1].contents), n, replace=False)
        features = np.concatenate([views[0].features, views[1].features[picked]])
        targets = views[0].table.targets[views[0].contents]
        targets = np.concatenate([targets, generator.integers(0, targets.max() + 1, n)])
        every = type(looks[0])(
            *(np.concatenate([a, b[picked]]) for a, b in zip(*(vars(look).values() for look in looks), strict=True))
        )
        scores = outlier_scores(features, targets, every)
        yield float(roc_auc_score(np.arange(len(targets)) >= len(targets) - n, scores))


def _view(arguments: argparse.Namespace, backbone: str, root: Path) -> View:
    params = params_for(arguments, backbone, root)
    extract(params, lambda _line: None, quiet=True)
    return View(open_cache(params, quiet=True), quiet=True)


# -- rounds of labelling --------------------------------------------------------------------------------------------

Picker = Callable[[NDArray[np.float32], Any, int, int], Ints]


def _ours(pool: NDArray[np.float32], chances: Any, count: int, seed: int) -> Ints:
    names = [str(number) for number in range(0 if chances is None else chances.shape[1])]
    return np.array([pick.row for pick in label_next(pool, chances, names, count, seed=seed)])


def _random(pool: NDArray[np.float32], chances: Any, count: int, seed: int) -> Ints:
    return np.random.default_rng(seed).choice(len(pool), count, replace=False)


def _unsure(pool: NDArray[np.float32], chances: Any, count: int, seed: int) -> Ints:
    """The least sure ones, whatever they are; the first round by chance."""
    if chances is None:
        return _random(pool, chances, count, seed)
    best = np.sort(chances, axis=1)
    return np.asarray(np.argsort(best[:, -1] - best[:, -2], kind="stable")[:count])


PICKERS: dict[str, Picker] = {"random": _random, "least sure": _unsure, "label_next": _ours}


def rounds(arguments: argparse.Namespace, size: int = 20, turns: int = 8) -> None:
    warnings.simplefilter("ignore")
    print(
        f"| data | backbone | picks | {' | '.join(str(size * (turn + 1)) for turn in range(turns))} | mean |"
        " against random |"
    )
    print("| :-- | :-- | :-- |" + " --: |" * (turns + 2))
    for name, root in list(roots(arguments).items())[1:]:
        for backbone in BACKBONES:
            table = table_of(arguments, backbone, root)
            scores = {
                picker: np.array([_turns(table, pick, seed, size, turns) for seed in range(SEEDS)])
                for picker, pick in PICKERS.items()
            }
            for picker, accuracy in scores.items():
                gain = accuracy.mean(axis=1) - scores["random"].mean(axis=1)
                half = 2.776 * gain.std(ddof=1) / np.sqrt(SEEDS)  # Student's t, 4 degrees of freedom
                cells = [f"{100 * value:.1f}" for value in accuracy.mean(axis=0)]
                against = f"{100 * gain.mean():+.1f} ± {100 * half:.1f}" if picker != "random" else ""
                row([name, backbone, picker, *cells, f"{100 * accuracy.mean():.1f}", against])


def _turns(table: FeatureTable, pick: Picker, seed: int, size: int, turns: int) -> list[float]:
    generator = np.random.default_rng(seed)
    train, held = np.flatnonzero(table.splits == 0), np.flatnonzero(table.splits != 0)
    pool = np.sort(generator.choice(train, int(0.8 * len(train)), replace=False))
    mine, chances, accuracies = np.empty(0, np.int64), None, []
    for turn in range(turns):
        chosen = pick(table.features[pool], chances, size, 100 * seed + turn)
        mine, pool = np.concatenate([mine, pool[chosen]]), np.delete(pool, chosen)
        params = HeadParams.model_validate({"logistic": {"strengths": 9, "c_min": 1e-4, "c_max": 1e2}})
        head = make_head("logistic", params, class_names=table.class_names)
        head.fit(table.features[mine], table.targets[mine], table.groups[mine])
        accuracies.append(float((head.predict(table.features[held]) == table.targets[held]).mean()))
        chances = np.zeros((len(pool), len(table.class_names)))
        chances[:, head.classes_] = head.predict_proba(table.features[pool])
    return accuracies


# -- the pass -------------------------------------------------------------------------------------------------------


def neighbour_pass(arguments: argparse.Namespace) -> None:
    rows, width = arguments.rows, 1280
    features = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    digests = np.arange(2 * rows, dtype=np.uint64).view(np.uint8).reshape(rows, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    alone = _products(features, arguments.device)
    started = time.perf_counter()
    find_neighbours(digests, features, device=arguments.device)
    _wait(arguments.device)
    seconds = time.perf_counter() - started
    again = _products(features, arguments.device)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    products = (alone + again) / 2
    print(f"{rows:,} x {width:,} on {arguments.device}, {torch.get_num_threads()} threads: the pass {seconds:.1f} s,")
    print(f"its products alone {alone:.1f} and {again:.1f} s before and after: ratio {seconds / products:.2f};")
    print(f"{more:.0f} MiB beside the {features.nbytes / 2**20:.0f} MiB of features")


def _products(features: NDArray[np.float32], device: str) -> float:
    """Seconds of the upper triangle of blocks of the Gram matrix, and nothing else."""
    matrix = torch.from_numpy(features)
    blocks = torch.split(matrix, BLOCK)
    started = time.perf_counter()
    for number, left in enumerate(blocks):
        mine = left.to(device)
        for right in blocks[number:]:
            mine @ right.to(device).T
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def row(cells: list[Any]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


PARTS = {"labels": labels, "copies": copies, "foreign": foreign, "rounds": rounds, "pass": neighbour_pass}

if __name__ == "__main__":
    main()
