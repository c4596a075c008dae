"""Near-duplicates: pairs that the features propose and the pixels confirm, by a bar set on copies of the user's own.

Features alone rank a crop or a mirror image of a picture high among its neighbours, but not above every other picture
of its class. So the nearest neighbours are only proposed; each proposal is aligned pixel by pixel (mirrored, turned a
little, cropped), and the two similarities together are the score. Their weights, and where the bar lies, come from
copies of a sample of the images at hand (positive pairs), from the other neighbours of these copies (negative ones),
and from how high all images' neighbours score.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..features.rows import row_blocks
from .looks import Icons
from .neighbours import Neighbours

PROPOSED = 5  # neighbours of an image that are aligned with it
SAMPLE = 40  # images copied for calibration, each in five ways: 200 forwards
FALSE_ALARMS = 3e-3  # share of images that may get a false pair; the estimate errs high, see benchmarks
MOST_MISSED = 0.2  # share of copies that the bar may miss, however many false alarms that costs
GRID = 16  # pixels a side of what is aligned
PAIRS = 512  # aligned at a time
PROMISING = 0.8  # a rough fit that is refined, by these steps in halves of a side
STEPS = (0.06, 0.03, 0.015)
HIGHEST = 1 - 1e-4  # similarities above this are alike for the score

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Features = NDArray[np.float32]


# -- copies ---------------------------------------------------------------------------------------------------------


def copies_of(image: Image.Image, rng: np.random.Generator) -> dict[str, Image.Image]:
    """An RGB image as people and programs copy it, by what was done."""
    width, height = image.size
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=50)
    share = float(np.sqrt(0.8))
    w, h = max(int(width * share), 1), max(int(height * share), 1)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return {
        "re-encoded": Image.open(stream).convert("RGB"),
        "resized": image.resize((max(width // 2, 1), max(height // 2, 1)), Image.Resampling.BICUBIC),
        "cropped": image.crop((left, top, left + w, top + h)),
        "flipped": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "rotated": image.rotate(float(rng.choice((-4.0, 4.0))), Image.Resampling.BICUBIC),
    }


@dataclass(frozen=True)
class Copies:
    """Copies of sampled images.

    Attributes:
        source: (m,) the row of each copy's original.
        kind: m names of what was done.
        features: (m, d).
        icons: uint8 (m, 20, 20, 3).
    """

    source: Ints
    kind: list[str]
    features: Features
    icons: Icons


# -- alignment ------------------------------------------------------------------------------------------------------


@cache
def _warps() -> Tensor:
    """Angle, scale and shift (w, 4): the whole image, turned by up to 6 degrees, and crops of 95 to 80 % of a side."""
    warps = [(float(np.deg2rad(angle)), 1.0, 0.0, 0.0) for angle in (0, -6, -3, 3, 6)]
    for scale in (0.95, 0.9, 0.85, 0.8):
        d = 1 - scale
        warps += [(0.0, scale, x, y) for x, y in ((0, 0), (-d, -d), (-d, d), (d, -d), (d, d))]
    return torch.tensor(warps, dtype=torch.float32)


@cache
def _steps(step: float) -> Tensor:
    """Small changes (29, 4) of a warp: scale and shift, or the angle, a step up or down; and none."""
    moves = [
        (0.0, scale * step / 2, x * step, y * step) for scale in (-1, 0, 1) for x in (-1, 0, 1) for y in (-1, 0, 1)
    ]
    return torch.tensor([*moves, (step, 0, 0, 0), (-step, 0, 0, 0)], dtype=torch.float32)


def alignment(left: Icons, right: Icons, pairs: Ints) -> Floats:
    """The best correlation (p,) of pixels between ``left[pairs[:, 0]]`` and ``right[pairs[:, 1]]``.

    One of the two is whole, the other is turned or cropped; either way round, and mirrored or not. Where that fits
    roughly, scale and place of the crop are refined.
    """
    best = np.full(len(pairs), -1.0)
    for warped, whole, columns in ((left, right, pairs), (right, left, pairs[:, ::-1])):
        order = np.argsort(columns[:, 0], kind="stable")
        for start in range(0, len(order), PAIRS):
            part = order[start : start + PAIRS]
            best[part] = np.maximum(best[part], _aligned(warped, whole, columns[part]))
    return best


def _aligned(warped: Icons, whole: Icons, pairs: Ints) -> Floats:
    own, place = np.unique(pairs[:, 0], return_inverse=True)
    size = (GRID, GRID)
    plain = torch.nn.functional.interpolate(_channels(whole[pairs[:, 1]]), size=size, mode="bilinear", antialias=True)
    targets = torch.stack([_unit(plain), _unit(plain.flip(3))], 1)
    shared = _warps().expand(len(own), -1, -1)
    fits = _sampled(warped[own], shared)[torch.from_numpy(place)] @ targets.transpose(1, 2)
    best, where = fits.flatten(1).max(dim=1)
    rough = (best > PROMISING).nonzero()[:, 0]
    if len(rough):
        target = targets[rough, where[rough] % 2]
        warp, icons = _warps()[where[rough] // 2], warped[pairs[rough.numpy(), 0]]
        for step in STEPS:
            tried = warp[:, None] + _steps(step)
            fit, which = (_sampled(icons, tried) @ target[:, :, None])[:, :, 0].max(dim=1)
            warp = tried[torch.arange(len(rough)), which]
            best[rough] = torch.maximum(best[rough], fit)
    return np.asarray(best.numpy(), np.float64)


def _unit(pixels: Tensor) -> Tensor:
    """Pixels (..., 3, g, g) as unit vectors (..., 3 g g) without their mean."""
    flat = pixels.flatten(-3)
    return torch.nn.functional.normalize(flat - flat.mean(-1, keepdim=True), dim=-1)


def _channels(icons: Icons) -> Tensor:
    return torch.from_numpy(icons.astype(np.float32)).permute(0, 3, 1, 2)


def _sampled(icons: Icons, warps: Tensor) -> Tensor:
    """Unit vectors (m, w, 3 g g) of each icon under its own warps (m, w, 4)."""
    count, each = warps.shape[:2]
    angle, scale, x, y = warps.unbind(2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cos, -sin, x, sin, cos, y], 2).reshape(-1, 2, 3)
    grids = torch.nn.functional.affine_grid(maps, [len(maps), 3, GRID, GRID], align_corners=False)
    # All warps of an image at once: their grids, one below another, are one tall grid.
    tall = grids.reshape(count, each * GRID, GRID, 2)
    sampled = torch.nn.functional.grid_sample(_channels(icons), tall, padding_mode="border", align_corners=False)
    return _unit(sampled.reshape(count, 3, each, GRID, GRID).transpose(1, 2))


# -- the score and its bar ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """When a pair counts as near-duplicates: ``weights`` of its two similarities give a score above ``threshold``.

    Attributes:
        missed: share of the calibration copies of each kind that the bar misses, those not proposed included.
        false_alarms: share of images expected to get a pair that is none; an upper bound where many are true.
    """

    weights: tuple[float, float]
    threshold: float
    missed: Mapping[str, float]
    copies: int
    false_alarms: float = FALSE_ALARMS

    @property
    def miss_rate(self) -> float:
        """Over all kinds of copies."""
        return float(np.mean(list(self.missed.values()))) if self.missed else 0.0

    def score(self, similarity: Floats, aligned: Floats) -> Floats:
        """The score (p,) of pairs from the similarities of features and of aligned pixels; above 0 is over the bar."""
        u, v = (np.arctanh(np.clip(values, -HIGHEST, HIGHEST)) for values in (similarity, aligned))
        return np.asarray(self.weights[0] * u + self.weights[1] * v - self.threshold)

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `as_json`.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        values = json.loads(text)
        return cls(**{**values, "weights": tuple(values["weights"])})


@dataclass(frozen=True)
class Pairs:
    """Proposed pairs (p, 2), each once, with the similarity of their features and of their aligned pixels."""

    rows: Ints
    similarity: Floats
    aligned: Floats


def proposed_pairs(neighbours: Neighbours, icons: Icons) -> Pairs:
    """Each image with its nearest neighbours, aligned."""
    near = neighbours.index[:, :PROPOSED]
    rows = np.stack([np.repeat(np.arange(len(near)), near.shape[1]), near.ravel()], axis=1)
    similarity = neighbours.similarity[:, :PROPOSED].ravel().astype(np.float64)
    rows, first = np.unique(np.sort(rows, axis=1), axis=0, return_index=True)
    return Pairs(rows, similarity[first], alignment(icons, icons, rows))


def calibrate(copies: Copies, features: Features, mean: Features, icons: Icons, pairs: Pairs) -> Bar:
    """Weights that tell copies from mere neighbours, and a bar that lets few images through in error.

    The weights are those of a logistic regression on the pairs (copy, original) against (copy, other neighbour). An
    image's highest score among its neighbours is a maximum, which is Gumbel distributed; its parameters are read off
    the quartiles, which true duplicates reach only where they are a quarter of all. Should they be more, or the
    backbone be too weak, the bar still finds four copies in five, and says what that costs.

    Args:
        features: (n, d) of all images; ``mean`` (d,) is what the neighbours were found with.
    """
    from sklearn.linear_model import LogisticRegression

    near, similarity, own = _neighbours_of_copies(copies, features, mean)
    query = np.repeat(np.arange(len(near)), near.shape[1])
    is_own = (near == copies.source[:, None]).ravel()
    aligned = alignment(copies.icons, icons, np.stack([query, near.ravel()], axis=1))
    X = np.arctanh(np.clip(np.stack([similarity.ravel(), aligned], axis=1), -HIGHEST, HIGHEST))
    # Both similarities speak for a copy. A weight below 0 would be chance.
    fitted = LogisticRegression(class_weight="balanced").fit(X, is_own).coef_[0] if is_own.any() else np.ones(2)
    weights = np.maximum(fitted, 1e-3 * max(abs(fitted).max(), 1e-3))
    weights /= weights.sum()
    bar = Bar((float(weights[0]), float(weights[1])), 0.0, {}, len(copies.kind))
    highest = np.full(len(features), -np.inf)
    scores = bar.score(pairs.similarity, pairs.aligned)
    for column in (0, 1):
        np.maximum.at(highest, pairs.rows[:, column], scores)
    own_score = bar.score(own, alignment(copies.icons, icons, np.stack([np.arange(len(own)), copies.source], axis=1)))
    middle, scale = _gumbel(highest[np.isfinite(highest)])
    threshold = min(middle + scale * _reduced(1 - FALSE_ALARMS), float(np.quantile(own_score, MOST_MISSED)))
    false_alarms = float(-np.expm1(-np.exp(-(threshold - middle) / scale)))
    found = (own_score > threshold) & (near == copies.source[:, None]).any(axis=1)
    kinds = np.array(copies.kind)
    missed = {kind: float(1 - found[kinds == kind].mean()) for kind in dict.fromkeys(copies.kind)}
    return Bar(bar.weights, threshold, missed, bar.copies, false_alarms)


def _neighbours_of_copies(copies: Copies, features: Features, mean: Features) -> tuple[Ints, Floats, Floats]:
    """The nearest images (m, k) of each copy, their similarities, and that (m,) of its original."""
    queries = torch.nn.functional.normalize(torch.from_numpy(copies.features - mean), dim=1)
    blocks = (torch.from_numpy(features[rows] - mean) for rows in row_blocks(features))
    products = torch.cat([queries @ torch.nn.functional.normalize(block, dim=1).T for block in blocks], dim=1)
    similarity, near = products.topk(min(PROPOSED, products.shape[1]), dim=1)
    own = products.gather(1, torch.from_numpy(copies.source)[:, None])[:, 0]
    return near.numpy(), similarity.double().numpy(), own.double().numpy()


def _gumbel(values: Floats) -> tuple[float, float]:
    """Location and scale of the Gumbel distribution with the quartiles of ``values``."""
    low, high = np.quantile(values, (0.25, 0.75))
    scale = max(float(high - low) / (_reduced(0.75) - _reduced(0.25)), 1e-6)
    return float(low) - scale * _reduced(0.25), scale


def _reduced(share: float) -> float:
    return float(-np.log(-np.log(share)))


# -- groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are copies of one another: rows of the table, and the score of the pair that holds it together."""

    rows: list[int]
    score: float
    splits: frozenset[int]
    classes: frozenset[int]

    @property
    def leaks(self) -> bool:
        """Whether it lies across splits."""
        return len(self.splits) > 1

    @property
    def disputed(self) -> bool:
        """Whether its images have different labels."""
        return len(self.classes) > 1


