"""Does an exported file give what its run gave? Label by label, probability by probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluate import ClassifierOutput, mcnemar_exact
from ..evaluate.intervals import Floats, Ints

TOLERANCE = 0.02
ALPHA = 0.05
SHOWN = 3


@dataclass(frozen=True)
class Proof:
    """What was compared, and how it came out.

    Attributes:
        n: images.
        agree: those with the run's label.
        max_difference: the largest difference of a probability.
        against: where the run's answers are from, in words.
        accuracy, run_accuracy, p: for a quantised file the shares of right labels, and McNemar's exact test of them.
        problems: why the file must not be used; empty where it may.
    """

    n: int
    agree: int
    max_difference: float
    against: str
    accuracy: float | None = None
    run_accuracy: float | None = None
    p: float | None = None
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For the file's metadata and the summary: what is known, without ``problems``, which are an error."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "problems"}


def prove(
    wanted: ClassifierOutput, found: ClassifierOutput, names: Sequence[str], classes: Sequence[str], *, against: str
) -> Proof:
    """Labels may differ only where the run's two best lie within `TOLERANCE`, no probability by more than that.

    Args:
        wanted, found: the answers of the run and of the file for the images ``names``; both with probabilities.
    """
    assert wanted.probabilities is not None and found.probabilities is not None
    gaps = np.abs(wanted.probabilities - found.probabilities).max(axis=1)
    differ = wanted.predicted != found.predicted
    best = np.sort(wanted.probabilities, axis=1)[:, -2:]
    wrong = np.flatnonzero(differ & (best[:, 1] - best[:, 0] > TOLERANCE)).tolist()
    far = sorted(np.flatnonzero(~(gaps <= TOLERANCE)).tolist(), key=lambda row: -gaps[row])
    problems = []
    if len(wrong):
        shown = [
            f"{names[row]} is {classes[found.predicted[row]]}, was {classes[wanted.predicted[row]]}" for row in wrong
        ]
        problems.append(f"{len(wrong)} of {len(names)} labels differ: {_some(shown)}")
    if len(far):
        shown = [f"{names[row]} by {gaps[row]:.3f}" for row in far]
        problems.append(f"{len(far)} of {len(names)} probabilities differ by more than {TOLERANCE}: {_some(shown)}")
    return Proof(len(names), int((~differ).sum()), float(gaps.max()), against, problems=tuple(problems))


def prove_accuracy(proof: Proof, wanted: Ints, found: Ints, y: Ints, groups: Ints | None = None) -> Proof:
    """The proof of a quantised file, which may differ but must not be shown to be worse on images of classes ``y``.

    Args:
        groups: equal for images that are not independent of one another; None where all are.
    """
    before, after = wanted == y, found == y
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    p = mcnemar_exact(before, after, groups)
    shares = float(after.mean()), float(before.mean())
    worse = lost > won and p < ALPHA
    problem = f"its accuracy is {100 * shares[0]:.1f} %, the run's {100 * shares[1]:.1f} % (exact McNemar p = {p:.2g})"
    return Proof(
        proof.n,
        proof.agree,
        proof.max_difference,
        proof.against,
        accuracy=shares[0],
        run_accuracy=shares[1],
        p=p,
        problems=(problem,) if worse else (),
    )


def as_answers(outputs: Sequence[dict[str, Any]]) -> ClassifierOutput:
    """What a file gave for n images, one after the other."""
    probabilities: Floats = np.array([output["probabilities"] for output in outputs], dtype=np.float64)
    return ClassifierOutput(np.array([int(output["label"]) for output in outputs], dtype=np.int64), probabilities)


def _some(texts: Sequence[str]) -> str:
    return "; ".join(texts[:SHOWN]) + (" ..." if len(texts) > SHOWN else "")
