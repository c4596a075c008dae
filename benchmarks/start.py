"""How long commands take that have next to nothing to do, as a ratio to ``python -c "import torch"`` in the same run.

    python benchmarks/start.py [--data FOLDER] [--weights FILE] [--rounds 5]

FOLDER holds class folders (without one the demo digits are written), FILE is one of mobilenet_v2's weights (without one
the starter is used). Rounds are
interleaved, so that what else the machine does falls on all alike; of each the median is reported, with the wall time
and the processor time (user and system, all threads), which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.data.demo import write_demo_data

PROJECT = Path(__file__).resolve().parent.parent


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall and processor seconds of one command that must succeed."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Prepare a project, run the rounds, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pipeline = [sys.executable, "-m", "pipeline"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = arguments.data or folder / "demo"
        if arguments.data is None:
            write_demo_data(data)
        weights = arguments.weights and f"backbone: {{name: mobilenet_v2, weights: {arguments.weights.absolute()}}}"
        (folder / "params.yaml").write_text(f"data: {{root: {data.absolute()}}}\n{weights or ''}\n")
        timed([*pipeline, "extract"], folder)
        timed([*pipeline, "train-head"], folder)
        image = next(path for path in sorted(data.absolute().rglob("*")) if path.is_file())
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "extract, nothing to do": [*pipeline, "extract"],
            "train-head": [*pipeline, "train-head"],
            "make train-head": ["make", "train-head", f"PARAMS={folder / 'params.yaml'}", f"VENV={sys.prefix}"],
            "predict, one cached image": [*pipeline, "predict", "latest", str(image)],
        }
        seconds: dict[str, list[tuple[float, float]]] = {what: [] for what in commands}
        for _ in range(arguments.rounds):
            for what, command in commands.items():
                seconds[what].append(timed(command, PROJECT if command[0] == "make" else folder))
    base = [statistics.median(column) for column in zip(*seconds["import torch"], strict=True)]
    print(f"{'command':<28}{'wall s':>8}{'ratio':>7}{'cpu s':>8}{'ratio':>7}")
    for what, rounds in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{what:<28}{wall:>8.2f}{wall / base[0]:>7.2f}{cpu:>8.2f}{cpu / base[1]:>7.2f}")


if __name__ == "__main__":
    main()
