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
from .contract import Setting
from .images import LabelledImages, PixelTransform
from .network import TrainingNetwork
from .steps import Stepper

SPANS = {"head_lr": (1e-5, 1.0), "backbone_lr": (1e-7, 1e-1)}
MOMENTUM = 0.9  # of the smoothed loss
DIVERGED = 3.0  # times the lowest smoothed loss ends a sweep
TOLERANCE = 0.02
MARGIN = 10.0  # the suggestion lies this far below the largest rate that still did well


@dataclass(frozen=True)
class Sweep:
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
    setting: Setting,
    *,
    steps: int = 60,
) -> tuple[Sweep, ...]:
    """One sweep for the head, one for the backbone (where it is to train), on copies; ``classifier`` stays as it is."""
    sweeps: list[Sweep] = []
    with torch.random.fork_rng(devices=[setting.device] if setting.device.type == "cuda" else []):
        for name in SPANS:
            if name == "backbone_lr" and params.unfreeze == "none":
                continue
            alone: dict[str, object] = {"head_lr": 0.0, "backbone_lr": 0.0, name: 1.0}
            if name == "head_lr":
                alone["unfreeze"] = "none"
            elif params.unfreeze == "gradual":
                alone["unfreeze"] = "all"
            changed = params.model_copy(update={**alone, "schedule": "none", "accumulate": 1})
            sweeps.append(_sweep(name, copy.deepcopy(classifier), train, transform, changed, setting, steps))
    return tuple(sweeps)


def _sweep(
    name: str,
    classifier: Classifier,
    train: LabelledImages,
    transform: PixelTransform,
    params: FinetuneParams,
    setting: Setting,
    steps: int,
) -> Sweep:
    network = TrainingNetwork(classifier, params, device=setting.device, batchnorm=setting.batchnorm)
    stepper = Stepper(network, train, transform, class_weights=setting.class_weights, dtype=setting.dtype)
    network.train_mode()
    planned = ((epoch, batch) for epoch in itertools.count(1) for batch in stepper.plan(epoch))
    chosen = list(itertools.islice(planned, steps))
    rates, losses = np.geomspace(*SPANS[name], steps), list[float]()
    smooth = 0.0
    with fused(network.pairs):
        pixels = stepper.prepare([batch for _, batch in chosen], 1)
        for number, ((epoch, batch), images) in enumerate(zip(chosen, pixels, strict=True)):
            sums = stepper.add_gradients(batch, images, epoch).tolist()
            smooth = MOMENTUM * smooth + (1 - MOMENTUM) * sums[0] / max(sums[1], 1e-12)
            loss = smooth / (1 - MOMENTUM ** (number + 1))
            if not math.isfinite(loss) or (losses and loss > DIVERGED * min(losses)):
                break
            losses.append(loss)
            stepper.step(float(rates[number]))
    return Sweep(name, tuple(rates[: len(losses)].tolist()), tuple(losses))


def sweeps_plot(sweeps: tuple[Sweep, ...]) -> bytes:
    """The curves with their suggestions, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(sweeps), 3.5), layout="constrained")
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        axes.semilogx(sweep.rates, sweep.losses)
        axes.axvline(sweep.suggestion, color="0.7", linewidth=1)
        axes.set(xlabel=sweep.name, ylabel="training loss (smoothed)", title=f"suggested {sweep.suggestion:.1e}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