def pairs_over(pairs: Pairs, bar: Bar) -> tuple[Ints, Floats]:
    """The pairs (q, 2) over the bar and their scores, highest first."""
    scores = bar.score(pairs.similarity, pairs.aligned)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > 0]
    return pairs.rows[order], scores[order]


def duplicate_groups(
    content: Ints, pairs: Ints, scores: Floats, splits: NDArray[np.int8], targets: Ints
) -> list[DuplicateGroup]:
    """Groups of images that share a content or whose contents are paired; worst first.

    Args:
        content: (n,) the row of the distinct contents that each image has.
        pairs: (q, 2) rows of contents, with ``scores`` (q,).
        splits, targets: (n,) of each image; a target of -1 is no label and disputes nothing.

    Leaks come first, then disputed labels, then the rest, each by score.
    """
    owner = _components(pairs, int(content.max()) + 1 if len(content) else 0)
    component = owner[content]
    score_of: dict[int, float] = {}
    for (left, _), score in zip(pairs.tolist(), scores.tolist(), strict=True):
        score_of[int(owner[left])] = max(score, score_of.get(int(owner[left]), -np.inf))
    order = np.argsort(component, kind="stable")
    bounds = np.flatnonzero(np.diff(component[order])) + 1
    groups = [
        DuplicateGroup(
            rows.tolist(),
            score_of.get(int(component[rows[0]]), np.inf),  # byte for byte the same
            frozenset(splits[rows].tolist()),
            frozenset(target for target in targets[rows].tolist() if target >= 0),
        )
        for rows in np.split(order, bounds)
        if len(rows) > 1
    ]
    return sorted(groups, key=lambda group: (-group.leaks, -group.disputed, -group.score))


def _components(pairs: Ints, size: int) -> Ints:
    """The smallest row (size,) that each can be reached from along ``pairs``."""
    owner = np.arange(size)
    while True:
        before = owner.copy()
        least = owner[pairs].min(axis=1)
        for column in (0, 1):
            np.minimum.at(owner, pairs[:, column], least)
        owner = owner[owner]
        if (owner == before).all():
            return owner


def near_leaks(groups: Sequence[DuplicateGroup], splits: NDArray[np.int8], reported: int, train: int) -> Iterator[int]:
    """Rows of the reported split whose group reaches into train."""
    for group in groups:
        if {reported, train} <= group.splits:
            yield from (row for row in group.rows if splits[row] == reported)
