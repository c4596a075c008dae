"""Images a second of exported files beside `predict` of their run, on the same images, in the same process.

    python benchmarks/export.py --run RUN --images FOLDER --file model.onnx --file model.pt2

Prints a Markdown table: the whole way from files to labels, medians over interleaved rounds, and the ratio to the run.
The run gets an empty cache each round, so that it loads its weights and computes every image; it decodes in threads and
forwards batches, while a file takes one image after the other. Without arguments: the starter on the demo images.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from pipeline import extract, load_params, load_run, train_head
from pipeline.data.demo import write_demo_data
from pipeline.stages.export import export_run, load_exported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--file", type=Path, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, images, files = arguments.run, arguments.images, arguments.file
        if run is None:
            run, images, files = make_demo(Path(folder))
        measure(run, images, files, arguments.rounds)


def make_demo(folder: Path) -> tuple[Path, Path, list[Path]]:
    """A run on the demo images, the images to predict, and the exported files."""
    write_demo_data(folder / "images")
    places = [f"data.root={folder / 'images'}", f"cache.dir={folder / 'cache'}", f"runs.dir={folder / 'runs'}"]
    (folder / "params.yaml").touch()
    params = load_params(folder / "params.yaml", places)
    extract(params, lambda _line: None, quiet=True)
    run = Path(train_head(params, lambda _line: None)["run"])
    files = [folder / "model.onnx", folder / "model.pt2"]
    for file in files:
        export_run(load_run(run), file, lambda _line: None, quiet=True)
    return run, folder / "images" / "test", files


def measure(run: Path, images: Path, files: list[Path], rounds: int) -> None:
    loaded = {file.name: load_exported(file) for file in files}
    rates: dict[str, list[float]] = {name: [] for name in ("predict", *loaded)}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            predictors = {"predict": load_run(run, [f"cache.dir={folder}"]), **loaded}
            for name, predictor in predictors.items():
                started = time.perf_counter()
                count = len(predictor.predict(images))
                rates[name].append(count / (time.perf_counter() - started))
    baseline = statistics.median(rates["predict"])
    print("| | images/s (smallest to largest) | ratio to predict |\n| :-- | --: | --: |")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.1f} ({min(values):.1f} to {max(values):.1f}) | {median / baseline:.2f} |")


if __name__ == "__main__":
    main()
