"""Find learning rates by raising them batch after batch until the loss gives way (Smith 2017)."""

from __future__ import annotations

import copy
import io
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from ..params.sections import FinetuneParams
from .batchnorm import fused
from .classifier import Classifier
from .images import LabelledImages, PixelTransform
from .step import Setup, Stepper, TrainableClassifier

SPANS = {"head_lr": (1e-5, 1.0), "backbone_lr": (1e-7, 1e-1)}
MOMENTUM = 0.9  # of the smoothed loss
DIVERGED = 3.0  # times the lowest smoothed loss ends a curve
TOLERANCE = 0.02
MARGIN = 10.0  # the suggestion lies this far below the largest rate that still did well


@dataclass(frozen=True)
class RateCurve:
    """Smoothed training loss against the rate of one part, the other part held still."""

    name: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def suggestion(self) -> float:
        """A tenth of the largest rate whose loss is about the lowest.

        A head that starts from the probe is at its best already: its curve is flat until it breaks, and the same
        rule stays a tenth below the break.
        """
        lowest = min(self.losses)
        limit = lowest + TOLERANCE * max(self.losses[0] - lowest, abs(self.losses[0]))
        good = [rate for rate, loss in zip(self.rates, self.losses, strict=True) if loss <= limit]
        return float(f"{max(good) / MARGIN:.1e}")


def find_learning_rates(
    classifier: Classifier,
    train: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setup: Setup,
    *,
    steps: int = 60,
) -> tuple[RateCurve, ...]:
    """One curve for the head, one for the backbone (where it is to train), on copies; ``classifier`` stays as it is."""
    curves: list[RateCurve] = []
    with torch.random.fork_rng(devices=[setup.device] if setup.device.type == "cuda" else []):
        for name in SPANS:
            if name == "backbone_lr" and params.unfreeze == "none":
                continue
            alone: dict[str, object] = {"head_lr": 0.0, "backbone_lr": 0.0, name: 1.0}
            if name == "head_lr":
                alone["unfreeze"] = "none"
            elif params.unfreeze == "gradual":
                alone["unfreeze"] = "all"
            changed = params.model_copy(update={**alone, "schedule": "none", "accumulate": 1})
            curves.append(_curve(name, copy.deepcopy(classifier), train, transform, changed, setup, steps))
    return tuple(curves)


def _curve(
    name: str,
    classifier: Classifier,
    train: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setup: Setup,
    steps: int,
) -> RateCurve:
    model = TrainableClassifier(classifier, params, setup)
    stepper = Stepper(model, train, transform)
    model.train_mode()
    planned = ((epoch, batch) for epoch in itertools.count(1) for batch in stepper.plan(epoch))
    chosen = list(itertools.islice(planned, steps))
    rates, losses = np.geomspace(*SPANS[name], steps), list[float]()
    smooth = 0.0
    with fused(model.pairs):
        pixels = stepper.prepare([batch for _, batch in chosen], 1)
        for number, ((epoch, batch), images) in enumerate(zip(chosen, pixels, strict=True)):
            sums = stepper.add_gradients(batch, images, epoch).tolist()
            smooth = MOMENTUM * smooth + (1 - MOMENTUM) * sums[0] / max(sums[1], 1e-12)
            loss = smooth / (1 - MOMENTUM ** (number + 1))
            if not math.isfinite(loss) or (losses and loss > DIVERGED * min(losses)):
                break
            losses.append(loss)
            stepper.step(float(rates[number]))
    return RateCurve(name, tuple(rates[: len(losses)].tolist()), tuple(losses))


def rate_curves_plot(curves: tuple[RateCurve, ...]) -> bytes:
    """The curves with their suggestions, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(curves), 3.5), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        axes.semilogx(curve.rates, curve.losses)
        axes.axvline(curve.suggestion, color="0.7", linewidth=1)
        axes.set(xlabel=curve.name, ylabel="training loss (smoothed)", title=f"suggested {curve.suggestion:.1e}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
