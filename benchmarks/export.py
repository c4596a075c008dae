"""Images a second of an exported file beside `predict` of its run, on the same images, in the same process.

    python benchmarks/export.py --run RUN --file model.onnx [--file int8.onnx ...] IMAGES...

Prints a Markdown table: the whole way from files to labels, medians over interleaved rounds, and the ratio to the run.
The run's cache is emptied before each round, so that it computes every image; it decodes in several threads and forwards
batches, a file takes one image after the other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from pipeline import load_run
from pipeline.stages.export import load_exported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--file", type=Path, action="append", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("images", nargs="+", type=Path)
    arguments = parser.parse_args()
    files = {str(file): load_exported(file) for file in arguments.file}
    rates: dict[str, list[float]] = {name: [] for name in ("predict", *files)}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = load_run(arguments.run, [f"cache.dir={folder}"])
            started = time.perf_counter()
            count = len(run.predict(arguments.images))
            rates["predict"].append(count / (time.perf_counter() - started))
        for name, exported in files.items():
            started = time.perf_counter()
            exported.predict(arguments.images)
            rates[name].append(count / (time.perf_counter() - started))
    baseline = statistics.median(rates["predict"])
    print("| | images/s (smallest to largest) | ratio to predict |\n| :-- | --: | --: |")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.1f} ({min(values):.1f} to {max(values):.1f}) | {median / baseline:.2f} |")


if __name__ == "__main__":
    main()
