"""Plots as inline SVG or PNG. No text from outside enters matplotlib, and pyplot's global state is not used."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..artifacts import CoveragePoint, CurvePoint, ReliabilityBin

BLUE, ORANGE, GREY = "#2563a8", "#d97706", "#8b95a1"
# Of further curves, each with a dash of its own, so that they are told apart in print too.
OTHERS = (("#15803d", "--"), ("#a21caf", "-."), ("#0e7490", ":"), ("#7c2d12", (0, (1, 1))))
_STYLE: Any = {  # its stubbed type changes with the version of matplotlib
    "svg.fonttype": "path",
    "svg.hashsalt": "report",  # the same ids for the same plot, so that a report repeats to the byte
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e9ecf0",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_PLAIN_KEY = re.compile(r"[a-z0-9_]+")


def history_plots(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """One SVG each for the losses and the accuracies by epoch; [] where there are fewer than two epochs."""
    pictures = []
    for ending in ("loss", "accuracy"):
        curves = _curves(history, ending)
        if curves:
            pictures.append(_history_plot(curves, ending))
    return pictures


def reliability_plot(bins: Sequence[ReliabilityBin]) -> str:
    """Accuracy against confidence per bin, and how many images each bin holds, as SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 4.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        width = bins[0].high - bins[0].low
        middles = [(part.low + part.high) / 2 for part in bins]
        upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
        upper.bar(middles, [part.accuracy for part in bins], width * 0.92, color="#a9c7e8", label="accuracy")
        upper.plot([part.confidence for part in bins], [part.accuracy for part in bins], "o", color=BLUE, markersize=4)
        upper.set(ylabel="accuracy", ylim=(0, 1.03), xlim=(0, 1))
        upper.legend(loc="upper left")
        bars = lower.bar(middles, [part.n for part in bins], width * 0.92, color=GREY)
        lower.bar_label(bars, [f"{part.n:,}" for part in bins], fontsize=6.5, padding=1)
        lower.margins(y=0.22)
        lower.set(xlabel="top probability (confidence)", ylabel="images")
        return _svg(figure)


def coverage_plot(points: Sequence[CoveragePoint]) -> str:
    """Accuracy of the surest images by their share of all, with its band, as SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        share = [100 * point.n / points[-1].n for point in points]
        bounds = [point.accuracy_ci95 or [point.accuracy, point.accuracy] for point in points]
        low, high = ([100 * bound[side] for bound in bounds] for side in (0, 1))
        axes.fill_between(share, low, high, color="#d6e5f5")
        axes.plot(share, [100 * point.accuracy for point in points], color=BLUE, linewidth=1.8)
        axes.axhline(99, color=GREY, linestyle="--", linewidth=1)
        axes.set(xlabel="images decided, the surest first (%)", ylabel="accuracy (%)", xlim=(0, 100))
        return _svg(figure)


def curve_plot(points: Sequence[CurvePoint]) -> str:
    """A learning curve with its band, images on a logarithmic axis, as SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        images = [point.images for point in points]
        axes.fill_between(
            images, [100 * point.low for point in points], [100 * point.high for point in points], color="#d6e5f5"
        )
        axes.plot(images, [100 * point.accuracy for point in points], "o-", color=BLUE, markersize=4)
        axes.set_xscale("log")
        axes.set_xticks(images, [f"{count:,}" for count in images], rotation=45 if len(images) > 6 else 0)
        axes.minorticks_off()
        axes.set(xlabel="training images", ylabel="accuracy (%)")
        return _svg(figure)


def confusion_image(confusion: Sequence[Sequence[int]]) -> str:
    """The row-normalised matrix of many classes as a PNG in an ``img``, class numbers on the axes."""
    counts = np.asarray(confusion, dtype=np.float64)
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(8.4, 7.6), layout="constrained", dpi=130)
        axes = figure.subplots()
        # The square root keeps rare confusions visible beside a diagonal near 1.
        picture = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="predicted class number", ylabel="true class number")
        bar = figure.colorbar(picture, ax=axes, shrink=0.8, ticks=np.sqrt([0, 0.05, 0.2, 0.5, 1]))
        bar.ax.set_yticklabels(["0", "5", "20", "50", "100"])
        bar.set_label("% of the true class")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img alt="confusion matrix" width="840" src="data:image/png;base64,{data}">'


def _curves(history: Sequence[Mapping[str, Any]], ending: str) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for place, row in enumerate(history, start=1):
        epoch = row.get("epoch", place)
        for key, value in row.items():
            if key.endswith(ending) and _PLAIN_KEY.fullmatch(key) and _finite(value) and _finite(epoch):
                curves.setdefault(key, []).append((epoch, value))
    return {key: points for key, points in curves.items() if len(points) > 1}


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _history_plot(curves: Mapping[str, Sequence[tuple[float, float]]], ending: str) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.1), layout="constrained")
        axes: Axes = figure.subplots()
        factor = 100 if ending == "accuracy" else 1
        others = iter(OTHERS * len(curves))
        for key, points in curves.items():
            known = BLUE if key.startswith("train") else ORANGE if key.startswith(("val", "held")) else None
            color, dash = (known, "-") if known else next(others)
            epochs, values = zip(*points, strict=True)
            label = key.removesuffix(ending).strip("_").replace("_", " ") or ending
            axes.plot(
                epochs, [factor * value for value in values], color=color, linestyle=dash, linewidth=1.8, label=label
            )
        axes.set(xlabel="epoch", ylabel="accuracy (%)" if ending == "accuracy" else "loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return _svg(figure)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]
