"""Averages of weights: a moving one along the training, and the best one between its start and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .batchnorm import batchnorm_modules
from .history import Criterion, SelectionScore

StateDict = dict[str, Tensor]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # each costs a pass over the images


class MovingAverage:
    """Follows ``module``'s parameters and floating buffers: ``average += (1 - decay) * (value - average)``.

    Over the first steps the decay grows from 0.1 (``(1 + n) / (10 + n)``), lest the start weighs for thousands of them.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._live = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        self._average = {name: value.clone() for name, value in self._live.items()}

    def update(self) -> None:
        """Take one step towards the current values."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """The averages by name; with ``steps`` all that `restore` needs."""
        return self._average

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a saved `state`."""
        self.steps = steps
        for name, value in self._average.items():
            value.copy_(state[name])

    def _swap(self) -> None:
        for name, value in self._live.items():
            kept = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(kept)


# -- interpolation -----------------------------------------------------------------------------------------------------


def mix_states(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> StateDict:
    """``(1 - share) * start + share * tuned`` of all floating tensors; counters are those of ``tuned``."""
    return {
        name: torch.lerp(start[name], value, share) if value.is_floating_point() else value.clone()
        for name, value in tuned.items()
    }


def take_mix(
    classifier: nn.Module,
    start: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    share: float,
    *,
    images: Callable[[], Iterable[Tensor]],
) -> StateDict:
    """`mix_states`, which ``classifier`` ends up holding; where statistics moved, those of a mix are estimated anew."""
    state = mix_states(start, tuned, share)
    classifier.load_state_dict(state)
    moved = any("running_" in name and not torch.equal(start[name], tuned[name]) for name in tuned)
    if not moved or share in (0, 1):
        return state
    reestimate_statistics(classifier, images())
    return {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}


def interpolate(
    classifier: nn.Module,
    start: StateDict,
    tuned: StateDict,
    score: Callable[[nn.Module], SelectionScore],
    *,
    by: Criterion,
    images: Callable[[], Iterable[Tensor]],
    judges: int,
) -> tuple[float, StateDict]:
    """The best point of the line between two states by ``score`` (WiSE-FT, Wortsman et al. 2022).

    The line often holds a classifier better than either end, above all away from the training data. It is left at its
    start where what another point gains may as well be chance.

    Args:
        judges: images that ``score`` looks at.
        images: normalised batches of train (n, 3, h, w); where BatchNorm statistics moved, those of a mix are
            estimated anew from them, since the mean of two statistics describes neither network.

    Returns:
        the share (0 is ``start``, 1 ``tuned``) and its state, which ``classifier`` ends up holding.
    """
    first, *others = SHARES
    best = at_start = first, take_mix(classifier, start, tuned, first, images=images), score(classifier)
    for share in others:
        state = take_mix(classifier, start, tuned, share, images=images)
        reached = score(classifier)
        if reached.beats(best[2], by):
            best = share, state, reached
    if not best[2].gains_on(at_start[2], by, images=judges):
        best = at_start
    classifier.load_state_dict(best[1])
    return best[:2]


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
