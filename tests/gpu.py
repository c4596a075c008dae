"""Check and measure on a GPU in one go: tests marked ``gpu``, then the benchmarks; ten minutes at most.

    python tests/gpu.py [--device cuda] [--minutes 10] [--tiny]

With ``--tiny`` everything is so small that it takes some two minutes on a CPU: to see that all of it runs.

Prints what each step prints, and at the end one table of how they ended and all tables of figures again. The exit
status is that of the worst step. Images are drawn here, so that nothing else needs to be on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
RESNET, SMALL = ("--backbone", "resnet50"), ("--backbone", "squeezenet1_1")
TUNED = (*RESNET, "--images", "2048", "--batch-size", "128", "--rounds", "1")
FEW_STRENGTHS = ("--strengths", "15", "--gap-stride", "7")
# Name, script or module, its arguments; the earlier ones say more.
STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tests", ("-m", "pytest", "-m", "gpu", "-rs", "tests")),
    ("forward", ("benchmarks/extract.py", *RESNET, "--forward")),
    ("extract", ("benchmarks/extract.py", *RESNET, "--images", "12000", "--rounds", "1", "--torchvision")),
    ("decoding", ("benchmarks/decoding.py", "--rounds", "3")),
    ("finetune", ("benchmarks/finetune.py", *TUNED)),
    ("heads", ("benchmarks/heads.py", "--rows", "20000", "--classes", "20", "--rounds", "1", *FEW_STRENGTHS)),
    ("compiled", ("benchmarks/finetune.py", *TUNED, "--compile")),
)
WITHOUT_IMAGES = ("tests", "heads")
# What overrides these arguments, or is added to them.
TINY: dict[str, tuple[str, ...]] = {
    "tests": ("-k", "pipe or solver"),
    "forward": (*SMALL, "--batch-size", "2"),
    "extract": (*SMALL, "--images", "16"),
    "decoding": ("--rounds", "1"),
    "finetune": (*SMALL, "--images", "16", "--batch-size", "8"),
    "compiled": (*SMALL, "--images", "16", "--batch-size", "8", "--no-compile"),
    "heads": ("--rows", "200", "--classes", "3", "--strengths", "3", "--gap-stride", "0", "--folds", "2", "--tensors"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", nargs="+", default=[name for name, _ in STEPS])
    parser.add_argument("--tiny", action="store_true", help="only to see that all of it runs")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was checked, nothing was measured.", file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * arguments.minutes
    rows, tables, worst = [], list[str](), 0
    with tempfile.TemporaryDirectory() as scratch:
        images = write_images(Path(scratch) / "images", 16 if arguments.tiny else 256)
        for name, command in STEPS:
            if name not in arguments.steps:
                continue
            own = arguments_of(name, arguments.device, images, tiny=arguments.tiny)
            started = time.monotonic()
            status, text = run([sys.executable, *command, *own], end - started)
            rows.append(f"| {name} | {time.monotonic() - started:.0f} | {verdict(status)} |")
            lines = [line for line in text.splitlines() if line.startswith("|")]
            tables += ["", f"{name}:", "", *lines] if lines else []
            worst = max(worst, abs(status))
    print("\n".join(["", "| step | seconds | result |", "| :-- | --: | :-- |", *rows, *tables]))
    return min(worst, 1)


def arguments_of(name: str, device: str, images: Path, *, tiny: bool) -> list[str]:
    """What a step's command is given besides its own arguments."""
    own = [] if name == "tests" else ["--device", device]
    own += [] if name in WITHOUT_IMAGES else ["--data", str(images)]
    return [*own, *TINY[name]] if tiny else own


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status (124: out of time) and output, which is shown as it comes."""
    print(f"\n== {' '.join(command[1:])}", flush=True)
    if seconds < 1:
        return 124, ""
    lines: list[str] = []
    process = subprocess.Popen(["timeout", f"{seconds:.0f}", *command], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def verdict(status: int) -> str:
    return {0: "done", 124: "out of time"}.get(status, f"FAILED ({status})")


def write_images(folder: Path, count: int = 256) -> Path:
    """Smooth noise as JPEGs of 500 x 375 pixels, in two classes."""
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (25, 33, 3), np.uint8)
        path = folder / ("first", "second")[number % 2] / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


if __name__ == "__main__":
    sys.exit(main())
