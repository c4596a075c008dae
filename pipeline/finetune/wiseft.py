"""Interpolate the parameters of the probe and of the fine-tuned classifier (WiSE-FT, Wortsman et al. 2022).

The straight line between the two often holds a classifier better than either, above all away from the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batchnorm import batchnorm_modules
from .contract import State
from .history import Score

SHARES = tuple(step / 10 for step in range(1, 10))


@dataclass(frozen=True)
class Interpolation:
    """The best point of the line: ``share`` 0 is the start, 1 the fine-tuned state; ``scores`` by share."""

    share: float
    state: State
    scores: dict[float, Score]


def mix_states(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> State:
    """``(1 - share) * start + share * tuned`` of all floating tensors; counters are those of ``tuned``."""
    return {
        name: torch.lerp(start[name], value, share) if value.is_floating_point() else value.clone()
        for name, value in tuned.items()
    }


def interpolate(
    classifier: nn.Module,
    start: State,
    tuned: State,
    score: Callable[[nn.Module], Score],
    *,
    images: Callable[[], Iterable[Tensor]] | None = None,
    shares: Sequence[float] = SHARES,
) -> Interpolation:
    """Score the line between two states on the selection set; ``classifier`` ends up holding the best of it.

    Args:
        images: normalised batches of train (n, 3, h, w); where BatchNorm statistics moved, those of a mix are
            estimated anew from them, since the mean of two statistics describes neither network.
        shares: the points between the ends; the ends are always scored.
    """
    moved = [name for name in tuned if "running_" in name and not torch.equal(start[name], tuned[name])]
    scores: dict[float, Score] = {}
    best: tuple[float, State] | None = None
    for share in (0.0, *shares, 1.0):
        state = mix_states(start, tuned, share)
        classifier.load_state_dict(state)
        if moved and images is not None and 0 < share < 1:
            reestimate_statistics(classifier, images())
            state = {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}
        scores[share] = score(classifier)
        if best is None or scores[share].beats(scores[best[0]]):
            best = share, state
    assert best is not None
    classifier.load_state_dict(best[1])
    return Interpolation(best[0], best[1], scores)


def reestimate_statistics(classifier: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every BatchNorm's statistics to their mean over ``batches``; parameters stay, eval mode afterwards."""
    norms = batchnorm_modules(classifier)
    momenta = [norm.momentum for norm in norms]
    classifier.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    try:
        with torch.no_grad():
            for images in batches:
                if len(images) > 1:
                    classifier(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        classifier.eval()
