"""What advice goes by: counts of the images, and what runs over them have shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A point of a learning curve; ``high`` is the best accuracy that as many images gave."""

    images: int
    accuracy: float
    high: float


@dataclass(frozen=True)
class Probe:
    """A run of stage two over these images: its score on ``split``, and that of always naming the largest class."""

    run: str
    backbone: str
    split: str
    n: int
    accuracy: float
    interval: tuple[float, float]
    chance: float
    note: str = ""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned run over these images against its probe."""

    run: str
    difference: float
    p: float


@dataclass(frozen=True)
class Facts:
    """What the folder and earlier runs say.

    Attributes:
        counts: training images of each of ``class_names``.
        estimated: ``counts`` are shares of all images, since which of them train is not known before `extract`.
        others: images of the other splits, by name.
        duplicates: files whose bytes occurred before; None where contents are not known yet.
        leaked: images of the other splits that train holds too, byte for byte; None likewise.
        pretrained: the backbone's weights are not random.
        weighted: the params weight the classes already.
        head_kinds: those of the params.
    """

    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    others: dict[str, int]
    backbone: str
    estimated: bool = False
    duplicates: int | None = None
    leaked: int | None = None
    pretrained: bool = True
    weighted: bool = False
    head_kinds: tuple[str, ...] = ("logistic",)
    probe: Probe | None = None
    tuned: Tuned | None = None
    curve: tuple[Point, ...] = ()

    @property
    def train(self) -> int:
        """Training images."""
        return sum(self.counts)

    @property
    def smallest(self) -> tuple[str, int]:
        """The class with the fewest training images."""
        return min(zip(self.class_names, self.counts, strict=True), key=lambda row: row[1])

    @property
    def largest(self) -> tuple[str, int]:
        """The class with the most training images."""
        return max(zip(self.class_names, self.counts, strict=True), key=lambda row: row[1])

    @property
    def median(self) -> float:
        """Training images of the class in the middle."""
        return float(statistics.median(self.counts))

    @property
    def imbalance(self) -> float:
        """Images of the largest class over those of the smallest that has any."""
        return self.largest[1] / max(min((count for count in self.counts if count), default=1), 1)
